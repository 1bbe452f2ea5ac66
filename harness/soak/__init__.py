"""The soak: its kinds of calls, its events, its verdict and its table."""
