"""`run`: serve declared functions until a signal. `trd serve` does the same from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio import _get_running_loop as _running_loop
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from triton_distributed.api.connection import Connection, connect
from triton_distributed.api.declarations import Declaration, declaration_of, declared_in
from triton_distributed.api.operating import add_declared
from triton_distributed.config import Config
from triton_distributed.discovery.static import static_id
from triton_distributed.errors import RuntimeClosed
from triton_distributed.names import Instance
from triton_distributed.observe.log_format import line_of
from triton_distributed.supervisor import replica
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.supervisor import supervise
from triton_distributed.system.event_loop import new_event_loop

COUNT_S = 0.2
"""Seconds between two looks at how many requests a replica has served, if their number is limited."""


def run(*functions: Callable[..., Any], config: Config | None = None, processes: int | Replicas | None = None) -> None:
    """Serve functions that `@trd.serve` has declared, until SIGTERM or SIGINT; then drain and return.

    The status port gets what the calling program, and the objects of bound methods, have declared with `@trd.route` and
    `@trd.health_check`. The observers among the program's global variables are added.

    It makes an event loop (uvloop's where it is installed), and prints a line for each endpoint that can be called.

    With `processes`, this process becomes a supervisor. It runs the program again in so many processes, with the same
    arguments, and there `run` serves. Each of them, a replica, is an instance of its own, and `TRD_REPLICA` is its
    number, from 0 on. A replica that ends is started again.

    Args:
        functions: the functions or bound methods; by default all that the calling program has declared.
        config: the settings; by default those of the environment, with `TRD_HANDLE_SIGNALS` on.
        processes: the number of replicas, or `trd.Replicas`, which also says how they are kept: the environment, the
            cores and the requests of each, and reloading. By default this process serves.

    Raises:
        TypeError: a function is not declared, or the program declares none; `processes` is neither a whole number nor
            `Replicas`; a function for the status port takes too many arguments.
        ValueError: `processes` is less than 1, or two functions answer the same route.
        ConfigError: the processes cannot share an address of the settings.
        SystemExit: a second signal came, or a replica did not end well; the status says which.
        OSError: the address to listen on cannot be bound.
        DiscoveryError: an instance cannot be registered.
        RuntimeError: an event loop is running already; use `here.serve` there. With `processes`: no replica could be
            started; this system cannot pin or watch; or the program cannot be run again, because it is not in a file.
    """
    if _running_loop() is not None:
        raise RuntimeError("run() makes an event loop of its own, and one runs here: use `await here.serve(function)`")
    chosen = list(functions) or declared_in(vars(sys.modules["__main__"]))
    if not chosen:
        raise TypeError("run() found no declared function in this program: decorate one with @trd.serve(…)")
    declared = [(each, _declaration(each)) for each in chosen]
    config = Config.from_env(handle_signals=True) if config is None else replica.settings(config)
    replicas = _replicas(processes)
    if replicas is not None and not replica.is_replica():
        if status := supervise(replicas, config):
            raise SystemExit(status)
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(declared, config, None if replicas is None else replicas.limit()))


def _replicas(processes: Any) -> Replicas | None:
    if processes is None or isinstance(processes, Replicas):
        return processes
    if type(processes) is not int:
        raise TypeError(f"run(): processes is a number, not {processes!r}")
    if processes < 1:
        raise ValueError(f"run(): processes={processes}: it must be at least 1")
    return Replicas(processes)


def _declaration(function: Any) -> Declaration:
    found = declaration_of(function)
    if found is None:
        raise TypeError(f"run(): {function!r} is not declared: decorate it with @trd.serve(…)")
    return found


async def _run(handlers: list[tuple[Any, Declaration]], config: Config, limit: int | None) -> None:
    async with connect(config) as here:
        add_declared(here, vars(sys.modules["__main__"]), [handler for handler, _ in handlers])
        await serve_until_drained(here, handlers, limit)


async def serve_until_drained(
    here: Connection, handlers: Iterable[tuple[Any, Declaration]], limit: int | None = None
) -> None:
    """Serve handlers, say on standard output when each can be called, and wait for the end of the drain.

    A drain that begins before the last handler is served is an end like any other.

    Args:
        here: the connection that serves them.
        handlers: handlers with the endpoints that they serve.
        limit: requests after which the supervisor replaces this process; None for no limit.

    Raises:
        TritonError: as `Connection.serve` raises it.
    """
    served = []
    runtime = here.runtime
    runtime.worker.replica = replica.number()
    try:
        for handler, declared in handlers:
            served.append(one := await here.serve_declared(handler, declared))
            _say_ready(one.instance, runtime.config)
        if url := runtime.status_port.url:
            replica.report(replica.STATUS + url)
        replica.report(replica.READY)
    except RuntimeClosed:
        if not runtime.worker.draining:
            raise
    await until_ended(here, [asyncio.ensure_future(each.until_drained()) for each in served], limit)


async def until_ended(here: Connection, ends: list[asyncio.Future[None]], limit: int | None = None) -> None:
    """Wait for the end of what a connection serves, and say on standard error when a drain has to wait.

    Args:
        here: the connection.
        ends: done when each is not served any more. They are cancelled if this is.
        limit: as for `serve_until_drained`.
    """
    runtime = here.runtime
    draining = runtime.primary_token().cancelled()
    counting = None if limit is None else asyncio.ensure_future(_report_worn(here, limit))
    try:
        await asyncio.wait([*ends, draining], return_when=asyncio.FIRST_COMPLETED)
        running = sum(each.stats.inflight for each in runtime.worker.server.endpoints if each.graceful)
        if running and not all(each.done() for each in ends):
            config = runtime.config
            text = f"draining: {running} request(s) may run for at most {config.drain_timeout_s:g} s; "
            print(line_of(config.log_format, text + "a second signal ends them now"), file=sys.stderr)
        await asyncio.gather(*ends)
    finally:
        for each in [*ends, *filter(None, [counting])]:
            each.cancel()


async def _report_worn(here: Connection, limit: int) -> None:
    """Tell the supervisor once that this process has served its requests. Counting must not cost a request anything."""
    while True:
        outcomes = [each.outcomes() for each in here.runtime.stats().values()]
        if sum(sum(each.values()) - each["refused"] for each in outcomes) >= limit:
            return replica.report(replica.WORN)
        await asyncio.sleep(COUNT_S)


def _say_ready(instance: Instance, config: Config) -> None:
    id = instance.id
    if config.backend.fixed:
        id = static_id(instance.endpoint, instance.addresses)  # Clients know the entry of `TRD_STATIC` under this id.
    with contextlib.suppress(OSError):  # The reader of the output may be gone.
        print(f"ready: serving {instance.endpoint} as instance {id} at {','.join(instance.addresses)}", flush=True)


def with_options(declared: Declaration, options: Mapping[str, Any]) -> Declaration:
    """A declaration with some options replaced."""
    return declared._replace(options={**declared.options, **options})  # type: ignore[typeddict-item]
