"""One call: which instance, what is sent again, what its reader gets."""

__all__: list[str] = []
