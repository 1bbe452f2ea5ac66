"""`trd record NS.COMP.EP --to FILE`: record the requests of a live endpoint and its answers into a file."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from triton_distributed.cli.arguments import at_least, endpoint, seconds
from triton_distributed.cli.cluster import Cluster, cluster
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.failure import Failure, one_line
from triton_distributed.cli.instances import close_to, listed
from triton_distributed.cli.recordings import Writer
from triton_distributed.cli.rendering import json_option, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.errors import RemoteError, TritonError
from triton_distributed.names import EndpointName
from triton_distributed.runtime.recording import Exchange

EPILOG = """\
The workers that serve the endpoint now send their requests and answers, over
the connections of calls; nothing has to be restarted. Requests that run already
are not recorded. A request is written with its answer when it ends, and
`trd replay` reads the file.

The file holds your users' data as it was sent. Only you can read it; metadata,
in which credentials may travel, is left out unless --metadata is given. Each
worker logs the start and the end of a recording.

A recording ends after N requests, after S seconds, at N bytes, or with Ctrl-C. A
worker holds at most 64 MiB for it, and leaves requests out rather than wait for
the file.
"""

ANSWER_S = 5.0
"""Seconds to wait until a worker records."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    name = parser.add_argument("endpoint", metavar="NS.COMP.EP", type=endpoint, help="the endpoint to record")
    completes(name, endpoint_names)
    parser.add_argument("--to", metavar="FILE", type=Path, required=True, help="a new file")
    parser.add_argument(
        "--requests", metavar="N", type=at_least(1), default=100, help="end after N requests (default: 100)"
    )
    parser.add_argument("--duration", metavar="S", type=seconds, default=60.0, help="end after S seconds (default: 60)")
    parser.add_argument(
        "--max-bytes",
        metavar="N",
        type=at_least(1),
        default=256 * 2**20,
        help="end when the file has N bytes (default: 268435456)",
    )
    parser.add_argument("--metadata", action="store_true", help="record metadata and travelling values too")
    json_option(parser, "one summary")


def run(arguments: argparse.Namespace) -> int:
    """Record until an end is reached."""
    config = settings()
    recorder = Recorder(arguments.endpoint, arguments.to, arguments.requests, arguments.max_bytes)
    asyncio.run(_run(recorder, arguments, config))
    if not recorder.count:
        raise Failure(f"no request of {arguments.endpoint} ended in that time{recorder.left_out()}")
    if arguments.json:
        left_out = sum(recorder.skipped.values())
        write_json({"requests": recorder.count, "left_out": left_out, "file": str(arguments.to)})
    else:
        print(f"{recorder.count} request(s) of {arguments.endpoint} in {arguments.to}{recorder.left_out()}")
    return 0


class Recorder:
    """Takes what the workers send, and writes it.

    Args:
        name: the endpoint.
        path: the file to make.
        most, most_bytes: when it is full.

    Attributes:
        count: requests in the file.
        skipped: by worker: requests that it left out, because they are too large.
        full: completes when the file is full or cannot be written.
    """

    def __init__(self, name: EndpointName, path: Path, most: int, most_bytes: int) -> None:
        self.name, self.path = name, path
        self.count = 0
        self.skipped: dict[int, int] = {}
        self._most, self._most_bytes = most, most_bytes

    async def record(self, found: Cluster, workers: Iterable[int], duration_s: float, metadata: bool) -> None:
        """Record until the file is full, the time is over, Ctrl-C is pressed, or no worker is left.

        Raises:
            Failure: no worker can be recorded, or the file cannot be written.
        """
        self._writer = Writer(self.path, self.name, time.time())
        self.full: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        begun: list[int] = []
        tasks = [asyncio.create_task(self._listen(found, each, metadata, begun)) for each in workers]
        ended: asyncio.Future[Any] = asyncio.ensure_future(asyncio.wait(tasks))
        try:
            await asyncio.wait([self.full, ended], timeout=duration_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # Ctrl-C is the usual end of a recording.
            pass
        finally:
            for each in tasks:
                each.cancel()
            ended.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.close()
            if not self.count:  # A second attempt must not find a file in its way.
                self.path.unlink(missing_ok=True)
        if self.full.done():
            self.full.result()
        reasons = [each for each in results if isinstance(each, str)]
        if not begun:
            why = "; ".join(dict.fromkeys(reasons)) or "none answered before the end of the recording"
            raise Failure(f"no worker of {self.name} can be recorded: {why}")

    async def _listen(self, found: Cluster, worker: int, metadata: bool, begun: list[int]) -> str:
        """Take the exchanges of one worker. Returns the reason why there are no more."""
        stream = found.follow(worker, "recording", endpoint=str(self.name), metadata=metadata)
        try:
            async with asyncio.timeout(ANSWER_S):
                await anext(stream)
            begun.append(worker)
            async for each in stream:
                self._take(worker, msgspec.convert(each, Exchange))
            reason = "it ended the recording"
        except TimeoutError:
            reason = f"it did not answer within {ANSWER_S:g} s: its event loop may be stuck"
        except (TritonError, StopAsyncIteration, msgspec.ValidationError) as error:
            cause = RemoteError.cause_of(error)
            reason = cause.message if cause is not None else str(error) or "it ended the recording"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            stream.cancel()
        print(f"instance {worker}: {one_line(reason)}", file=sys.stderr)
        return reason

    def _take(self, worker: int, exchange: Exchange) -> None:
        if self.full.done():
            return
        self.skipped[worker] = exchange.skipped
        try:
            self._writer.add(exchange)
        except OSError as error:
            words = f"cannot write {self.path}: {error.strerror or error}; it has {self.count} request(s)"
            self.full.set_exception(Failure(words))
            return
        self.count += 1
        if self.count >= self._most or self._writer.size >= self._most_bytes:
            self.full.set_result(None)

    def left_out(self) -> str:
        """Text about requests that are not in the file."""
        left_out = sum(self.skipped.values())
        return f"; {left_out} were left out, because they are too large or the workers had no room" if left_out else ""


async def _run(recorder: Recorder, arguments: argparse.Namespace, config: Config) -> None:
    async with cluster(config, ANSWER_S) as found:
        workers = [each.id for each in await listed(found.runtime.discovery) if each.endpoint == recorder.name]
        if not workers:
            asked = f"{found.runtime.discovery.where} was asked{found.runtime.elsewhere(recorder.name)}"
            close = await close_to(recorder.name, found.runtime) or ": `trd ls` shows what is served"
            raise Failure(f"no instance serves {recorder.name} ({asked}){close}")
        await recorder.record(found, workers, arguments.duration, arguments.metadata)
