"""Clients of the cluster's servers (NATS, etcd), and TLS contexts."""

__all__: list[str] = []
