"""The `trd` command. Each subcommand has its own file, imported only when that subcommand runs."""

__all__: list[str] = []
