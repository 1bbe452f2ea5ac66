"""Discovery through etcd, in its own thread."""

__all__: list[str] = []
