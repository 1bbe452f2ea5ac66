"""A policy sees the metadata of the call, and affinity keeps one user's calls on one instance."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.runtime import Affinity, Context


def by_model(request: Any, instances: tuple[Instance, ...], load: LoadBook, metadata: Mapping[str, Any]) -> Instance:
    able = [each for each in instances if metadata["model"] in each.metadata["models"]]
    return min(able, key=lambda each: load[each.id])


async def who(request: Any, context: Context) -> str:
    return f"{context.metadata.get('model')} on {request}"


@pytest.mark.any_loop
async def test_a_policy_chooses_by_metadata(cluster: Cluster) -> None:
    async def one(request: Any) -> str:
        return "one"

    async def other(request: Any) -> str:
        return "other"

    await cluster.worker(one, metadata={"models": ["small"]})
    await cluster.worker(other, metadata={"models": ["large"]})
    client = await cluster.client(policy=by_model)
    plain = await cluster.client()
    for model, expected in {"small": "one", "large": "other"}.items():
        metadata = {"model": model}
        assert await patiently(client.call(1, metadata=metadata)) == expected
        assert await patiently(plain.call(1, metadata=metadata, policy=by_model)) == expected
        assert await patiently(client.call(1, context=Context(metadata=metadata))) == expected
        assert await patiently(client.call(1, context=Context(travelling=metadata))) == expected
        assert await patiently(drained(client.generate(1, annotated=False, metadata=metadata))) == [expected]
        hedged = client.call(1, metadata=metadata, idempotent=True, hedge_after_s=60)
        assert await patiently(hedged) == expected


async def test_what_a_policy_sees(cluster: Cluster) -> None:
    seen: list[dict[str, Any]] = []

    def policy(request: Any, instances: Any, load: Any, metadata: Mapping[str, Any]) -> Any:
        seen.append(dict(metadata))
        with pytest.raises(TypeError):
            metadata["new"] = 1  # type: ignore[index]
        return instances[0]

    async def outer(request: Any, context: Context) -> Any:
        context.travel(step="outer")
        return await (await cluster.client("t.c.inner", policy=policy)).call(1, metadata={"own": 1}, priority=3)

    await cluster.worker(outer)
    await cluster.worker(who, "t.c.inner")
    context = Context("r", {"only": "outer"}, {"user": "u", "own": 0})
    await patiently((await cluster.client(policy=policy)).call(1, context=context))
    await patiently((await cluster.client(policy=policy)).call(1, metadata=None))
    assert seen[:2] == [{"only": "outer", "user": "u", "own": 0}, {"user": "u", "own": 1, "step": "outer"}]
    assert seen[2] == {}


async def test_a_policy_that_needs_a_missing_key_fails_its_call_only(cluster: Cluster) -> None:
    await cluster.worker(who, metadata={"models": ["small"]})
    client = await cluster.client(policy=by_model)
    with pytest.raises(ValueError, match="by_model raised KeyError: 'model'"):
        await patiently(client.call(1))
    assert await patiently(client.call(2, metadata={"model": "small"})) == "small on 2"


async def test_a_user_stays_on_one_instance_and_moves_when_it_goes(cluster: Cluster) -> None:
    def naming(number: int) -> Any:
        async def handler(request: Any) -> int:
            return number

        return handler

    workers = [await cluster.worker(naming(number)) for number in range(3)]
    client = await cluster.client(policy=Affinity("user"))

    async def at(user: str) -> int:
        return int(await client.call(1, context=Context(travelling={"user": user})))

    users = [f"user-{n}" for n in range(30)]
    first = {user: await patiently(at(user)) for user in users}
    assert set(first.values()) == {0, 1, 2}
    assert {user: await patiently(at(user)) for user in users} == first
    assert dict(zip(users, await patiently(asyncio.gather(*map(at, users))), strict=True)) == first
    await workers[0].close()
    after = {user: await patiently(at(user)) for user in users}
    assert {user for user in users if after[user] != first[user]} == {user for user in users if first[user] == 0}
