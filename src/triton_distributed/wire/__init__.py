"""What travels and in what form: frames, streams and connections, without I/O and without a clock."""

__all__: list[str] = []
