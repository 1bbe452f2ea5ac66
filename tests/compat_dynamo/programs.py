"""Programs as Dynamo's public documentation describes them, written for these tests. Only their import lines are ours."""

from __future__ import annotations

HELLO_SERVER = """
import asyncio
import logging

import uvloop
from triton_distributed.compat.dynamo.runtime import DistributedRuntime, dynamo_endpoint, dynamo_worker
from triton_distributed.compat.dynamo.runtime.logging import configure_dynamo_logging

logger = logging.getLogger(__name__)
configure_dynamo_logging(service_name="backend")


@dynamo_endpoint(str, str)
async def words(request: str):
    logger.info("received %s", request)
    for word in request.split(","):
        await asyncio.sleep(0)
        yield f"Hello {word}!"


@dynamo_worker()
async def worker(runtime: DistributedRuntime):
    endpoint = runtime.endpoint("hello_world.backend.generate")
    await endpoint.serve_endpoint(words)


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

HELLO_CLIENT = """
import asyncio

from triton_distributed.compat.dynamo import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime):
    client = await runtime.endpoint("dyn://hello_world.backend.generate").client()
    await client.wait_for_instances()
    stream = await client.generate("world,sun,moon")
    async for response in stream:
        print(response.data())


asyncio.run(main())
"""

CANCEL_SERVER = """
import asyncio

from triton_distributed.compat.dynamo import DistributedRuntime


class Server:
    async def generate(self, request, context):
        for i in range(100_000):
            if context.is_stopped():
                print("server: stopped", context.is_killed(), flush=True)
                raise asyncio.CancelledError
            await asyncio.sleep(0.01)
            yield i


async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    await runtime.endpoint("demo.server.generate").serve_endpoint(Server().generate)
    print("server: ended", flush=True)


asyncio.run(main())
"""

CANCEL_MIDDLE = """
import asyncio

from triton_distributed.compat.dynamo._core import DistributedRuntime


class Middle:
    def __init__(self, client):
        self.client = client

    async def generate(self, request, context):
        stream = await self.client.generate(request, context=context)
        async for response in stream:
            yield response.data()
        print("middle: backend stream ended", context.is_stopped(), flush=True)


async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint("demo.server.generate").client()
    await client.wait_for_instances()
    await runtime.endpoint("demo.middle.generate").serve_endpoint(Middle(client).generate)
    runtime.shutdown()


asyncio.run(main())
"""

CANCEL_CLIENT = """
import asyncio
import sys

from triton_distributed.compat.dynamo import Context, DistributedRuntime


async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint(sys.argv[1]).client()
    await client.wait_for_instances()
    context = Context()
    stream = await client.generate("request", context=context)
    numbers = []
    async for response in stream:
        numbers.append(response.data())
        if len(numbers) == 3:
            context.stop_generating()
            if sys.argv[2] == "break":
                break
    print("client:", numbers, context.is_stopped(), flush=True)
    await asyncio.sleep(3600)  # The handlers hear of the stop while this process lives.


asyncio.run(main())
"""

UNARY = """
import asyncio
import sys

from triton_distributed.compat.dynamo import Context, UnaryClient, dynamo_worker, serve_unary_endpoint


async def add(request, *, context: Context):
    if request["b"] is None:
        raise ValueError("b is missing")
    return {"sum": request["a"] + request["b"], "tenant": context.metadata.get("tenant")}


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("math.backend.add")
    if sys.argv[1] == "serve":
        await serve_unary_endpoint(endpoint, add)
        return
    client = await endpoint.client()
    await client.wait_for_instances()
    unary = UnaryClient(client)
    print(await unary.complete({"a": 1, "b": 2}, context=Context("c", {"tenant": "alpha"})))
    try:
        await unary.complete({"a": 1, "b": None})
    except ValueError as error:
        print(error)


asyncio.run(main())
"""

BIDIRECTIONAL = """
import asyncio
import sys

from triton_distributed.compat.dynamo import DistributedRuntime, dynamo_worker


async def upper(request_stream, context):
    async for frame in request_stream:
        yield {"echo": frame["text"].upper()}
    yield {"echo": "bye"}


@dynamo_worker()
async def main(runtime: DistributedRuntime):
    endpoint = runtime.endpoint("chat.backend.generate")
    if sys.argv[1] == "serve":
        await endpoint.serve_bidirectional_endpoint(upper, graceful_shutdown=True, metrics_labels=[("model", "m")])
        return
    client = await endpoint.client()
    await client.wait_for_instances()
    turns = asyncio.Queue()

    async def frames():
        while (text := await turns.get()) is not None:
            yield {"text": text}

    turns.put_nowait("hi")
    stream = await client.generate(frames(), annotated=False)
    async for answer in stream:
        print(answer["echo"])
        if answer["echo"] == "HI":
            turns.put_nowait("there")
        elif answer["echo"] == "THERE":
            turns.put_nowait(None)


asyncio.run(main())
"""

PUSH = '''
import asyncio
import queue
import sys
import threading

from triton_distributed.compat.dynamo import dynamo_worker


class Engine:
    """An engine whose own thread hands out the tokens of all requests."""

    def __init__(self):
        self.work = queue.Queue()
        threading.Thread(target=self.dispatch, daemon=True).start()

    def dispatch(self):
        while True:
            request, push, ended = self.work.get()
            try:
                for number in range(request["tokens"]):
                    push({"token": number})
            except RuntimeError as error:
                print("engine:", "left" if "closed" in str(error) or "over" in str(error) else error, flush=True)
            ended()


class Handler:
    def __init__(self, engine):
        self.engine = engine

    async def generate(self, request, context, response_sender=None):
        assert response_sender is not None
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.engine.work.put((request, response_sender.send, lambda: loop.call_soon_threadsafe(ended.set)))
        await ended.wait()
        response_sender.close()
        return
        yield


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("push.backend.generate")
    if sys.argv[1] == "serve":
        await endpoint.serve_endpoint(Handler(Engine()).generate)
        return
    client = await endpoint.client()
    await client.wait_for_instances()
    stream = await client.generate({"tokens": 5000}, annotated=False)
    tokens = [each["token"] async for each in stream]
    print(tokens == list(range(5000)))
    stream = await client.generate({"tokens": 10_000_000}, annotated=False)
    async for each in stream:
        if each["token"] == 10:
            break
    del stream
    stream = await client.generate({"tokens": 3}, annotated=False)
    print([each["token"] async for each in stream])


asyncio.run(main())
'''

DRAIN = """
import asyncio
import signal
import sys

from triton_distributed.compat.dynamo import dynamo_worker


async def slow(request, context):
    yield "begun"
    await asyncio.sleep(request)
    yield "done"


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("drain.backend.generate")
    if sys.argv[1] == "signal":  # As workers of Dynamo do that take the signals themselves.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, runtime.shutdown)
    await endpoint.serve_endpoint(slow, graceful_shutdown=True)
    print("drained", flush=True)


asyncio.run(main())
"""

SLEEP_WAKE = """
import asyncio

from triton_distributed.compat.dynamo import DistributedRuntime


async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "mem", "tcp")
    endpoint = runtime.endpoint("sleep.backend.generate")

    async def generate(request):
        yield request

    await endpoint.unregister_endpoint_instance()
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate, health_check_payload={"prompt": "x"}))
    client = await endpoint.client()
    assert await client.wait_for_instances() == [endpoint.connection_id()]
    await endpoint.unregister_endpoint_instance()
    while client.instance_ids():
        await asyncio.sleep(0.01)
    try:
        async for _ in await client.generate(1):
            pass
    except ValueError as error:
        print(str(error)[:20])
    await endpoint.register_endpoint_instance()
    await client.wait_for_instances()
    print([each.data() async for each in await client.generate(1)])
    (instance,) = client.instances()
    print(str(instance) == f"sleep/backend/generate/{endpoint.connection_id()}", instance.transport.kind)
    runtime.shutdown()
    await serving


asyncio.run(main())
"""

PIPELINE = """
import asyncio
import sys

import uvloop
from pydantic import BaseModel
from triton_distributed.compat.dynamo import DistributedRuntime, dynamo_endpoint, dynamo_worker


class Request(BaseModel):
    text: str


class Response(BaseModel):
    text: str


class Stage:
    def __init__(self, mark, client):
        self.mark = mark
        self.client = client

    @dynamo_endpoint(Request, Response)
    async def generate(self, request):
        text = request.text + self.mark
        if self.client is None:
            for word in text.split():
                yield Response(text=word).model_dump()
            return
        stream = await self.client.round_robin(Request(text=text).model_dump_json())
        async for response in stream:
            yield {"text": response.data()["text"] + self.mark}


@dynamo_worker()
async def main(runtime: DistributedRuntime, role: str):
    following = {"frontend": "middle", "middle": "backend", "backend": None}[role]
    client = None
    if following:
        client = await runtime.endpoint(f"pipeline.{following}.generate").client()
        await client.wait_for_instances()
    await runtime.endpoint(f"pipeline.{role}.generate").serve_endpoint(Stage(f"-{role[0]}", client).generate)


uvloop.install()
asyncio.run(main(sys.argv[1]))
"""
