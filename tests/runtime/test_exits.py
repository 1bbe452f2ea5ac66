"""Handlers that end their process: `sys.exit` drains it, as SIGTERM does; KeyboardInterrupt ends it now."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, until
from tests.runtime.programs import program
from triton_distributed.errors import RemoteError

pytestmark = pytest.mark.any_loop

WORKER = """
import asyncio, sys
from triton_distributed.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop())
    exits = asyncio.Event()

    async def handler(request):
        yield 1
        if request == "wait":
            await exits.wait()
            yield 2
        else:
            exits.set()
            raise {error}

    def plain(request):
        sys.exit(request)

    try:
        await asyncio.gather(
            runtime.endpoint("t.c.e").serve_endpoint(handler), runtime.endpoint("t.c.plain").serve_endpoint(plain)
        )
    finally:
        print("cleaned up")

asyncio.run(main())
"""


async def test_an_exit_in_a_handler_drains_the_worker_and_is_its_status(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER.format(error="SystemExit(3)")) as worker:
        client = await unix.client()
        waiting = client.generate("wait", annotated=False)
        assert await patiently(anext(waiting)) == 1
        items: list[int] = []
        with pytest.raises(RemoteError, match="SystemExit: 3"):
            await into(items, client.generate("exit", annotated=False))
        assert items == [1]
        assert await patiently(drained(waiting)) == [2]  # what ran beside it
        out, errors = await worker.output()
        assert await worker.ended() == 3
        assert out == "cleaned up\n"
        first, *traceback, last = errors.splitlines()
        assert first.endswith(": the handler raised")
        assert traceback[0] == "Traceback (most recent call last):"
        assert traceback[-1] == "SystemExit: 3"
        assert last == "a handler raised SystemExit(3): this process drains for at most 30 s, then ends"


@pytest.mark.parametrize(("code", "status", "says"), [(0, 0, ""), ("out of memory", 1, "out of memory\n")])
async def test_an_exit_in_a_plain_function_is_the_same(
    code: object, status: int, says: str, unix: Cluster, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER.format(error="None")) as worker:
        client = await unix.client("t.c.plain")
        with pytest.raises(RemoteError, match=f"SystemExit: {code}"):
            await patiently(client.call(code))
        _, errors = await worker.output()
        assert await worker.ended() == status
        assert errors.endswith(f"then ends\n{says}")


@pytest.mark.leaves("socket files", reason="the worker ends without closing its runtime")
async def test_an_interruption_raised_in_a_handler_ends_the_worker_now(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER.format(error="KeyboardInterrupt")) as worker:
        client = await unix.client()
        items: list[int] = []
        with pytest.raises(RemoteError, match="KeyboardInterrupt"):
            await into(items, client.generate(1, annotated=False))
        assert items == [1]
        _, errors = await worker.output()
        assert await worker.ended() != 0
        assert "never retrieved" not in errors


async def test_who_asks_an_exiting_worker_goes_elsewhere(unix: Cluster, tmp_path: Path) -> None:
    code = WORKER.format(error="SystemExit(3)")
    async with program(tmp_path, code) as one, program(tmp_path, code) as other:
        client = await unix.client()
        await until(lambda: len(client.instance_ids()) == 2)
        id = client.instance_ids()[0]
        with pytest.raises(RemoteError, match="SystemExit"):
            await patiently(drained(client.direct("exit", id, annotated=False)))
        for _ in range(20):
            stream = client.generate("wait", annotated=False)
            assert await patiently(anext(stream)) == 1
            await stream.aclose()
        ended = await asyncio.wait(
            [asyncio.ensure_future(each.ended()) for each in (one, other)], return_when=asyncio.FIRST_COMPLETED
        )
        assert [each.result() for each in ended[0]] == [3]
        for each in ended[1]:
            each.cancel()
