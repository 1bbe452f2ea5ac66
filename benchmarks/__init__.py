"""The costs of the runtime, as ratios within one run: `python -m benchmarks --help`. README.md here has the method."""
