"""A real Prometheus scrapes three replicas, and has the figures that the load generator counted."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

import triton_distributed as trd
from tests.supervisor.supervised import supervised, written
from tests.timing import MS, PATIENCE_S
from triton_distributed.observe import BOUNDS_S
from triton_distributed.testing.servers import free_port

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

PROGRAM = """
import asyncio
import triton_distributed as trd

@trd.serve("a.b.work", metrics_labels={"model": "small"})
async def work(seconds: float) -> None:
    if seconds < 0:
        raise ValueError("as the request says")
    await asyncio.sleep(seconds)

if __name__ == "__main__":
    trd.run(processes=3)
"""

SHORT_S, LONG_S, FAILURES = 30 * MS, 150 * MS, 6
SHORT, LONG = 57, 3


class Prometheus:
    """A running Prometheus.

    Args:
        url: where its API is.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> dict[str, float]:
        """The values of an expression by their one label; of a sum, by the empty text."""
        try:
            with urlopen(f"{self._url}/api/v1/query?query={quote(expression)}", timeout=PATIENCE_S) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError:  # It starts.
            return {}
        return {next(iter(each["metric"].values()), ""): float(each["value"][1]) for each in found}

    async def until(self, expression: str, expected: dict[str, float]) -> None:
        """Wait until an expression has these values."""
        end, found = time.monotonic() + PATIENCE_S, {}
        while (found := await asyncio.to_thread(self.query, expression)) != expected:
            assert time.monotonic() < end, f"{expression}: {found}, expected {expected}"
            await asyncio.sleep(50 * MS)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    port = free_port()
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [{"job_name": "triton", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML.
    assert PROMETHEUS
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    address = f"--web.listen-address=127.0.0.1:{port}"
    process = subprocess.Popen([PROMETHEUS, *options, address, "--log.level=error"])
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def bucket(seconds: float) -> tuple[float, float]:
    """The bounds of the bucket of a duration."""
    above = next(bound for bound in (*BOUNDS_S, float("inf")) if seconds <= bound)
    return max(bound for bound in (0.0, *BOUNDS_S) if bound < above), above


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus here (Debian: apt-get install prometheus)")
async def test_it_has_the_figures_of_the_load_generator(tmp_path: Path, trd_dir: Path) -> None:
    measured: list[float] = []

    async def call(here: trd.Connection, seconds: float) -> None:
        began = time.monotonic()
        try:
            await here.call("a.b.work", seconds)
            measured.append(time.monotonic() - began)
        except ValueError:
            pass

    with supervised(tmp_path, written(tmp_path, PROGRAM), environ={"TRD_STATUS_PORT": "0"}) as running:
        url = (await asyncio.to_thread(running.line, r"ready: 3 replica\(s\); status at http://(\S+)"))[1]
        with prometheus(tmp_path, url) as scraping:
            async with trd.connect() as here:
                loads = [SHORT_S] * SHORT + [LONG_S] * LONG + [-1.0] * FAILURES
                await asyncio.gather(*[call(here, seconds) for seconds in loads])
            counted = 'sum by (outcome) (triton_requests_total{endpoint="a.b.work",model="small"}) > 0'
            await scraping.until(counted, {"ok": SHORT + LONG, "error": FAILURES})
            await scraping.until("sum by (replica) (triton_replica_up)", {"0": 1, "1": 1, "2": 1})
            handled = SHORT + LONG + FAILURES
            share = {str(number): handled / 3 for number in range(3)}  # It is called in turn.
            await scraping.until('sum by (replica) (triton_requests_total{endpoint="a.b.work"})', share)
            await scraping.until('sum(up{job="triton"})', {"": 1})
            measured += [0.0] * FAILURES  # An error takes no time.
            for q, slept_s in ((0.5, SHORT_S), (0.99, LONG_S)):
                buckets = "sum by (le) (triton_request_duration_seconds_bucket)"
                found = (await asyncio.to_thread(scraping.query, f"histogram_quantile({q}, {buckets})"))[""]
                called_s = sorted(measured)[round(q * len(measured)) - 1]
                assert bucket(slept_s)[0] <= found <= bucket(called_s)[1]
            if PROMTOOL:
                page = (await asyncio.to_thread(urlopen, f"http://{url}/metrics")).read()
                checked = subprocess.run([PROMTOOL, "check", "metrics"], input=page, capture_output=True)
                assert (checked.returncode, checked.stderr) == (0, b"")
        await asyncio.to_thread(running.stop)
