"""A distributed runtime for Python machine-learning workloads."""

__all__ = ["__version__"]

__version__ = "0.1.0"
