"""For the tests of programs: a network that misbehaves, real servers, and what every discovery backend must do."""

from triton_distributed.testing.discovery import ChangeLog, DiscoveryConformance
from triton_distributed.testing.proxy import FaultProxy, Faults
from triton_distributed.testing.servers import EtcdCluster, EtcdServer, NatsServer, ServerMissing

__all__ = [
    "ChangeLog",
    "DiscoveryConformance",
    "EtcdCluster",
    "EtcdServer",
    "FaultProxy",
    "Faults",
    "NatsServer",
    "ServerMissing",
]
