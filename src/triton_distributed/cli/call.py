"""`trd call ns.comp.ep '{"…"}'`: make one call, and print each item at once as one line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import select
import stat
import sys
from typing import Any

import msgspec

from triton_distributed.cli.arguments import at_least, endpoint, pair, pairs, seconds
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.rendering import item, json_line
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.errors import DeadlineExceeded, InstanceNotFound, NoInstances, RemoteError, TritonError
from triton_distributed.names import EndpointName
from triton_distributed.runtime import Client, DistributedRuntime, ResponseStream

EPILOG = """\
Each item is one line of JSON, written at once. Bytes are shown as
{"bytes": {"size": N, "base64": TEXT}}, arrays as {"ndarray": {"dtype": TEXT,
"shape": [N], "values": [N]}}. Large content is left out.

Ctrl-C cancels the handler, and so does the end of the output's reader.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("endpoint", metavar="NS.COMP.EP", type=endpoint, help="the endpoint to call")
    parser.add_argument("request", metavar="REQUEST", help="JSON; - reads it from standard input")
    parser.add_argument("--text", action="store_true", help="REQUEST is plain text, not JSON")
    parser.add_argument("--timeout", metavar="S", type=seconds, help="seconds for the call (default: no limit)")
    parser.add_argument(
        "--wait", metavar="S", type=seconds, help="seconds to wait for an instance (default: there must be one)"
    )
    parser.add_argument("--instance", metavar="ID", type=at_least(1), help="call this instance; `trd ls` shows the ids")
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", type=pair, action="append", help="send this with the request; repeatable"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="if the handler raises, also show its traceback in the worker"
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the call and print the items."""
    config = settings()
    # The command's own error says what happened to its only call.
    if logging.getLogger().level >= logging.WARNING:
        logging.getLogger("triton_distributed.transport").setLevel(logging.ERROR)
    asyncio.run(_run(arguments, read_request(arguments.request, arguments.text, config.max_message_bytes), config))
    return 0


def read_request(text: str, plain: bool, limit: int) -> Any:
    """Read the request of a command line.

    Args:
        text: JSON, or `-` to read standard input.
        plain: it is plain text instead.
        limit: the largest message, in bytes.

    Raises:
        Failure: it is not UTF-8, or not JSON.
    """
    data = text.encode("utf-8", "surrogateescape")
    if text == "-":
        data = sys.stdin.buffer.read(limit + 1)  # One byte above the limit is enough to refuse the request.
    try:
        return data.decode() if plain else msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise Failure(f"the request is not UTF-8: {error}", USAGE) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise Failure(f"the request is not JSON: {error}; plain text goes with --text", USAGE) from error


async def _run(arguments: argparse.Namespace, request: Any, config: Config) -> None:
    name: EndpointName = arguments.endpoint
    with Output() as output:
        async with DistributedRuntime(config=config) as runtime:
            client = await runtime.namespace(name.namespace).component(name.component).endpoint(name.endpoint).client()
            if arguments.wait is not None:
                await wait_for_instance(client, name, arguments.wait, arguments.instance, runtime)
            try:
                stream = _start(client, request, arguments)
                try:
                    async for each in stream:
                        output.write(json_line(item(each)))
                finally:
                    stream.cancel()
            except TritonError as error:
                cause = RemoteError.cause_of(error)
                if arguments.traceback and cause is not None and cause.remote_traceback:
                    print(cause.remote_traceback.rstrip("\n"), file=sys.stderr)
                raise Failure(_words(error, name)) from error


def _start(client: Client, request: Any, arguments: argparse.Namespace) -> ResponseStream:
    options: dict[str, Any] = {"timeout": arguments.timeout, "metadata": pairs(arguments.metadata)}
    try:
        if arguments.instance is not None:
            return client.direct(request, arguments.instance, **options)
        return client.generate(request, **options)
    except (TypeError, ValueError) as error:
        raise Failure(f"the request cannot be sent: {error}", USAGE) from error


async def wait_for_instance(
    client: Client, name: EndpointName, timeout_s: float, instance: int | None, runtime: DistributedRuntime
) -> None:
    """Wait until an instance, or the one that is named, is served.

    Raises:
        Failure: it was not, within `timeout_s` seconds.
    """
    table = client.candidates.table
    found: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def look() -> None:
        if not found.done() and (table.instances if instance is None else instance in table.by_id):
            found.set_result(None)

    table.listeners.append(look)
    look()
    try:
        async with asyncio.timeout(timeout_s):
            await found
    except TimeoutError:
        who = "no instance" if instance is None else f"no instance {instance}"
        asked = f"{runtime.discovery.where} was asked{runtime.elsewhere(name)}"
        raise Failure(f"{who} served {name} within {timeout_s:g} s ({asked})") from None
    finally:
        table.listeners.remove(look)


def _words(error: TritonError, name: EndpointName) -> str:
    """Return an error's text. Texts about the Python API are replaced by ones about this command."""
    match error:
        case NoInstances():
            asked = f"{error.where} was asked{error.elsewhere}"
            return f"no instance serves {name} ({asked}): `trd ls` shows what is served, --wait S waits for it"
        case InstanceNotFound():
            known = ", ".join(map(str, error.known)) or "none"
            return f"no instance {error.instance_id} serves {name}; its instances: {known}"
        case DeadlineExceeded():
            return f"{name} did not finish within {error.timeout_s:g} s: give it more with --timeout"
        case RemoteError() if (cause := RemoteError.cause_of(error)) is not None:
            ways = "".join(f", passed on by instance {place}" for place, _ in cause.hops[1:])
            return f"instance {cause.hops[0][0]} raised {cause.words}{ways}"
    return str(error)


class Output:
    """Standard output. If its reader closes the pipe, the task that entered this context is cancelled.

    Raises (from the end of the block, and from `write`):
        BrokenPipeError: the reader has closed the pipe.
    """

    def __init__(self) -> None:
        self._gone = False
        self._pipe = -1

    def __enter__(self) -> Output:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(fd).st_mode) and hasattr(select, "poll"):
            self._pipe = fd
            self._loop.add_reader(fd, self._look)  # The write end is reported as ready when the read end is closed.
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pipe >= 0:
            self._loop.remove_reader(self._pipe)
        if self._gone and isinstance(error, asyncio.CancelledError):
            assert self._task is not None
            self._task.uncancel()
            raise BrokenPipeError from error

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, 0)
        self._loop.remove_reader(self._pipe)
        if poll.poll(0) and self._task is not None:
            self._gone = True
            self._task.cancel()

    def write(self, line: bytes) -> None:
        """Write one line and flush it."""
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
