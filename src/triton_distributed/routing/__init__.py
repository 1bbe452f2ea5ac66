"""The choice of an instance for a request: policies, the load of each instance, rotation and ejection."""

__all__: list[str] = []
