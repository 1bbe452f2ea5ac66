"""Hello world with grpc.aio: `python -m benchmarks.hello_grpc server|client ADDRESS`. The rest is as in hello.py."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator

import grpc
import uvloop

SERVICE, METHOD = "hello", "generate"


async def generate(request: str, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    for character in request:
        yield character.encode()  # A `str` reaches the serializer of the asyncio server as bytes.


async def server(address: str) -> None:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(generate, request_deserializer=bytes.decode, response_serializer=None)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})])
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def client(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(
            f"/{SERVICE}/{METHOD}", request_serializer=str.encode, response_deserializer=bytes.decode
        )
        async for _ in call("hello world", wait_for_ready=True):
            print(time.perf_counter(), flush=True)
            break
        sys.stdin.read()


if __name__ == "__main__":
    uvloop.run({"server": server, "client": client}[sys.argv[1]](sys.argv[2]))
