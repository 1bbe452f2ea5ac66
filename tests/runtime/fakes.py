"""Workers that do with sessions and requests what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.names import EndpointName, Instance
from triton_distributed.transport.address import Address
from triton_distributed.transport.listener import Listener
from triton_distributed.transport.session import Session
from triton_distributed.wire.hello import Hello

NAME = EndpointName("t", "c", "e")


class FakeWorker:
    """Takes sessions and requests, and does with them what a test says; found as an instance of `t.c.e`."""

    def __init__(self, on_request: Callable[[Any], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.requests = 0
        self._on_request = on_request
        self._discovery = MemoryDiscovery()
        self._listener = Listener(self.loop, self._session, 100, health_timeout_s=10, host_timeout_s=30)

    def _session(self, on_lost: Any) -> Session:
        return Session(
            self.loop,
            Hello(agent="fake", max_message=2**30, max_streams=1000, window=2**18, nonce=1),
            window=2**18,
            session_window=2**26,
            hello_timeout_s=5,
            host_timeout_s=30,
            on_request=self._request,
            on_lost=on_lost,
        )

    def _request(self, stream: Any, *request: Any) -> None:
        self.requests += 1
        self._on_request(stream)

    async def start(self, instance_id: int) -> FakeWorker:
        address = await self._listener.listen(Address("memory", f"fake-{instance_id}"))
        await self._discovery.register(Instance(NAME, instance_id, (str(address),)))
        return self

    async def close(self) -> None:
        self._listener.close()
        await self._discovery.close()


def drops_the_connection(stream: Any) -> None:
    stream.session._transport.abort()


def accepts_then_drops(stream: Any) -> None:
    stream.session.accept(stream, lambda: None)
    stream.session.loop.call_later(0.01, stream.session._transport.abort)


def answers_then_drops(stream: Any) -> None:
    stream.session.accept(stream, lambda: None)
    stream.push(b"\x01")
    stream.session.loop.call_later(0.01, stream.session._transport.abort)


class DropsTheFirst:
    """Loses the connections of so many requests before it accepts them, and answers the others with 1."""

    def __init__(self, count: int = 1) -> None:
        self._left = count

    def __call__(self, stream: Any) -> None:
        if self._left:
            self._left -= 1
            drops_the_connection(stream)
            return

        def answer() -> None:
            stream.push(b"\x01")
            stream.end()

        stream.session.accept(stream, answer)
