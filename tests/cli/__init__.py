"""The `trd` command, run as its users run it: as processes of their own."""
