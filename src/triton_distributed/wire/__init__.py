"""What travels and in what form: frames, sessions and payloads, without I/O and without a clock."""

__all__: list[str] = []
