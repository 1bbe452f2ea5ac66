"""The routing policies by name."""

__all__: list[str] = []
