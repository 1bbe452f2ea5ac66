"""Sessions on sockets, in memory and over NATS: the asyncio shell around `wire`, the pool, the listener, TLS."""

__all__: list[str] = []
