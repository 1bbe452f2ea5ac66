"""What connects this package with others: web frameworks."""

__all__: list[str] = []
