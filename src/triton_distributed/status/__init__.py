"""What a runtime shows to operators: its metrics as a page for Prometheus."""

__all__: list[str] = []
