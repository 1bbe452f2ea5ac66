"""Which worker gets a request, by what its cache holds and what it has to do. Pure: no I/O, no clock."""

__all__: list[str] = []
