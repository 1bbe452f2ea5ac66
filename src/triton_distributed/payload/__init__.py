"""Values to bytes and back: what a message may hold, and what its types are made of. No I/O, no frames."""

__all__: list[str] = []
