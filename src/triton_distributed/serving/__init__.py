"""One worker: what it listens on, who is let in, how handlers run."""

__all__: list[str] = []
