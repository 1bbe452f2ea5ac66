"""Where things lie in etcd.

    PREFIX/instances/ENDPOINT/ID    a record: ENDPOINT as `discovery.record.prefix` has it, ID in 16 hex digits
    PREFIX/lineage                  a random text, written once in the life of a store: an etcd that was emptied, or
                                    is another one, has another or none

ENDPOINT holds no slash and ends in a hash of the whole name, so no endpoint's keys begin as another's do.
"""

from __future__ import annotations

from triton_distributed.discovery import record
from triton_distributed.external.etcd_messages import past
from triton_distributed.names import EndpointName, Instance


class EtcdKeys:
    """The keys below one prefix, which need not end in a slash."""

    def __init__(self, prefix: str) -> None:
        self._instances = f"{prefix.rstrip('/')}/instances/"
        self.lineage = f"{prefix.rstrip('/')}/lineage".encode()

    def of(self, endpoint: EndpointName, instance_id: int) -> bytes:
        """The key of an instance."""
        return f"{self._instances}{record.prefix(endpoint)}/{instance_id:016x}".encode()

    def range(self, endpoint: EndpointName | None) -> tuple[bytes, bytes]:
        """First key and end of an endpoint's instances, or of all."""
        first = self._instances if endpoint is None else f"{self._instances}{record.prefix(endpoint)}/"
        return first.encode(), past(first.encode())

    def read(self, key: bytes, value: bytes) -> Instance:
        """The instance that lies under a key.

        Raises:
            BadRecord: it is not a record, or not one that belongs there.
        """
        instance = record.decode(value)
        if self.of(instance.endpoint, instance.id) != key:
            raise record.BadRecord(f"it is about {instance.endpoint} id {instance.id}, which its key is not")
        return instance
