"""Discovery through etcd, in a thread of its own."""

__all__: list[str] = []
