"""`trd replay FILE module:object`: send recorded requests to a handler here, and compare its answers.

`trd replay TRACE --policy NAME` is in `replay_trace.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import msgspec

from triton_distributed.annotated import Annotated, parts
from triton_distributed.api.connection import Connection
from triton_distributed.api.declarations import Declaration
from triton_distributed.cli import replay_trace
from triton_distributed.cli.arguments import at_least, endpoint, seconds
from triton_distributed.cli.call import wait_for_instance
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.differences import Rule
from triton_distributed.cli.failure import FAILED, USAGE, Failure, one_line
from triton_distributed.cli.load import Quantiles, duration, quantiles
from triton_distributed.cli.recordings import Recorded, Recordings, Value
from triton_distributed.cli.rendering import json_line, table
from triton_distributed.cli.settings import settings
from triton_distributed.cli.target import Target
from triton_distributed.config import Config
from triton_distributed.context import Context
from triton_distributed.discovery import Discovery, Sink
from triton_distributed.discovery.base import Watch
from triton_distributed.discovery.memory import MemoryDiscovery, MemoryHub
from triton_distributed.errors import DeadlineExceeded, DecodeError, RemoteError, TritonError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.runtime.backends import make_discovery

EPILOG = """\
MODULE[:OBJECT] is as in `trd serve`. The handler is served in this process, and
no other process sees it. Calls that this handler makes go to the real endpoints.
With --endpoint the requests go to an endpoint that is served.

Requests are sent in the order in which they ended, one at a time unless
--concurrency is given. If a caller left early, or its deadline passed, its answer
is compared up to that item. The times are those of the worker; only the present
time to the first item also includes the way to the handler and back.

PATH is the dotted end of a field's path, with shell wildcards: `created`,
`usage.*_s`. An item's number is the first name of its path.

exit status: 0 all answers are the same, 1 some differ.

A trace tells when the requests of a language model came, how long they were,
and which prompts begin alike. With --policy nothing is served: simulated engines
and the router of production run it in virtual time.
"""

MOST_SHOWN = 5
"""Differences of one request that are shown."""

WAIT_S = 5.0
"""Seconds to wait for an instance of `--endpoint`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("file", metavar="FILE", type=Path, help="what `trd record` has written, or a trace")
    parser.add_argument("target", metavar="MODULE[:OBJECT]", nargs="?", help="the handler")
    name = parser.add_argument("--endpoint", metavar="NS.COMP.EP", type=endpoint, help="call this endpoint instead")
    completes(name, endpoint_names)
    parser.add_argument(
        "--ignore", metavar="PATH", action="append", default=[], help="fields that may differ; repeatable"
    )
    parser.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=_share,
        default=0.0,
        help="relative difference allowed between numbers, e.g. 1e-6 (default: 0)",
    )
    parser.add_argument(
        "--concurrency", metavar="N", type=at_least(1), default=1, help="requests at a time (default: 1)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=60.0, help="seconds for each request (default: 60)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line: each request that differs, then the totals; of a trace, each policy",
    )
    replay_trace.configure(parser)
    parser.set_defaults(default_of=parser.get_default)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


class Answer(NamedTuple):
    """What a replayed request was answered.

    Attributes:
        items: the items; the parts of an item that has an event, comments or an id.
        error: type and text of the error; empty without one.
        first_s: seconds to the first item, as the caller sees it.
        took_s: seconds that the handler ran, as its worker counts them; to the end if these are not known.
    """

    items: list[Any]
    error: tuple[str, str]
    first_s: float | None
    took_s: float


class Tally:
    """Counts and times of a replay.

    Attributes:
        requests, different: the number of requests, and of those whose answers differ.
    """

    def __init__(self) -> None:
        self.requests = self.different = 0
        self._times: dict[str, tuple[list[float], list[float]]] = {"first item": ([], []), "whole answer": ([], [])}

    def add(self, before: Recorded, now: Answer, different: bool) -> None:
        """Count a request."""
        self.requests += 1
        self.different += different
        if before.outcome != "ok" or now.error[0]:
            return
        if before.items and now.first_s is not None:
            self._add("first item", before.items[0].after_s, now.first_s)
        self._add("whole answer", before.took_s, now.took_s)

    def _add(self, name: str, before_s: float, now_s: float) -> None:
        before, now = self._times[name]
        before.append(before_s)
        now.append(now_s)

    def times(self) -> Iterator[tuple[str, Quantiles, Quantiles]]:
        """Name, recorded times and times now, of the requests that ended well both times."""
        for name, (before, now) in self._times.items():
            recorded, replayed = quantiles(before), quantiles(now)
            if recorded is not None and replayed is not None:
                yield name, recorded, replayed


def run(arguments: argparse.Namespace) -> int:
    """Replay the file and print what differs."""
    if arguments.policy is not None:
        if arguments.target is not None or arguments.endpoint is not None:
            raise Failure("--policy is for a trace, which no handler and no --endpoint answers", USAGE)
        _refuse(
            arguments, ("ignore", "tolerance", "concurrency", "timeout"), "is for a handler, and --policy for a trace"
        )
        return replay_trace.run(arguments)
    _refuse(arguments, replay_trace.OPTIONS, "is for a trace, which needs --policy NAME")
    if (arguments.target is None) == (arguments.endpoint is None):
        named = "the handler, MODULE:OBJECT, or the endpoint, --endpoint NS.COMP.EP"
        raise Failure(f"name {named}; or --policy NAME for a trace", USAGE)
    recordings = Recordings(arguments.file)
    target = None if arguments.target is None else Target(arguments.target)
    # The handler listens where no other process can dial, and a worker's own port may be taken.
    private = {} if target is None else {"listen": "memory://replay", "advertise": "", "request_plane": "direct"}
    config = settings(handle_signals=False, **private)
    tally = asyncio.run(_run(arguments, recordings, target, config))
    if recordings.cut:
        print(f"{arguments.file}: the last line is incomplete and was left out", file=sys.stderr)
    if not tally.requests:
        raise Failure(f"{arguments.file} has no request")
    if arguments.json:
        sys.stdout.buffer.write(json_line(_plain(tally)))
    else:
        for line in _lines(tally):
            print(line)
    return FAILED if tally.different else 0


def _refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse options that would have no effect."""
    for name in names:
        if getattr(arguments, name) != arguments.default_of(name):
            raise Failure(f"--{name.replace('_', '-')} {why}", USAGE)


async def _run(arguments: argparse.Namespace, recordings: Recordings, target: Target | None, config: Config) -> Tally:
    rule = Rule(arguments.ignore, arguments.tolerance)
    tally = Tally()
    waiting = iter(recordings)

    async def work(client: Client) -> None:
        for each in waiting:
            answer = await replay(client, each, arguments.timeout)
            found = list(compare(each, answer, rule))
            tally.add(each, answer, bool(found))
            if found:
                _show(each, found, arguments.json)

    async with _client(arguments, recordings, target, config) as client:
        tasks = [asyncio.create_task(work(client)) for _ in range(arguments.concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return tally


@asynccontextmanager
async def _client(
    arguments: argparse.Namespace, recordings: Recordings, target: Target | None, config: Config
) -> AsyncIterator[Client]:
    if target is None:
        name: EndpointName = arguments.endpoint
        async with DistributedRuntime(config=config) as runtime:
            client = await runtime.endpoint(str(name)).client()
            await wait_for_instance(client, name, WAIT_S, None, runtime)
            yield client
        return
    handler, declared = _handler(target, recordings.header.endpoint)
    discovery = Private(declared.name, make_discovery(config))
    async with DistributedRuntime(config=config, discovery=discovery) as runtime, Connection(runtime, False) as here:
        try:
            await here.serve_declared(handler, declared)
        except TypeError as error:
            raise Failure(f"{target.text} cannot serve: {error}") from error
        yield await runtime.endpoint(str(declared.name)).client()


def _handler(target: Target, recorded: str) -> tuple[Any, Declaration]:
    """The handler to replay against, with what was declared about it; without its limits."""
    module = target.load()
    found = target.declared(module)
    if not found and target.path:
        return target.handler(module), Declaration(EndpointName.parse(recorded), None, {})
    fitting = [each for each in found if str(each[1].name) == recorded] if len(found) > 1 else found
    if not fitting:
        names = ", ".join(str(each[1].name) for each in found) or "no handler"
        raise Failure(f"{target.text} declares {names}, and the recording is of {recorded}: write {target.text}:OBJECT")
    handler, declared = fitting[0]
    return handler, Declaration(declared.name, declared.contract, {})


class Private:
    """A discovery in which one endpoint is seen by this process alone. All others are those of another discovery.

    Args:
        name: the endpoint.
        others: the other discovery, which is only read.
    """

    def __init__(self, name: EndpointName, others: Discovery) -> None:
        self._name, self._others = name, others
        self._own = MemoryDiscovery(hub=MemoryHub())

    @property
    def where(self) -> str:
        """The address of the other discovery."""
        return self._others.where

    async def register(self, instance: Instance) -> None:
        """Publish an instance in this process; see `Discovery.register`."""
        await self._own.register(instance)

    async def withdraw(self, instance: Instance) -> None:
        """Remove an instance; see `Discovery.withdraw`."""
        await self._own.withdraw(instance)

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        """Watch an endpoint; see `Discovery.watch`."""
        return await (self._own if endpoint == self._name else self._others).watch(endpoint, sink)

    async def close(self) -> None:
        """Close both."""
        await self._own.close()
        await self._others.close()


async def replay(client: Client, recorded: Recorded, timeout_s: float) -> Answer:
    """Send one recorded request, and take its answer: as many items as were recorded, if its caller left then."""
    try:
        requests = [_request(each) for each in recorded.requests]
    except DecodeError as error:
        raise Failure(f"request {recorded.id} cannot be replayed: {error}") from error
    if not requests and not recorded.streamed:
        raise Failure(f"request {recorded.id} is damaged: it has no request")
    values = recorded.metadata
    context = Context(recorded.id or None, values.get("metadata"), values.get("travelling"))
    sent: Any = _each(requests) if recorded.streamed else requests[0]
    most = len(recorded.items) if recorded.outcome == "left" else None
    items: list[Any] = []
    failed, first_s, took_s = ("", ""), None, None
    began = perf_counter()
    try:
        stream = client.generate(sent, context=context, timeout=timeout_s)
        try:
            while most is None or len(items) < most:
                item = await anext(stream, None)
                if item is None:
                    break
                if first_s is None:
                    first_s = perf_counter() - began
                items.append(item)
        finally:
            stream.cancel()
        timing = stream.timing()
        if timing.handler_s is not None and timing.reader_s is not None:
            took_s = timing.handler_s + timing.reader_s
    except DeadlineExceeded:
        failed = "DeadlineExceeded", f"it did not end within {timeout_s:g} s"
    except TritonError as error:
        cause = RemoteError.cause_of(error)
        failed = (cause.type_name, cause.message) if cause is not None else (type(error).__name__, str(error))
    return Answer(
        [_plain_item(each) for each in items], failed, first_s, perf_counter() - began if took_s is None else took_s
    )


def _request(value: Value) -> Any:
    """A value that is encoded to the very bytes that were recorded, if it has no buffers."""
    return value.value() if value.buffers else msgspec.Raw(value.encoded)


async def _each(requests: list[Any]) -> AsyncIterator[Any]:
    for each in requests:
        yield each


def _plain_item(item: Annotated) -> Any:
    return parts(item) if item.event() or item.comments() or item.id() else item.data()


def _recorded_item(value: Value) -> Any:
    found = value.value()
    if not value.annotated:
        return found
    if not isinstance(found, list) or len(found) != 4:
        raise DecodeError("an annotated item is damaged: it must have data, event, comments and id")
    return found if any(found[1:]) else found[0]


def compare(recorded: Recorded, now: Answer, rule: Rule) -> Iterator[str]:
    """Describe each difference between a recorded answer and the present one."""
    try:
        before = [_recorded_item(each) for each in recorded.items]
    except DecodeError as error:
        raise Failure(f"the answer to request {recorded.id} cannot be read: {error}") from error
    for number, (one, other) in enumerate(zip(before, now.items, strict=False)):
        yield from (f"item {each}" for each in rule.differences(one, other, (str(number),)))
    if len(before) != len(now.items):
        yield f"{len(before)} item(s) → {len(now.items)}"
    if now.error != tuple(recorded.error) and not (recorded.outcome == "left" and not now.error[0]):
        words = [": ".join(filter(None, each)) or "no error" for each in (recorded.error, now.error)]
        yield " → ".join(map(one_line, words))


def _show(recorded: Recorded, found: list[str], as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(json_line({"id": recorded.id, "differences": found}))
    else:
        print(f"request {recorded.id}:")
        for each in found[:MOST_SHOWN]:
            print(f"  {each}")
        if len(found) > MOST_SHOWN:
            print(f"  … and {len(found) - MOST_SHOWN} more")
    sys.stdout.flush()


def _lines(tally: Tally) -> Iterator[str]:
    rows = [(name, _change(before.p50, now.p50), _change(before.p99, now.p99)) for name, before, now in tally.times()]
    if rows:
        yield from table(("recorded → now", "p50", "p99"), rows)
    same = tally.requests - tally.different
    yield f"{tally.requests} request(s): {same} answered as recorded, {tally.different} differ"


def _change(before_s: float, now_s: float) -> str:
    ratio = f", {now_s / before_s:.2f}×" if before_s else ""
    return f"{duration(before_s)} → {duration(now_s)}{ratio}"


def _plain(tally: Tally) -> dict[str, Any]:
    times = {name: {"recorded": before._asdict(), "now": now._asdict()} for name, before, now in tally.times()}
    return {"requests": tally.requests, "different": tally.different, "times": times}
