"""The runs: `python -m harness.runs.NAME`; `survival` does kill, restart, overload and rotation."""
