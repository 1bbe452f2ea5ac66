"""The runs, a program each: `python -m harness.runs.NAME`."""
