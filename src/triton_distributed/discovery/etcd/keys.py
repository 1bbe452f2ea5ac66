"""The keys in etcd.

    PREFIX/instances/ENDPOINT/ID    a record: ENDPOINT is `discovery.record.prefix`, ID has 16 hex digits
    PREFIX/lineage                  a random text, written once in the life of a store: an emptied or different etcd
                                    has another text or none

ENDPOINT contains no slash and ends in a hash of the whole name, so the keys of no endpoint begin with another's prefix.
"""

from __future__ import annotations

from triton_distributed.discovery import record
from triton_distributed.external.etcd_messages import past
from triton_distributed.names import EndpointName, Instance


class EtcdKeys:
    """The keys below one prefix. The prefix need not end in a slash."""

    def __init__(self, prefix: str) -> None:
        self._instances = f"{prefix.rstrip('/')}/instances/"
        self.lineage = f"{prefix.rstrip('/')}/lineage".encode()

    def of(self, endpoint: EndpointName, instance_id: int) -> bytes:
        """The key of an instance."""
        return f"{self._instances}{record.prefix(endpoint)}/{instance_id:016x}".encode()

    def range(self, endpoint: EndpointName | None) -> tuple[bytes, bytes]:
        """The first key and the end of the range of an endpoint's instances; of all instances for None."""
        first = self._instances if endpoint is None else f"{self._instances}{record.prefix(endpoint)}/"
        return first.encode(), past(first.encode())

    def read(self, key: bytes, value: bytes) -> Instance:
        """Decode the instance under a key.

        Raises:
            BadRecord: the value is not a valid record, or belongs under another key.
        """
        instance = record.decode(value)
        if self.of(instance.endpoint, instance.id) != key:
            raise record.BadRecord(f"it describes {instance.endpoint} id {instance.id}, but its key does not")
        return instance
