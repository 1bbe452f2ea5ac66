"""The router of one model in a process: it listens to the workers, keeps index and bookings, and gives places."""

__all__: list[str] = []
