"""An engine as served endpoints: its model's card and assets, admission, cancellation and metrics."""

__all__: list[str] = []
