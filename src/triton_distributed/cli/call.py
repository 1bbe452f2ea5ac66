"""`trd call ns.comp.ep '{"…"}'`: make one call, and print each item at once as one line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any

import msgspec

from triton_distributed.cli.arguments import at_least, endpoint, pair, pairs, seconds
from triton_distributed.cli.completion import completes, endpoint_names, instance_ids
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.instances import close_to
from triton_distributed.cli.output import Output
from triton_distributed.cli.rendering import item, json_line, json_option, parts
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.errors import DeadlineExceeded, InstanceNotFound, NoInstances, RemoteError, TritonError
from triton_distributed.names import EndpointName
from triton_distributed.runtime import Client, DistributedRuntime, ResponseStream

EPILOG = """\
Each item is one line of JSON, written at once. Bytes are shown as
{"bytes": {"size": N, "base64": TEXT}}, arrays as {"ndarray": {"dtype": TEXT,
"shape": [N], "values": [N]}}. Large content is left out. With --json each item
is an object with its parts: data, event, comments, id.

Ctrl-C cancels the handler. So does the end of the program that reads the output.
"""


WAIT = ": `trd ls` shows what is served, --wait S waits for it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    name = parser.add_argument("endpoint", metavar="NS.COMP.EP", type=endpoint, help="the endpoint to call")
    completes(name, endpoint_names)
    parser.add_argument("request", metavar="REQUEST", help="JSON; - reads it from standard input")
    parser.add_argument("--text", action="store_true", help="REQUEST is plain text, not JSON")
    parser.add_argument("--timeout", metavar="S", type=seconds, help="seconds for the call (default: no limit)")
    parser.add_argument(
        "--wait", metavar="S", type=seconds, help="seconds to wait for an instance (default: do not wait)"
    )
    instance = parser.add_argument(
        "--instance", metavar="ID", type=at_least(1), help="call this instance; `trd ls` shows the ids"
    )
    completes(instance, instance_ids)
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", type=pair, action="append", help="send this with the request; repeatable"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="if the handler raises, also show its traceback in the worker"
    )
    json_option(parser, "one item, as an object")


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
                        output.write(json_line(parts(each) if arguments.json else item(each)))
                finally:
                    stream.cancel()
            except TritonError as error:
                cause = RemoteError.cause_of(error)
                if arguments.traceback and cause is not None and cause.remote_traceback:
                    print(cause.remote_traceback.rstrip("\n"), file=sys.stderr)
                close = await close_to(name, runtime) if isinstance(error, NoInstances) else ""
                raise Failure(_words(error, name, close)) from error


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
        close = "" if table.instances else await close_to(name, runtime)
        raise Failure(f"{who} served {name} within {timeout_s:g} s ({asked}){close}") from None
    finally:
        table.listeners.remove(look)


def _words(error: TritonError, name: EndpointName, close: str) -> str:
    """Return an error's text. Texts about the Python API are replaced by ones about this command.

    Args:
        close: a suggestion of another name, or an empty text.
    """
    match error:
        case NoInstances():
            asked = f"{error.where} was asked{error.elsewhere}"
            return f"no instance serves {name} ({asked}){close or WAIT}"
        case InstanceNotFound():
            known = ", ".join(map(str, error.known)) or "none"
            return f"no instance {error.instance_id} serves {name}; its instances: {known}"
        case DeadlineExceeded():
            return f"{name} did not finish within {error.timeout_s:g} s: give it more with --timeout"
        case RemoteError() if (cause := RemoteError.cause_of(error)) is not None:
            ways = "".join(f", passed on by instance {place}" for place, _ in cause.hops[1:])
            return f"instance {cause.hops[0][0]} raised {cause.words}{ways}"
    return str(error)
