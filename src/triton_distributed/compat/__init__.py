"""Other runtimes' names and semantics on this one, so that their programs move by their import lines."""

__all__: list[str] = []
