"""The native API: typed contracts, `serve`, `connect`. Programs use these names from `triton_distributed` itself."""

__all__: list[str] = []
