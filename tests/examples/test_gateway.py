"""The gateway: a real uvicorn in front of real workers, under load, while a worker is killed."""

from __future__ import annotations

import asyncio
import re
import signal
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.examples.programs import Program, serving, wait_for_instances
from tests.timing import PATIENCE_S

APP, WORKER = "gateway/app.py", "gateway/worker.py"
LOGS = "import uvicorn.config as c; c.LOGGING_CONFIG['handlers']['default']['stream'] = 'ext://sys.stdout'"
READY = r"Uvicorn running on http://127.0.0.1:(\d+)"


class Gateway(Program):
    """app.py on a free port."""

    def url(self) -> str:
        found = re.search(READY, self.until(READY))
        assert found is not None
        return f"http://127.0.0.1:{found[1]}"

    def stop(self) -> str:
        """End it as a process manager does; uvicorn shuts down and then ends by the signal."""
        self._process.send_signal(signal.SIGTERM)
        output = self.end(-signal.SIGTERM)
        assert "Application shutdown complete" in output
        return output


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    program = Gateway(APP, "0", prelude=LOGS)
    try:
        yield program
        program.stop()
    finally:
        program.kill()


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False)


def events(text: str, words: int) -> str:
    return "".join(f'data: {{"text":"{text}-{number}"}}\n\n' for number in range(words)) + "data: [DONE]\n\n"


async def test_an_answer_a_stream_and_an_invalid_request(gateway: Gateway) -> None:
    with serving(WORKER):
        async with client(gateway.url()) as browser:
            assert (await browser.post("/count", json={"text": "to be or not"})).json() == {"words": 4}
            assert (await browser.post("/generate", json={"text": "hi", "words": 3})).text == events("hi", 3)
            assert (await browser.post("/count", json={"words": 3})).status_code == 422


@pytest.mark.leaves("socket files", reason="a killed worker cannot remove its own")
async def test_a_worker_is_killed_under_load(gateway: Gateway) -> None:
    begun = asyncio.Event()
    started = 0

    async def stream(browser: httpx.AsyncClient, text: str) -> tuple[int, str]:
        nonlocal started
        read = ""
        async with browser.stream("POST", "/generate", json={"text": text, "words": 50}) as answer:
            async for part in answer.aiter_text():
                started += not read
                read += part
                if started == 30:
                    begun.set()
        return answer.status_code, read

    with serving(WORKER), serving(WORKER):
        killed = Program(WORKER)
        try:
            await asyncio.to_thread(wait_for_instances, "examples", "gateway", "generate", 3)
            async with client(gateway.url()) as browser:
                streams = [asyncio.create_task(stream(browser, str(number))) for number in range(60)]
                await asyncio.wait_for(begun.wait(), PATIENCE_S)
                killed.kill()
                calls = []
                while not all(each.done() for each in streams):
                    calls += await asyncio.gather(*(browser.post("/count", json={"text": "a b"}) for _ in range(10)))
                answers = await asyncio.gather(*streams)
        finally:
            killed.kill()
    assert {(each.status_code, each.text) for each in calls} == {(200, '{"words":2}')}
    assert answers == [(200, events(str(number), 50)) for number in range(60)]


async def test_streams_above_the_places_of_the_workers_are_refused(gateway: Gateway) -> None:
    with serving(WORKER), serving(WORKER), serving(WORKER):
        await asyncio.to_thread(wait_for_instances, "examples", "gateway", "generate", 3)
        async with client(gateway.url()) as browser:

            async def ask(words: int) -> httpx.Response:
                request = browser.build_request("POST", "/generate", json={"text": "x", "words": words})
                return await browser.send(request, stream=True)

            answers = await asyncio.gather(*(ask(1_000_000) for _ in range(150)))  # None of them ends by itself.
            assert Counter(each.status_code for each in answers) == {200: 96, 503: 54}
            refused = [each for each in answers if each.status_code == 503]
            assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
            await asyncio.gather(*(each.aclose() for each in answers))
            async with asyncio.timeout(PATIENCE_S):  # Their clients have left, so the places are free again.
                while (answer := await ask(3)).status_code == 503:
                    await answer.aclose()
            assert (await answer.aread()).decode() == events("x", 3)
