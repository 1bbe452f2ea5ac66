"""The instances that discovery lists, and whether they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from triton_distributed.discovery import Change, Snapshot
from triton_distributed.errors import ConnectionFailed
from triton_distributed.names import Instance
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.identity import host_name

PROBES = 64
"""Instances probed at a time: well below the usual limit of 256 to 1024 open files of a process."""


async def listed(runtime: DistributedRuntime) -> list[Instance]:
    """The instances of all endpoints, by endpoint and id.

    Raises:
        DiscoveryError: discovery cannot be read.
    """
    found: list[Instance] = []

    def sink(change: Change) -> None:
        if isinstance(change, Snapshot):
            found.extend(change.instances)

    (await runtime.discovery.watch(None, sink)).close()
    return sorted(found, key=lambda each: (str(each.endpoint), each.id))


async def silences(runtime: DistributedRuntime, instances: Iterable[Instance]) -> list[str]:
    """Connect to instances at the same time. Returns for each the reason why it does not answer; empty if it does."""
    places = asyncio.Semaphore(PROBES)

    async def probe(instance: Instance) -> str:
        here = not instance.host or instance.host == host_name()
        addresses = tuple(each for each in instance.addresses if here or not each.startswith("unix:"))
        if not addresses:
            return f"{', '.join(instance.addresses) or 'no address'}: on another machine, or from before a reboot"
        async with places:
            try:
                await runtime.pool.connect(addresses)
            except ConnectionFailed as error:
                return "; ".join(f"{address}: {reason}" for address, reason in error.attempts)
        return ""

    return await asyncio.gather(*map(probe, instances))
