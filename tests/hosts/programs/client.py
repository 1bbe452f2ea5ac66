"""A client on one host: each line on standard input is a command, each line on standard output its answer as JSON.

wait COUNT              until so many instances of `echo` are known: their ids
call [TIMEOUT]          one call: what answered, or the error
load / loaded           begin a steady load; end it: calls, errors, the longest call
stream COUNT PAUSE / streamed    begin one long stream; wait for its end: items, error
items                   how many items that stream has brought so far
push COUNT / pushed     begin calls with 1 MB each; wait for their ends: how many were answered
quiet COUNT             until the first session has been looked at so often while it said nothing
"""

import asyncio
import json
import os
import sys
import time

from triton_distributed.runtime import DistributedRuntime, triton_worker

PERIOD_S = 0.01  # of the load: calls begin so often, whether or not those before have ended
COMPONENT = sys.argv[1] if len(sys.argv) > 1 else "all"


def said(error):
    return {"error": type(error).__name__, "text": str(error)}


class Commands:
    def __init__(self, echo, count):
        self.echo, self.count = echo, count
        self.calls, self.errors, self.longest_s = 0, [], 0.0
        self.loading: asyncio.Task[None]
        self.streaming: asyncio.Task[dict[str, str]]
        self.pushing: list[asyncio.Task[str]] = []
        self.received: list[int] = []
        self.ticked = 0
        self.changed = asyncio.Condition()

    async def _until(self, true):
        async with self.changed:
            await self.changed.wait_for(true)

    async def _change(self):
        async with self.changed:
            self.changed.notify_all()

    async def wait(self, count):
        while len(self.echo.instance_ids()) != int(count):
            await asyncio.sleep(0.01)
        return self.echo.instance_ids()

    async def call(self, timeout=None):
        begin = time.monotonic()
        try:
            answer = await self.echo.call("hello", timeout=float(timeout) if timeout else None)
            return {"answer": answer, "s": time.monotonic() - begin}
        except Exception as error:
            return {**said(error), "s": time.monotonic() - begin}

    async def more(self, count):
        enough = self.calls + int(count)
        await self._until(lambda: self.calls >= enough)

    async def load(self):
        self.loading = asyncio.create_task(self._load())

    async def _load(self):
        running = set()
        try:
            while True:
                task = asyncio.create_task(self._loading_call())
                running.add(task)
                task.add_done_callback(running.discard)
                await asyncio.sleep(PERIOD_S)
        finally:
            if running:
                await asyncio.wait(running)

    async def _loading_call(self):
        result = await self.call()
        self.calls += 1
        self.longest_s = max(self.longest_s, result["s"])
        if "error" in result:
            self.errors.append(result)
        await self._change()

    async def loaded(self):
        self.loading.cancel()
        await asyncio.wait([self.loading])
        return {"calls": self.calls, "failed": len(self.errors), "errors": self.errors[:5], "longest_s": self.longest_s}

    async def stream(self, count, pause):
        self.received = []
        self.streaming = asyncio.create_task(self._stream(int(count), float(pause)))

    async def _stream(self, count, pause):
        try:
            async for number in self.count.generate([count, pause], annotated=False):
                self.received.append(number)
                await self._change()
        except Exception as error:
            return said(error)
        return {}

    async def items(self, count):
        await self._until(lambda: len(self.received) >= int(count))

    async def streamed(self):
        return {"items": self.received, **await self.streaming}

    async def push(self, count):
        self.pushing = [asyncio.create_task(self.echo.call("x" * 1_000_000)) for _ in range(int(count))]

    async def pushed(self):
        return sum(each.endswith("x") for each in await asyncio.gather(*self.pushing))

    async def quiet(self, count):
        session = self.echo.pool.get(self.echo.candidates.table.instances[0].addresses)
        while session.missed_checks < int(count):
            await asyncio.sleep(0.01)

    async def ticks(self, count):
        enough = self.ticked + int(count)
        await self._until(lambda: self.ticked >= enough)

    async def listen(self, component):
        async for _ in component.subscribe("ticks"):
            self.ticked += 1
            await self._change()


@triton_worker()
async def main(runtime: DistributedRuntime):
    component = runtime.namespace("hosts").component(COMPONENT)
    commands = Commands(await component.endpoint("echo").client(), await component.endpoint("count").client())
    listening = asyncio.create_task(commands.listen(component)) if "NATS_SERVER" in os.environ else None
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("null", flush=True)
    while line := (await lines.readline()).split():
        answer = await getattr(commands, line[0].decode())(*map(bytes.decode, line[1:]))
        print(json.dumps(answer), flush=True)
    if listening is not None:
        listening.cancel()


if __name__ == "__main__":
    asyncio.run(main())
