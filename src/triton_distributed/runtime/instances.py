"""The instances of an endpoint as one runtime sees them: plain frozen values, made without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from triton_distributed.calling.candidates import Candidates
from triton_distributed.names import Instance
from triton_distributed.routing.load import ReportedLoad

InstanceState = Literal["available", "busy", "ejected", "unreachable"]


class InstanceStatus(msgspec.Struct, frozen=True):
    """One instance of an endpoint, as one runtime sees it.

    Attributes:
        id: its id.
        addresses: where it listens, best first, as far as this host can dial them.
        host: the machine and boot on which it runs.
        metadata: what its worker published about it, read-only.
        state: `available`; `busy`: its event loop is stuck; `ejected`: left out, because its calls fail far more often
            than those of others; `unreachable`: its connection was lost, could not be made, or is silent. A paused
            instance is not listed.
        streams: streams that this runtime has open on it.
        load: its load as its worker reports it, over all clients; None without a report, see `Client.instances`.
    """

    id: int
    addresses: tuple[str, ...]
    host: str
    metadata: Mapping[str, Any]
    state: InstanceState
    streams: int
    load: ReportedLoad | None


def of_candidates(candidates: Candidates) -> list[InstanceStatus]:
    """The instances of an endpoint, ordered by id."""
    # If discovery lists no instance, calls go to those that are still connected.
    known = candidates.table.instances or candidates.instances
    return [_of_instance(each, candidates) for each in sorted(known, key=lambda each: each.id)]


def _of_instance(instance: Instance, candidates: Candidates) -> InstanceStatus:
    state: InstanceState = "available"
    if instance.id in candidates.rotation.down:
        state = "unreachable"
    elif instance.busy:
        state = "busy"
    elif instance.id in candidates.ejector.outliers.ejected:
        state = "ejected"
    return InstanceStatus(
        id=instance.id,
        addresses=instance.addresses,
        host=instance.host,
        metadata=MappingProxyType(dict(instance.metadata)),
        state=state,
        streams=candidates.load[instance.id],
        load=candidates.load.reported(instance.id),
    )
