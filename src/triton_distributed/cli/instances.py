"""The instances that discovery lists, and whether they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from triton_distributed.discovery import Change, Discovery, Snapshot
from triton_distributed.errors import ConnectionFailed, DiscoveryError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.identity import host_name

PROBES = 64
"""Instances probed at a time: well below the usual limit of 256 to 1024 open files of a process."""


async def listed(discovery: Discovery) -> list[Instance]:
    """The instances of all endpoints, by endpoint and id.

    Raises:
        DiscoveryError: discovery cannot be read.
    """
    found: list[Instance] = []

    def sink(change: Change) -> None:
        if isinstance(change, Snapshot):
            found.extend(change.instances)

    (await discovery.watch(None, sink)).close()
    return sorted(found, key=lambda each: (str(each.endpoint), each.id))


def dialable(instance: Instance) -> tuple[str, ...]:
    """The addresses of an instance that can be dialled from this machine."""
    here = not instance.host or instance.host == host_name()
    return tuple(each for each in instance.addresses if here or not each.startswith("unix:"))


def absence(instance: Instance) -> str:
    """Why an instance without an address that can be dialled does not answer."""
    return f"{', '.join(instance.addresses) or 'no address'}: on another machine, or from before a reboot"


def close_names(name: str, known: Iterable[str]) -> str:
    """Words that suggest what a user may have meant by a name that nothing serves; empty if no known name is close."""
    import difflib

    found = difflib.get_close_matches(name, set(known), 1, 0.75)
    return f"; did you mean {found[0]}?" if found else ""


def nothing_is_served(asked: str) -> str:
    """Words about an empty list.

    Args:
        asked: the place of discovery, and where else something is served.
    """
    return f"no endpoint is served ({asked}); `trd serve MODULE:OBJECT --endpoint NS.COMP.EP` serves one"


async def close_to(name: EndpointName, runtime: DistributedRuntime) -> str:
    """Suggest an endpoint that is served in place of one that is not; see `close_names`."""
    try:
        return close_names(str(name), (str(each.endpoint) for each in await listed(runtime.discovery)))
    except DiscoveryError:  # The command's own error matters more.
        return ""


async def silences(runtime: DistributedRuntime, instances: Iterable[Instance]) -> list[str]:
    """Connect to instances at the same time. Returns for each the reason why it does not answer; empty if it does."""
    places = asyncio.Semaphore(PROBES)

    async def probe(instance: Instance) -> str:
        addresses = dialable(instance)
        if not addresses:
            return absence(instance)
        async with places:
            try:
                await runtime.pool.connect(addresses)
            except ConnectionFailed as error:
                return "; ".join(f"{address}: {reason}" for address, reason in error.attempts)
        return ""

    return await asyncio.gather(*map(probe, instances))
