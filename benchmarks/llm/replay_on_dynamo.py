"""Replays of Dynamo's own: `python -m benchmarks.llm.replay_on_dynamo TRACE SPEED WORKERS` in its environment.

Reads settings from standard input, a JSON object a line: `{}` for round robin, or options of `KvRouterConfig`. Writes a
line of figures for each.
"""

from __future__ import annotations

import json
import sys

from dynamo._core import KvRouterConfig, run_mocker_trace_replay

WITHIN_MS = 2000.0


def main() -> None:
    """Answer each line."""
    trace, speed, workers = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    for line in sys.stdin:
        options = json.loads(line)
        found = run_mocker_trace_replay(
            [trace],
            num_workers=workers,
            router_mode="kv_router" if options else "round_robin",
            router_config=KvRouterConfig(**options) if options else None,
            replay_mode="offline",
            arrival_speedup_ratio=speed,
            trace_block_size=512,
            sla_ttft_ms=WITHIN_MS,
            extra_engine_args={"engine": {}},
        ).summary
        figures = {
            "mean_s": found["mean_ttft_ms"] / 1000,
            "p99_s": found["p99_ttft_ms"] / 1000,
            "itl_s": found["mean_itl_ms"] / 1000,
            "e2e_s": found["mean_e2e_latency_ms"] / 1000,
            "hit_rate": found["first_admission_prefix_cache_reused_ratio"],
            "within": found["goodput_completed_requests"],
            "requests": found["num_requests"],
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
