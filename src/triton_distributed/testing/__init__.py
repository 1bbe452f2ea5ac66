"""Tools for testing programs: fixtures of pytest, virtual time, local clusters, network faults, real servers.

The names below are imported when they are first used: pytest loads the plugin in this package in each of its runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_distributed.testing.discovery import ChangeLog, DiscoveryConformance, FixedDiscoveryConformance
    from triton_distributed.testing.events import EventConformance
    from triton_distributed.testing.fakes import Fake, UnexpectedCall
    from triton_distributed.testing.leftovers import LeftOver
    from triton_distributed.testing.local import LocalCluster
    from triton_distributed.testing.network import LocalConnection, LocalNetwork
    from triton_distributed.testing.proxy import FaultProxy, Faults
    from triton_distributed.testing.servers import EtcdCluster, EtcdServer, NatsServer, ServerMissing
    from triton_distributed.testing.sync_network import LocalSyncConnection
    from triton_distributed.testing.virtual_time import Deadlock, Livelock, VirtualTimeLoop, run_in_virtual_time

_PLACES = {
    "discovery": ("ChangeLog", "DiscoveryConformance", "FixedDiscoveryConformance"),
    "events": ("EventConformance",),
    "fakes": ("Fake", "UnexpectedCall"),
    "leftovers": ("LeftOver",),
    "local": ("LocalCluster",),
    "network": ("LocalConnection", "LocalNetwork"),
    "proxy": ("FaultProxy", "Faults"),
    "servers": ("EtcdCluster", "EtcdServer", "NatsServer", "ServerMissing"),
    "sync_network": ("LocalSyncConnection",),
    "virtual_time": ("Deadlock", "Livelock", "VirtualTimeLoop", "run_in_virtual_time"),
}
_PLACE = {name: f"{__name__}.{module}" for module, names in _PLACES.items() for name in names}

__all__ = [
    "ChangeLog",
    "Deadlock",
    "DiscoveryConformance",
    "EtcdCluster",
    "EtcdServer",
    "EventConformance",
    "Fake",
    "FaultProxy",
    "Faults",
    "FixedDiscoveryConformance",
    "LeftOver",
    "Livelock",
    "LocalCluster",
    "LocalConnection",
    "LocalNetwork",
    "LocalSyncConnection",
    "NatsServer",
    "ServerMissing",
    "UnexpectedCall",
    "VirtualTimeLoop",
    "run_in_virtual_time",
]


def __getattr__(name: str) -> Any:
    place = _PLACE.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(place), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
