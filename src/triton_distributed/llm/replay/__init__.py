"""Replay a trace of requests in virtual time, with the routing policies of production. See docs/llm/routing.md.

report = simulate(read_trace("conversation_trace.jsonl"), "kv", workers=8, speed=6)
assert report.ttft_s.mean < 0.5
"""

from triton_distributed.llm.replay.report import Moment, PoolShare, Report, Served, Spread, WorkerShare
from triton_distributed.llm.replay.simulate import simulate
from triton_distributed.llm.replay.trace import Trace, TraceRequest, read_trace

__all__ = [
    "Moment",
    "PoolShare",
    "Report",
    "Served",
    "Spread",
    "Trace",
    "TraceRequest",
    "WorkerShare",
    "read_trace",
    "simulate",
]
