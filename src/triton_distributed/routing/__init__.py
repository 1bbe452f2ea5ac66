"""Which instance gets a request: policies, the load of each instance, which instances are out of rotation."""

__all__: list[str] = []
