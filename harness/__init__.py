"""Tests of survival that only this repository runs: a workload that judges itself, a fleet of processes, their runs."""
