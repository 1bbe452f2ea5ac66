"""Discovery through a private folder of one machine."""

__all__: list[str] = []
