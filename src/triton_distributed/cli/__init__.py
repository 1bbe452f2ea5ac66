"""The `trd` command: one file a subcommand, each imported only when it is the one that was asked for."""

__all__: list[str] = []
