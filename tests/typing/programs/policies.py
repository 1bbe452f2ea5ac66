"""Policies with types, instances and their load, and the slips that checkers must find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

import triton_distributed as trd
from triton_distributed.runtime import Client, Endpoint


def fewest(request: Any, instances: tuple[trd.Instance, ...], load: trd.LoadBook) -> trd.Instance:
    def weight(instance: trd.Instance) -> int:
        found = load.reported(instance.id)
        assert_type(found, trd.ReportedLoad | None)
        return load[instance.id] if found is None else found.in_flight + found.queued

    return min(instances, key=weight)


def by_model(
    request: Any, instances: tuple[trd.Instance, ...], load: trd.LoadBook, metadata: Mapping[str, Any]
) -> trd.Instance:
    return next(each for each in instances if metadata["model"] in each.metadata["models"])


def id_of(request: Any, instances: tuple[trd.Instance, ...], load: trd.LoadBook) -> int:
    return instances[0].id


async def policies(endpoint: Endpoint) -> None:
    for policy in (fewest, by_model, trd.Affinity("user", spill=3)):
        await endpoint.client(policy)
    client = await endpoint.client("p2c")
    await client.call(1, policy=trd.Affinity("user"), metadata={"user": "ada"})
    await client.call(1, policy=by_model, context=trd.Context(travelling={"model": "tiny"}))
    await client.call(1, policy=id_of)  # refused: arg-type, reportArgumentType
    trd.Affinity(7)  # refused: arg-type, reportArgumentType


async def instances(client: Client) -> None:
    [one] = client.instances()
    assert_type(one, trd.InstanceStatus)
    if one.state == "available" and one.load is not None:
        assert_type(one.load.in_flight, int)
    one.streams = 0  # refused: misc, reportAttributeAccessIssue
    context = trd.Context(travelling=["user"])  # refused: arg-type, reportArgumentType
    context.travel(user="ada")
    trd.log_requests("root")  # refused: arg-type, reportArgumentType
