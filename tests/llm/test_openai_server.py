"""The OpenAI API over real sockets: uvicorn, and an app of Starlette that has it mounted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

import triton_distributed as trd
from tests.llm.standin import StandIn, StandInModels, echo
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.models.delta import Delta

HELLO = [{"role": "user", "content": "hello"}]


@contextlib.asynccontextmanager
async def serving(app, send_buffer: int | None = None) -> AsyncIterator[str]:
    """Run an app under uvicorn, in this loop; gives its address. The kernel's buffer for sending may be a small one."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", http="httptools"))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await server.startup(sockets=[listener])
        beat = asyncio.create_task(server.main_loop())
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await beat
            await server.shutdown(sockets=[listener])


@pytest.mark.any_loop
async def test_a_mounted_app_over_sockets():
    import openai  # as in tests/llm/test_openai_api.py

    waiting, left = asyncio.Event(), asyncio.Event()

    async def endless(prompt, request):
        try:
            for _ in range(3):
                yield Delta(text="a", token_ids=[97])
            waiting.set()
            await asyncio.Event().wait()
        finally:
            left.set()

    app = Starlette(routes=[Mount("/llm", openai_app(StandInModels(StandIn(echo), StandIn(endless, name="endless"))))])
    async with (
        serving(app) as url,
        openai.AsyncOpenAI(api_key="none", base_url=f"{url}/llm/v1", max_retries=0, timeout=60) as client,
    ):
        assert [each.id async for each in client.models.list()] == ["org/tiny", "endless"]
        assert (await client.models.retrieve("org/tiny")).id == "org/tiny"
        for _ in range(2):  # The second time on the same connection.
            stream = await client.completions.create(model="org/tiny", prompt="abcd", stream=True)
            assert len([each async for each in stream]) == 5
        stream = await client.completions.create(model="endless", prompt="abcd", stream=True)
        async with stream:
            async for _ in stream:
                break
        await left.wait()
        waiting.clear()
        left.clear()
        call = asyncio.create_task(client.completions.create(model="endless", prompt="abcd"))
        await waiting.wait()
        call.cancel()
        await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_client_whose_body_is_too_large_reads_why():
    import openai  # as in tests/llm/test_openai_api.py

    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        app = await front_end(here, openai=openai_app(StandInModels(StandIn(echo))), max_body_bytes=1000)
        async with (
            serving(app) as url,
            openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client,
        ):
            for _ in range(3):
                with pytest.raises(openai.APIStatusError) as refused:
                    await client.completions.create(model="org/tiny", prompt="x" * 8_000_000)
                assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
            assert (await client.completions.create(model="org/tiny", prompt="abcd")).choices[0].text
