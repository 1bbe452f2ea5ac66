"""Tools for testing programs: local clusters, virtual time, network faults, real servers, conformance suites."""

from triton_distributed.testing.discovery import ChangeLog, DiscoveryConformance, FixedDiscoveryConformance
from triton_distributed.testing.events import EventConformance
from triton_distributed.testing.local import LeftOver, LocalCluster
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
    "FixedDiscoveryConformance",
    "LeftOver",
    "Livelock",
    "LocalCluster",
    "NatsServer",
    "ServerMissing",
    "VirtualTimeLoop",
    "run_in_virtual_time",
]
