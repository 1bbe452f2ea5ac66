"""The soak: minutes of mixed load with cancellations, errors, cut connections and worker restarts, and what stays.

`python -m benchmarks.soak`, or `make soak`. See benchmarks/README.md.
"""
