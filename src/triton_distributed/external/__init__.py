"""What speaks to the servers that a cluster may have: NATS, etcd; and the TLS contexts that they and sessions need."""

__all__: list[str] = []
