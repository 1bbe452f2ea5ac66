"""`trd serve module` and `trd serve module:object --endpoint ns.comp.ep`: serve handlers until a signal."""

from __future__ import annotations

import argparse
import asyncio
import errno
import signal
from types import ModuleType
from typing import Any

from triton_distributed.api.connection import connect
from triton_distributed.api.declarations import Declaration
from triton_distributed.api.operating import add_declared
from triton_distributed.api.running import serve_until_drained, with_options
from triton_distributed.cli.arguments import at_least, endpoint, pair, pairs
from triton_distributed.cli.completion import completes, modules
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.settings import worker_settings
from triton_distributed.cli.target import Target
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.supervisor import replica
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.shareable import LISTEN
from triton_distributed.supervisor.supervisor import StartFailed, supervise
from triton_distributed.system.event_loop import new_event_loop
from triton_distributed.transport.address import Address

EPILOG = """\
A MODULE alone serves all functions in it that @trd.serve has declared. So does
an OBJECT that was declared, or a class or object with declared methods.

Otherwise, with --endpoint, OBJECT is a function (async or plain, generator or
not), Class.method, instance.method, or a class. An object of the class is made
without arguments, and its `generate` serves, or else its `__call__`. MODULE is
searched in the current directory first.

When an endpoint is ready, one line is printed on standard output:
    ready: serving NS.COMP.EP as instance ID at ADDRESS

With --replicas, N processes serve. A process that ends is started again. Each
process has a number, from 0 on: its variable TRD_REPLICA has the number, and
each line of its output begins with it. SIGHUP replaces one process after the
other: a successor starts, and when it can be called, the old process drains.
--env, --pin, --max-requests, --drain-first and --reload also work without
--replicas, for one process.

SIGTERM and SIGINT drain: no new request begins, running ones finish within
TRD_DRAIN_TIMEOUT_S, and the exit status is 0. A second signal ends it at once.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    completes(parser.add_argument("target", metavar="MODULE[:OBJECT]", help="the handlers of the requests"), modules)
    parser.add_argument(
        "--endpoint", metavar="NS.COMP.EP", type=endpoint, help="what clients call, if OBJECT is not declared"
    )
    parser.add_argument(
        "--max-inflight", metavar="N", type=at_least(1), help="handlers that may run at once (default: no limit)"
    )
    parser.add_argument(
        "--max-queue", metavar="N", type=at_least(0), help="requests that may wait beyond that (default: 0)"
    )
    parser.add_argument(
        "--listen", metavar="ADDRESS", type=_address, help="tcp://host:port or unix:///path (default: TRD_LISTEN)"
    )
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", type=pair, action="append", help="publish this with the instance; repeatable"
    )
    parser.add_argument(
        "--replicas", metavar="N", type=at_least(1), help="processes that serve; one that ends is started again"
    )
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        type=pair,
        action="append",
        help="set this in each process; {replica} in VALUE is its number, e.g. CUDA_VISIBLE_DEVICES={replica}; "
        "repeatable",
    )
    parser.add_argument("--pin", action="store_true", help="give each process its own share of the CPU cores")
    parser.add_argument(
        "--max-requests",
        metavar="N",
        type=at_least(1),
        help="replace a process that has served about N requests, one process at a time (default: never)",
    )
    parser.add_argument(
        "--drain-first",
        action="store_true",
        help="let a process drain before its successor starts, e.g. if a GPU has memory for one only",
    )
    parser.add_argument(
        "--reload", action="store_true", help="replace the processes when a Python file of the module's folder changes"
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
    config = worker_settings(handle_signals=True, **listen)
    replicas = _replicas(arguments)
    if replicas is not None and not replica.is_replica():
        try:
            return supervise(replicas, config, target.module)
        except StartFailed as error:
            raise Failure(str(error), error.status) from error
    module = target.load()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(arguments, config, target, module, None if replicas is None else replicas.limit()))
    return 0


def _replicas(arguments: argparse.Namespace) -> Replicas | None:
    """What the options say about replicas; None if none of them is given."""
    env = pairs(arguments.env)
    if LISTEN in env and arguments.listen is not None:
        raise Failure(f"--listen and --env {LISTEN}=… both say where to listen: give one", USAGE)
    options = {
        "env": env,
        "pin": arguments.pin,
        "max_requests": arguments.max_requests,
        "drain_first": arguments.drain_first,
        "reload": arguments.reload,
    }
    if arguments.replicas is None and not any(options.values()):
        return None
    try:
        return Replicas(arguments.replicas or 1, **options)
    except ValueError as error:
        raise Failure(str(error), USAGE) from error


async def _serve(
    arguments: argparse.Namespace, config: Config, target: Target, module: ModuleType, limit: int | None
) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # This handler interrupts a class that loads its model; asyncio's own would wait for the class.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = _handlers(arguments, target, module)
    try:
        async with connect(config) as here:
            add_declared(here, vars(module), [handler for handler, _ in handlers])
            await serve_until_drained(here, handlers, limit)
    except ConfigError:  # It is a ValueError, too, and a wrong setting has a status of its own.
        raise
    except (TypeError, ValueError) as error:
        raise Failure(f"{target.text} cannot serve: {error}") from error
    except OSError as error:
        raise _cannot_listen(error, config) from error


def _handlers(arguments: argparse.Namespace, target: Target, module: ModuleType) -> list[tuple[Any, Declaration]]:
    """The handlers to serve, with the options of the command line."""
    options = {
        "max_inflight": arguments.max_inflight,
        "max_queue": arguments.max_queue,
        "metadata": pairs(arguments.metadata) or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.endpoint is not None:
        if not target.path:
            raise Failure(f"--endpoint names the endpoint of one handler: write {target.text}:OBJECT", USAGE)
        handlers = [(target.handler(module), Declaration(arguments.endpoint, None, {}))]
    else:
        handlers = target.declared(module)
        if not handlers:
            if not target.path and (owners := target.owners(module)):
                raise Failure(
                    f"the declared handlers of {target.text} are methods: trd serve {' or '.join(owners)}", USAGE
                )
            where = f"{target.text} has no handler" if not target.path else f"{target.text} is not a handler"
            raise Failure(f"{where} that @trd.serve has declared: decorate one, or pass --endpoint", USAGE)
    return [(handler, with_options(declared, given)) for handler, declared in handlers]


def _cannot_listen(error: OSError, config: Config) -> Failure:
    if error.errno == errno.EADDRINUSE:
        return Failure(f"cannot listen on {config.listen}: the address is in use; give another with --listen")
    return Failure(error.strerror or str(error))
