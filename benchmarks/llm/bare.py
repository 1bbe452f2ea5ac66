"""The yardstick: uvicorn with an app that reads the body and answers bytes that the front end once answered.

`python -m benchmarks.llm.bare PORT FOLDER`: FOLDER has the body of an answer for each workload. The path of a request
begins with the workload. `whole` and `single` are answered with one message of ASGI, which is the least that an app can
do. The others go through Starlette's StreamingResponse, one event at a time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
import uvloop
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from benchmarks.llm.steps import Gaps, Steps
from benchmarks.llm.work import EVERY

EVENTS = "text/event-stream; charset=utf-8"


class App:
    """Answers with the files of a folder."""

    def __init__(self, folder: Path, gaps: Gaps) -> None:
        self._bodies = {each.name: each.read_bytes() for each in folder.iterdir()}
        self._events = {name: split(body) for name, body in self._bodies.items()}
        self._steps = {name: Steps(work.step_s, gaps) for name, work in EVERY.items() if work.step_s}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        more = True
        while more:
            more = (await receive()).get("more_body", False)
        name = scope["path"].split("/", 2)[1]
        if EVERY[name].each:
            await StreamingResponse(self._stream(name), media_type=EVENTS)(scope, receive, send)
            return
        body = self._bodies[name]
        if EVERY[name].stream:
            headers = [(b"content-type", EVENTS.encode())]
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, name: str) -> AsyncIterator[bytes]:
        steps = self._steps.get(name)
        for event in self._events[name]:
            if steps is not None:
                await steps.wait()
            yield event


def split(body: bytes) -> list[bytes]:
    """Return the events of a stream."""
    return [each + b"\n\n" for each in body.split(b"\n\n")[:-1]]


async def main(port: int, folder: Path) -> None:
    gaps = Gaps()
    config = uvicorn.Config(
        App(folder, gaps), port=port, http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    gaps.write_at_signal()
    await serving


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), Path(sys.argv[2])))
