"""What only this repository runs: a workload that judges itself, a fleet of processes, and the runs of both."""
