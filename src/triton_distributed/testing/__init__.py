"""For the tests of programs: a network that misbehaves, real servers, what every backend of a kind must do."""

from triton_distributed.testing.discovery import ChangeLog, DiscoveryConformance
from triton_distributed.testing.events import EventConformance
from triton_distributed.testing.proxy import FaultProxy, Faults
from triton_distributed.testing.servers import EtcdCluster, EtcdServer, NatsServer, ServerMissing
from triton_distributed.testing.virtual_time import Deadlock, Livelock, VirtualTimeLoop, run_in_virtual_time

__all__ = [
    "ChangeLog",
    "Deadlock",
    "DiscoveryConformance",
    "EtcdCluster",
    "EtcdServer",
    "EventConformance",
    "FaultProxy",
    "Faults",
    "Livelock",
    "NatsServer",
    "ServerMissing",
    "VirtualTimeLoop",
    "run_in_virtual_time",
]
