"""Makes the pictures in docs/assets of `trd top` and of the dashboard, with three workers under a load.

The workers are at capacity for a while, one is stuck, and one is killed. `.venv/bin/python tools/pictures.py` takes
three minutes, and half a minute without Chromium, which makes the pictures of the dashboard. The figures differ from
run to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.top import picture
from triton_distributed.cli.top_table import View, summary
from triton_distributed.cli.top_terminal import styled
from triton_distributed.cli.top_workers import Row, Workers, workers
from triton_distributed.config import Config
from triton_distributed.errors import TritonError
from triton_distributed.runtime import DistributedRuntime

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
PROGRAM = """
import asyncio
import contextlib
import random
import time

import triton_distributed as trd


@trd.serve("demo.chat.generate", max_inflight=8, max_queue=16)
async def generate(prompt: str) -> str:
    with contextlib.suppress(trd.RemoteError):
        await trd.call("demo.chat.embed", prompt, timeout=5)
    await asyncio.sleep(random.expovariate(45))
    return prompt


@trd.serve("demo.chat.embed")
async def embed(text: str) -> list[float]:
    if random.random() < 0.02:
        raise ValueError("the text is empty")
    await asyncio.sleep(0.002)
    return [0.0] * 64


@trd.serve("demo.chat.tokenize")
async def tokenize(seconds: float) -> int:
    time.sleep(seconds)  # a handler that blocks the event loop
    return 0
"""
WORKERS, WIDTH, HEIGHT = 3, 112, 19


@contextlib.contextmanager
def served(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers that serve the program."""
    (folder / "chat.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "triton_distributed.cli.main", "serve", "chat"]
    environment = {**os.environ, "TRD_STATUS_PORT": "0"}
    processes = [
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(WORKERS)
    ]
    try:
        yield processes
    finally:
        for each in processes:
            each.kill()
            each.wait()


async def load(runtime: DistributedRuntime, rates: dict[str, float]) -> None:
    """Call endpoints at rates, in calls per second, which may change meanwhile."""
    clients = {name: await runtime.endpoint(f"demo.chat.{name}").client() for name in rates}
    calls: set[asyncio.Task[None]] = set()

    async def one(name: str) -> None:
        with contextlib.suppress(TritonError):
            await clients[name].call("hello", timeout=5)

    due = dict.fromkeys(rates, 0.0)
    while True:
        await asyncio.sleep(0.01)
        for name, rate in rates.items():
            due[name] += 0.01 * rate
            while due[name] >= 1:
                due[name] -= 1
                calls.add(task := asyncio.create_task(one(name)))
                task.add_done_callback(calls.discard)


def draw(name: str, rows: list[Row], where: str) -> None:
    """Write the picture of a terminal."""
    shown, _ = picture(rows, View(), summary(rows, where, 1.0), WIDTH, HEIGHT)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(styled(shown))
    picture_of = console.export_svg(title="trd top", unique_id=name)
    picture_of = re.sub(r"@font-face \{.*?\}\s*", "", picture_of, flags=re.DOTALL)  # No font from elsewhere.
    (ASSETS / f"{name}.svg").write_text(picture_of.replace("Fira Code", "Menlo, Consolas, DejaVu Sans Mono"))


async def until(found: Workers, true: Callable[[list[Row]], object], looks: int = 1) -> list[Row]:
    """Look once a second until something is to be seen, and some seconds longer."""
    while True:
        await asyncio.sleep(1)
        await found.look()
        if true(found.rows()):
            looks -= 1
        if not looks:
            return found.rows()


async def dashboards(runtime: DistributedRuntime, rates: dict[str, float], folder: Path) -> None:
    """Make the pictures of the dashboard of one worker: at capacity in light mode, and stuck in dark mode."""
    tokenize = await runtime.endpoint("demo.chat.tokenize").client()
    instance = tokenize.candidates.instances[0]
    for _ in range(25):
        rates.update(generate=random.uniform(350, 450), embed=random.uniform(200, 400))
        await asyncio.sleep(5)
    rates["generate"] = 1500.0
    await asyncio.sleep(20)
    await shot("dashboard-light", instance.status_url, 1, folder)
    rates["generate"] = 400.0
    await asyncio.sleep(10)
    blocking = tokenize.direct(12.0, instance.id)
    await asyncio.sleep(6)
    await shot("dashboard-dark", instance.status_url, 0, folder)
    await blocking


async def shot(name: str, url: str, scheme: int, folder: Path) -> None:
    """Write what Chromium shows of a page; the scheme is 0 for dark and 1 for light."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={folder}/profile"]
    options += ["--window-size=1200,720", f"--screenshot={ASSETS / name}.png"]
    process = await asyncio.create_subprocess_exec(CHROMIUM, *options, url, stderr=subprocess.DEVNULL)
    await process.wait()


async def main(folder: Path) -> None:
    config, where = Config.from_env(), "file:///run/demo"
    with served(folder) as processes:
        async with (
            DistributedRuntime(config=config) as runtime,
            cluster(config, 2.0) as asked,
            workers(asked, 0.5, lambda: None) as found,
        ):
            rates = {"generate": 400.0, "embed": 300.0}
            await until(found, lambda rows: len(rows) == 3 * WORKERS)
            loading = asyncio.create_task(load(runtime, rates))
            draw("top-load", await until(found, lambda rows: True, 4), where)
            rates["generate"] = 1500.0
            draw("top-overload", await until(found, lambda rows: any(each.state == "full" for each in rows), 3), where)
            rates["generate"] = 400.0
            await until(found, lambda rows: all(each.state == "serving" for each in rows), 2)
            blocking = (await runtime.endpoint("demo.chat.tokenize").client()).generate(4.0)
            draw("top-stall", await until(found, lambda rows: any(each.state == "stuck" for each in rows), 2), where)
            await blocking
            await until(found, lambda rows: all(each.state == "serving" for each in rows), 3)
            processes[0].kill()
            draw("top-kill", await until(found, lambda rows: any(each.state == "gone" for each in rows), 2), where)
            if CHROMIUM is not None:
                await dashboards(runtime, rates, folder)
            loading.cancel()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="trd-") as made:
        os.environ["TRD_DIR"] = made + "/demo"
        Path(made, "demo").mkdir(mode=0o700)
        asyncio.run(main(Path(made)))
