"""Traces over real processes, and the same in virtual time: `python -m benchmarks.llm.replay_real DIRECTORY`.

DIRECTORY has Mooncake's `synthetic_trace.jsonl`. `trd http` and eight workers with the mock engine run as processes
of their own. One process sends a part of the trace over HTTP, each request when it is due, and reads the streams; the
prompts are equal where the trace says so. `simulate` gets the same requests, engines and policy. Answers are cut to a
few tokens, and the engines are slow (100 µs for each token of a prompt, 100 ms for a step), so that a busy machine of
two cores adds little to the times. It writes results/replay-real.json.

With `--pools` the requests are chats beside documents of `benchmarks.llm.pools`, and two of the workers are prefill
workers. It writes results/pools-real.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from benchmarks.llm.pools import MANY, mixed
from benchmarks.llm.processes import Processes
from benchmarks.peers.places import free_port
from benchmarks.rounds import RESULTS
from harness.machine import describe
from triton_distributed.llm import unpacked
from triton_distributed.llm.engines.mock.timing import linear
from triton_distributed.llm.replay import Report, Trace, read_trace, simulate

WORKERS = 8
PREFILL = 2
POOLS_RATE = 3.0
POOLS_ANSWER_TOKENS = 60
TTFT_MS, PREFILL_TOKEN_MS, ITL_MS, TRANSFER_TOKEN_MS = 20.0, 0.1, 100.0, 0.02
ANSWER_TOKENS = 20
FIRST = 3700  # From here on, more than half of the prompts' tokens recur within 250 requests.
MODEL = "mock"
START_S = 60.0


class Answered(NamedTuple):
    """What one request got over HTTP."""

    ttft_s: float
    e2e_s: float
    cached_tokens: int
    late_s: float  # How much later than due it was sent.
    gaps_s: list[float]  # Between two tokens.


def part(trace: Trace, requests: int) -> Trace:
    """Some requests of a trace, from its request FIRST on, with short answers."""
    chosen = trace.requests[FIRST : FIRST + requests]
    kept = [
        msgspec.structs.replace(
            each, at_s=each.at_s - chosen[0].at_s, answer_tokens=min(each.answer_tokens, ANSWER_TOKENS)
        )
        for each in chosen
    ]
    return Trace(kept, block_tokens=trace.block_tokens, name=trace.name)


def chats_beside_documents(requests: int) -> Trace:
    """A mixed load, with short answers."""
    trace = mixed(MANY, POOLS_RATE, requests)
    kept = [
        msgspec.structs.replace(each, answer_tokens=min(each.answer_tokens, POOLS_ANSWER_TOKENS))
        for each in trace.requests
    ]
    return Trace(kept, block_tokens=trace.block_tokens, name=trace.name)


async def over_http(trace: Trace, policy: str, speed: float, prefill: int = 0) -> list[Answered]:
    """Send the requests to real processes."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="replay-real-")))
        processes = Processes(stack, folder)
        place = folder / "trd"
        place.mkdir(mode=0o700)
        environ = {"TRD_DIR": str(place)}
        trd, port = str(Path(sys.executable).with_name("trd")), free_port()
        await processes.start(trd, "http", "--port", str(port), "--no-access-log", "--routing", policy, environ=environ)
        options = {
            "context_tokens": 1_000_000,
            "ttft_ms": TTFT_MS,
            "prefill_token_ms": PREFILL_TOKEN_MS,
            "itl_ms": ITL_MS,
            "answer_tokens": 0,
            "transfer_token_ms": TRANSFER_TOKEN_MS,
        }
        told = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
        serve = (trd, "model", "serve", MODEL, "--engine", "mock", *told)
        pools = {"prefill": prefill, "decode": WORKERS - prefill} if prefill else {"both": WORKERS}
        for role, count in pools.items():
            await processes.start(*serve, "--role", role, "--replicas", str(count), environ=environ)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
            await until_ready(client, WORKERS - prefill)
            began = time.monotonic() + 1
            async with asyncio.TaskGroup() as tasks:
                sent = [
                    tasks.create_task(
                        answered(client, trace.prompt(each), each.answer_tokens, began + each.at_s / speed)
                    )
                    for each in trace.requests
                ]
            return [each.result() for each in sent]


async def until_ready(client: httpx.AsyncClient, workers: int) -> None:
    """Wait until the front end hears the caches of all workers that answer, and knows the others."""
    end = time.monotonic() + START_S
    said = ""
    while time.monotonic() < end:
        try:
            said = (await client.get("/health")).text
            if said.count('"exact"') >= workers:
                found = json.loads(said)["routing"][MODEL].get("prefill_workers", [])
                if len(found) >= WORKERS - workers:
                    return
        except httpx.HTTPError as error:
            said = repr(error)
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the workers are not ready after {START_S:g} s: {said[:1000]}")


async def answered(client: httpx.AsyncClient, prompt: bytes, tokens: int, due: float) -> Answered:
    """Send one request when it is due, and read its answer."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": unpacked(prompt).tolist(),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    await asyncio.sleep(due - time.monotonic())
    began = time.monotonic()
    first, last, usage = 0.0, 0.0, None
    gaps: list[float] = []
    headers = {"content-type": "application/json"}
    async with client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(line[:300])
            if chunk["choices"] and chunk["choices"][0]["text"]:
                now = time.monotonic()
                if first:
                    gaps.append(now - last)
                last, first = now, first or now
            usage = chunk.get("usage") or usage
    if not first or usage is None:
        raise RuntimeError("an answer had no text or no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answered(first - began, time.monotonic() - began, cached, began - due, gaps)


def figures(report: Report) -> dict[str, float]:
    """The figures of virtual time."""
    first = report.ttft_s
    return {
        "mean_s": first.mean,
        "p50_s": first.p50,
        "p99_s": first.p99,
        "e2e_s": report.e2e_s.mean,
        "hit_rate": report.hit_rate,
        "itl_s": report.itl_s.mean,
        "itl_p99_s": report.itl_s.p99,
    }


def measured(found: list[Answered], trace: Trace) -> dict[str, float]:
    """The figures of the processes."""
    times = sorted(each.ttft_s for each in found)
    gaps = sorted(gap for each in found for gap in each.gaps_s)
    return {
        "mean_s": sum(times) / len(times),
        "p50_s": times[len(times) // 2],
        "p99_s": times[int(len(times) * 0.99)],
        "e2e_s": sum(each.e2e_s for each in found) / len(found),
        "hit_rate": sum(each.cached_tokens for each in found) / sum(each.prompt_tokens for each in trace.requests),
        "itl_s": sum(gaps) / len(gaps),
        "itl_p99_s": gaps[int(len(gaps) * 0.99)],
        "late_s": max(each.late_s for each in found),
    }


def main() -> None:
    """Run both and write the result."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the trace is")
    parser.add_argument("--requests", metavar="N", type=int, default=250, help="how many (default: 250)")
    parser.add_argument("--speed", metavar="X", type=float, default=1.0, help="times faster (default: 1)")
    parser.add_argument("--policies", metavar="NAMES", default="kv,least_loaded", help="(default: kv,least_loaded)")
    parser.add_argument("--pools", action="store_true", help="chats beside documents, with and without pools")
    arguments = parser.parse_args()
    timing = msgspec.structs.replace(linear(TTFT_MS, PREFILL_TOKEN_MS, ITL_MS), transfer=(TRANSFER_TOKEN_MS, 0.0))
    result: dict[str, Any] = {"machine": describe(), "requests": arguments.requests, "speed": arguments.speed}
    if arguments.pools:
        trace = chats_beside_documents(arguments.requests)
        cells = {"both": ("kv", 0), "pools": ("kv", PREFILL)}
    else:
        trace = part(read_trace(arguments.directory / "synthetic_trace.jsonl"), arguments.requests)
        cells = {each: (each, 0) for each in arguments.policies.split(",")}
    for name, (policy, prefill) in cells.items():
        virtual = figures(
            simulate(trace, policy, workers=WORKERS, prefill=prefill, speed=arguments.speed, timing=timing)
        )
        real = measured(asyncio.run(over_http(trace, policy, arguments.speed, prefill)), trace)
        apart = real["mean_s"] / virtual["mean_s"] - 1
        result[name] = {"virtual": virtual, "processes": real, "mean_apart": apart}
        print(f"{name}: mean {virtual['mean_s']:.3f} s virtual, {real['mean_s']:.3f} s real, {apart:+.1%}")
        print(f"  virtual: {virtual}\n  real: {real}", flush=True)
    file = "pools-real.json" if arguments.pools else "replay-real.json"
    (RESULTS / file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
