"""Replicas: one program in several processes, each with its own runtime, and the process that keeps them running."""

__all__: list[str] = []
