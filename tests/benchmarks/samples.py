"""A small result file: three rounds of two workloads."""

from __future__ import annotations

from typing import Any

from benchmarks.rounds import Rounds, summarise

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "system": "Linux",
    "python": "CPython 3.11",
    "python_build": {"pgo": True, "lto": False},
    "packages": {"uvloop": "1", "grpcio": None},
}


def result(rounds: Rounds, *, quick: bool = False) -> dict[str, Any]:
    """Return the content of a result file with these rounds."""
    return {
        "started": "2026-11-29T20:00:00+00:00",
        "machine": MACHINE,
        "load_before_and_after": [0.5, 1.25],
        "method": {"rounds": 3, "quick": quick},
        "rounds": rounds,
        **summarise(rounds),
        "failures": [],
    }


def rounds_of(**values: list[float]) -> list[dict[str, Any]]:
    """Return rounds from the figures of each: `rounds_of(per_s=[1, 2])`."""
    return [dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)]


CALLS: Rounds = {
    "concurrent": {
        "ours": rounds_of(per_s=[100.0, 120.0, 110.0], cpu_us=[2.0, 30.0, 4.0], peak_mib=[70.0, 71.0, 72.0]),
        "yardstick": rounds_of(per_s=[200.0, 240.0, 220.0], cpu_us=[1.0, 10.0, 1.0], peak_mib=[60.0, 61.0, 62.0]),
    },
    "alone": {
        "ours": rounds_of(p50_us=[80.0, 90.0, 100.0]),
        "grpc.aio": rounds_of(p50_us=[500.0, 600.0, 700.0]),
        "ours tcp": rounds_of(p50_us=[120.0, 130.0, 140.0]),
        "grpc.aio tcp": rounds_of(p50_us=[600.0, 650.0, 700.0]),
    },
}
