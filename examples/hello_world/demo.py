"""Hello world at a glance: two servers, a client, and a table that shows which instance answered which request.

    make demo                                    (or: python examples/hello_world/demo.py)

The servers are two processes that run server.py unchanged; this process is the client. They use a temporary folder, so
that they neither find nor disturb other programs on this machine.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime

SERVER = Path(__file__).with_name("server.py")
REQUESTS = ("hello world", "bonjour", "grüezi", "hej", "ciao", "konnichiwa")
PATIENCE_S = 120.0  # a demo that takes longer has failed
ROW = "{:<13}  {:<11}  {:<24}  {:>10}  {:>8}"


class Server:
    """A process that runs server.py."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, instance_id: int) -> None:
        self.name, self.process, self.instance_id = name, process, instance_id

    async def stop(self) -> bool:
        """Send SIGTERM, wait for the end, and print the result."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = await self.process.communicate()
        received, status = output.count(b"Received request"), self.process.returncode
        print(f"{self.name}: received {received} requests; SIGTERM, then exit status {status}")
        return status == 0


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with these settings in place of its own."""
    ours = ("TRD_", "ETCD_", "NATS_")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(ours)}, **settings}


@asynccontextmanager
async def server(name: str, settings: Mapping[str, str]) -> AsyncIterator[Server]:
    """Run server.py with these settings until the block ends, even by an error."""
    process = await asyncio.create_subprocess_exec(sys.executable, SERVER, stdout=PIPE, env=environment(settings))
    assert process.stdout is not None
    try:
        words = (await process.stdout.readline()).split()
        if not words:
            raise SystemExit(f"{name} ended before it had begun to serve")
        print(f"{name}: process {process.pid}, instance {int(words[-1])}")
        yield Server(name, process, int(words[-1]))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def known(client: Client, count: int) -> None:
    """Wait until this many instances are known."""
    while len(client.instance_ids()) < count:
        await asyncio.sleep(0.01)


async def ask_all(client: Client, *servers: Server) -> None:
    """Make the calls, one after the other, and print a table of them."""
    print("\n" + ROW.format("request", "answered by", "answer", "first char", "all"))
    for request in REQUESTS:
        await ask(client, request, {each.instance_id: each.name for each in servers})
    print()


async def ask(client: Client, request: str, names: dict[int, str]) -> None:
    """Make one call and print its row."""
    start = time.perf_counter()
    stream, answer, first = client.generate(request, annotated=False), [], 0.0
    async for char in stream:
        first = first or time.perf_counter() - start
        answer.append(char)
    whole = time.perf_counter() - start
    assert stream.instance_id is not None  # an item came, so an instance answered
    row = request, names[stream.instance_id], "·".join(answer), f"{first * 1000:.1f} ms", f"{whole * 1000:.1f} ms"
    print(ROW.format(*row))


async def demo(folder: str) -> bool:
    settings = {"TRD_DIR": folder}
    async with asyncio.timeout(PATIENCE_S), server("server 1", settings) as one, server("server 2", settings) as two:
        async with DistributedRuntime(config=Config(directory=Path(folder))) as runtime:
            client = await runtime.endpoint("triton-init.backend.generate").client()
            await known(client, 2)
            await ask_all(client, one, two)
        return all([await one.stop(), await two.stop()])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="trd-demo-") as folder:
        sys.exit(0 if asyncio.run(demo(folder)) else 1)
