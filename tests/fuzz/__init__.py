"""Fuzz targets: each file `fuzz_*.py` opens with its invariant and has `one_input(data: bytes)` and `SEEDS`.

`make fuzz` takes a minute for all, guided by coverage where atheris is installed; the suite runs the seeds and some
thousand mutations.
"""
