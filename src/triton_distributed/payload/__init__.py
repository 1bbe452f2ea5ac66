"""Values to bytes and back: which values a message may hold, and how types are checked. No I/O, no frames."""

__all__: list[str] = []
