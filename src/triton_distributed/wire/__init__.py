"""The wire protocol: frames, streams and connections, without I/O and without a clock."""

__all__: list[str] = []
