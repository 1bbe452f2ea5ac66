"""The router of the original, and names of its successor, on this runtime: the same calls, subjects and texts."""

__all__: list[str] = []
