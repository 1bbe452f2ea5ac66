"""The checks of `trd doctor`, one file for each part of the system that it looks at."""

__all__: list[str] = []
