"""Requests over NATS: a transport below ordinary sessions."""

__all__: list[str] = []
