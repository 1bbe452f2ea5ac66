"""grpc.aio: one server-streaming method for each handler, with generic handlers, msgpack bodies and default options.

Only the options of limits are set: by default a server refuses messages above 4 MiB, and, at random, requests beyond
1,000 that it has not begun.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from benchmarks.handlers import Call, Handler
from benchmarks.peers.codec import decode, encode

NO_LIMIT = (1 << 31) - 1
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.server.max_pending_requests", NO_LIMIT),
    ("grpc.server.max_pending_requests_hard_limit", NO_LIMIT),
]


def _method(handler: Handler) -> grpc.RpcMethodHandler:
    # grpc.aio requires two parameters. The extra generator costs about 0.1 µs of about 50 µs for an item.
    async def behaviour(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for item in handler(request):
            yield item

    return grpc.unary_stream_rpc_method_handler(behaviour, request_deserializer=decode, response_serializer=encode)


class GrpcAio:
    """A server, or one channel for each service that is called."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory, self.tcp = directory, tcp
        self.channels: dict[str, grpc.aio.Channel] = {}
        self.servers: list[grpc.aio.Server] = []

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        server = grpc.aio.server(options=OPTIONS)
        methods = {name: _method(handler) for name, handler in handlers.items()}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
        if self.tcp:
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        else:
            address = f"unix:{self.directory / service}.grpc"
            server.add_insecure_port(address)
        await server.start()
        self.servers.append(server)
        (self.directory / f"{service}.address").write_text(address)

    async def connect(self, service: str, handler: str) -> Call:
        if service not in self.channels:
            address = (self.directory / f"{service}.address").read_text()
            self.channels[service] = grpc.aio.insecure_channel(address, options=OPTIONS)
            await self.channels[service].channel_ready()
        call: Call = self.channels[service].unary_stream(
            f"/{service}/{handler}", request_serializer=encode, response_deserializer=decode
        )
        return call


make = GrpcAio
