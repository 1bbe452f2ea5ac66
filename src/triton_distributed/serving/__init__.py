"""One worker: what it listens on, which requests begin, how handlers run."""

__all__: list[str] = []
