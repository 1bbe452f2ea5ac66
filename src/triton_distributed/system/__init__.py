"""What the operating system gives: sockets, private folders, signals, forks, names of this host."""

__all__: list[str] = []
