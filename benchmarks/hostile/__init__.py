"""Hostile peers: `python -m benchmarks.hostile`. See __main__.py, and benchmarks/README.md."""
