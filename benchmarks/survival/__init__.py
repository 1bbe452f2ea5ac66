"""What is left of a service while its workers are killed, restarted and flooded. `python -m benchmarks.survival`."""
