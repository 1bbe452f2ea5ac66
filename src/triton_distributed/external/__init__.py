"""What is not ours: the servers of a cluster (NATS, etcd), TLS contexts, what a container asks of its first process."""

__all__: list[str] = []
