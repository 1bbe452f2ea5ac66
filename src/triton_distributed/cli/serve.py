"""`trd serve module:object --endpoint ns.comp.ep`: serve one handler as one instance, until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import signal
import sys
from types import ModuleType
from typing import Any

from triton_distributed.cli.arguments import at_least, endpoint, pair, pairs
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.settings import settings
from triton_distributed.cli.target import Target
from triton_distributed.config import Config
from triton_distributed.discovery.static import static_id
from triton_distributed.errors import ConfigError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.transport.address import Address

try:
    from uvloop import new_event_loop
except ImportError:  # uvloop has no wheel for this platform.
    from asyncio import new_event_loop  # type: ignore[assignment]

EPILOG = """\
OBJECT is a function (async or plain, generator or not), Class.method,
instance.method, or a class without arguments, of which `generate` serves, or
else `__call__`. MODULE is searched in the current directory first.

When the endpoint is ready, one line is printed on standard output:
    ready: serving NS.COMP.EP as instance ID at ADDRESS

SIGTERM and SIGINT drain: no new request begins, running ones finish within
TRD_DRAIN_TIMEOUT_S, and the exit status is 0. A second signal ends it at once.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("target", metavar="MODULE:OBJECT", help="the handler of the requests")
    parser.add_argument(
        "--endpoint", metavar="NS.COMP.EP", type=endpoint, required=True, help="the name that clients call"
    )
    parser.add_argument(
        "--max-inflight", metavar="N", type=at_least(1), help="handlers that may run at once (default: no limit)"
    )
    parser.add_argument(
        "--max-queue", metavar="N", type=at_least(0), default=0, help="requests that may wait beyond that (default: 0)"
    )
    parser.add_argument(
        "--listen", metavar="ADDRESS", type=_address, help="tcp://host:port or unix:///path (default: TRD_LISTEN)"
    )
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", type=pair, action="append", help="publish this with the instance; repeatable"
    )


def _address(text: str) -> str:
    try:
        address = Address.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.value!r}: {error.reason}") from error
    if address.scheme == "memory":
        raise argparse.ArgumentTypeError(f"{text!r}: no other process could call it")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    target = Target(arguments.target)
    listen = {} if arguments.listen is None else {"listen": arguments.listen}
    config = settings(handle_signals=True, **listen)
    module = target.load()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(arguments, config, target, module))
    return 0


async def _serve(arguments: argparse.Namespace, config: Config, target: Target, module: ModuleType) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # This handler interrupts a class that loads its model; asyncio's own would wait for the class.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name: EndpointName = arguments.endpoint
    handler = target.handler(module)
    async with DistributedRuntime(config=config) as runtime:
        try:
            served = runtime.namespace(name.namespace).component(name.component).endpoint(name.endpoint)
            serving = served.serve_endpoint(
                handler,
                max_inflight=arguments.max_inflight,
                max_queue=arguments.max_queue,
                metadata=pairs(arguments.metadata),
            )
        except TypeError as error:
            raise Failure(f"{target.text} cannot serve: {error}") from error
        draining = runtime.primary_token().cancelled()
        first: list[asyncio.Future[Any]] = [serving, serving.registered]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if serving.registered.done():
            _say_ready(serving.registered.result(), config)
            await asyncio.wait({serving, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done() and (running := runtime.stats()[name.path].inflight):
                print(
                    f"draining: {running} request(s) may run for at most {config.drain_timeout_s:g} s; "
                    "a second signal ends them now",
                    file=sys.stderr,
                )
        try:
            await serving
        except OSError as error:
            raise _cannot_listen(error, config) from error


def _say_ready(instance: Instance, config: Config) -> None:
    id = instance.id
    if config.discovery == "static":
        id = static_id(instance.endpoint, instance.addresses)  # Clients know the list's entry under this id.
    with contextlib.suppress(OSError):  # The reader of the output may be gone.
        print(f"ready: serving {instance.endpoint} as instance {id} at {','.join(instance.addresses)}", flush=True)


def _cannot_listen(error: OSError, config: Config) -> Failure:
    if error.errno == errno.EADDRINUSE:
        return Failure(f"cannot listen on {config.listen}: the address is in use; give another with --listen")
    return Failure(error.strerror or str(error))
