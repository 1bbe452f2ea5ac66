"""An error's traceback is told once, where it arose; each handler that lets it through adds a line."""

from __future__ import annotations

import asyncio
import itertools
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.errors import RemoteError
from triton_distributed.payload.tracebacks import COMPILED, PACKAGE
from triton_distributed.runtime import Client

NAMES = ("t.c.one", "t.c.two", "t.c.three")


class Deep(Exception):
    """What the innermost handler raises."""


async def arises(request: Any) -> AsyncIterator[int]:
    yield 1
    raise Deep("here it arose")


async def streams(client: Client, request: Any) -> None:
    async for _ in client.generate(request, annotated=False):
        pass


async def awaits(client: Client, request: Any) -> None:
    await drained(await client.generate(request))


async def calls(client: Client, request: Any) -> None:
    await client.call(request)


async def calls_with_options(client: Client, request: Any) -> None:
    await client.call(request, timeout=60, idempotent=True, hedge_after_s=30)


async def resumes(client: Client, request: Any) -> None:
    await drained(client.generate(request, resume=True))


async def names_an_instance(client: Client, request: Any) -> None:
    await drained(client.direct(request, client.instance_ids()[0]))


async def catches_and_raises(client: Client, request: Any) -> None:
    try:
        await client.call(request)
    except Deep:
        await asyncio.sleep(0)
        raise


async def cleans_up(client: Client, request: Any) -> None:
    try:
        await client.call(request)
    finally:
        try:
            raise LookupError("an error of the cleanup, which it handles")
        except LookupError:
            pass


async def in_a_task(client: Client, request: Any) -> None:
    await asyncio.gather(client.call(request))


WAYS = [
    streams,
    awaits,
    calls,
    calls_with_options,
    resumes,
    names_an_instance,
    catches_and_raises,
    cleans_up,
    in_a_task,
]


def through(cluster: Cluster, name: str, way: Callable[[Client, Any], Any]) -> Any:
    """A handler that calls another and lets its error through."""

    async def handler(request: Any) -> AsyncIterator[Any]:
        await way(await cluster.client(name), request)
        yield "never"

    return handler


async def chain(cluster: Cluster, way: Callable[[Client, Any], Any], innermost: Any = arises) -> list[int]:
    """Three workers, of which each calls the one before; their instance ids."""
    workers = [await cluster.worker(innermost, NAMES[0])]
    for inner, outer in itertools.pairwise(NAMES):
        workers.append(await cluster.worker(through(cluster, inner, way), outer))
    return [each.instance_id for each in workers]


async def error_of(cluster: Cluster, name: str = NAMES[-1]) -> Any:
    with pytest.raises(RemoteError) as caught:
        await patiently(drained((await cluster.client(name)).generate(1)))
    return caught.value


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, as a program's log shows it."""
    formatter = logging.Formatter("%(message)s")
    return [formatter.format(each) for each in caplog.records if each.levelno >= logging.WARNING]


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.any_loop
@pytest.mark.parametrize("way", WAYS)
async def test_three_hops_tell_it_once(way: Any, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    ids = await chain(cluster, way)
    error = await error_of(cluster)
    assert isinstance(error, Deep)
    assert isinstance(error, RemoteError)
    hops = error.remote.hops
    assert [instance for instance, _ in hops] == ids
    first, *others = reports(caplog)
    assert f"request {hops[0][1]}: the handler raised\n" in first
    assert "raise Deep(" in first
    assert first.splitlines()[-1].endswith("Deep: here it arose")
    assert PACKAGE not in first, "the runtime's own frames"
    assert len(others) == 2
    for line, hop in zip(others, hops[1:], strict=True):
        assert "\n" not in line
        origin = f"instance {hops[0][0]}, request {hops[0][1]}: Deep: here it arose"
        assert f"request {hop[1]}: the handler passed on an error of {origin}" in line

    text = shown(error)
    assert text.count("raise Deep(") == 1
    assert text.count("In instance") == 1
    assert text.count("Passed on by instance") == 2
    for hop in hops[1:]:
        assert f"Passed on by instance {hop[0]}, request {hop[1]}." in text
    assert PACKAGE not in error.remote_traceback
    assert error.remote_traceback.startswith("Traceback (most recent call last):\n")
    assert "in arises" in error.remote_traceback


async def test_a_plain_handler_in_between(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()

    def plain(request: Any) -> Any:
        async def ask() -> None:
            await (await cluster.client(NAMES[0])).call(request)

        return asyncio.run_coroutine_threadsafe(ask(), loop).result()

    await cluster.worker(arises, NAMES[0])
    await cluster.worker(plain, NAMES[1])
    error = await error_of(cluster, NAMES[1])
    assert len(error.remote.hops) == 2
    assert shown(error).count("raise Deep(") == 1
    assert [text.count("raise Deep(") for text in reports(caplog)] == [1, 0]


async def raises_from(client: Client, request: Any) -> None:
    try:
        await client.call(request)
    except Deep as error:
        raise LookupError("another, from it") from error


async def raises_meanwhile(client: Client, request: Any) -> None:
    try:
        await client.call(request)
    except Deep:
        raise LookupError("another, from it")  # noqa: B904 - the context is what is tested


@pytest.mark.parametrize("way", [raises_from, raises_meanwhile])
async def test_an_error_raised_from_one_that_arrived_tells_both_once(
    way: Any, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    one = await cluster.worker(arises, NAMES[0])
    two = await cluster.worker(through(cluster, NAMES[0], way), NAMES[1])
    three = await cluster.worker(through(cluster, NAMES[1], calls), NAMES[2])
    error = await error_of(cluster)
    assert isinstance(error, LookupError)
    assert not isinstance(error, Deep)
    assert isinstance(error, RemoteError)
    assert [instance for instance, _ in error.remote.hops] == [two.instance_id, three.instance_id]
    origin, own, between = reports(caplog)
    assert "\n" not in between
    assert origin.count("raise Deep(") == 1
    for text in (own, error.remote_traceback, shown(error)):
        assert text.count("raise Deep(") == 1
        assert text.count("raise LookupError(") == 1
        assert text.count(f"In instance {one.instance_id}, request") == 1
    assert PACKAGE not in error.remote_traceback
    assert PACKAGE not in own


async def test_an_error_that_arrives_while_another_is_handled_tells_of_it(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The first would be told nowhere, since it is raised no further."""

    async def handler(request: Any) -> None:
        try:
            raise LookupError("an error of its own")
        except LookupError:
            await (await cluster.client(NAMES[0])).call(request)

    await cluster.worker(arises, NAMES[0])
    await cluster.worker(handler, NAMES[1])
    error = await error_of(cluster, NAMES[1])
    assert isinstance(error, Deep)
    assert isinstance(error, RemoteError)
    for text in (reports(caplog)[1], error.remote_traceback):
        assert text.count("raise LookupError(") == 1
        assert text.count("raise Deep(") == 1


async def test_parts_of_a_group_are_told_once_each(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> None:
        client = await cluster.client(NAMES[0])

        async def own() -> None:
            raise LookupError("of the group's own worker")

        async with asyncio.TaskGroup() as group:
            group.create_task(streams(client, 1))
            group.create_task(own())

    async def slow(request: Any) -> AsyncIterator[int]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise Deep("here it arose") from None
        yield 1

    await cluster.worker(slow, NAMES[0])
    await cluster.worker(handler, NAMES[1])
    await cluster.worker(through(cluster, NAMES[1], calls), NAMES[2])
    error = await error_of(cluster)
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, RemoteError)
    text = shown(error)
    for each in ("raise LookupError(", "group.create_task(own())"):
        assert text.count(each) <= 1, text
    assert text.count("raise LookupError(") == 1
    assert error.remote_traceback.count("raise LookupError(") == 1
    part = next(each for each in error.exceptions if isinstance(each, LookupError))
    assert isinstance(part, RemoteError)
    assert "raise LookupError(" in part.remote_traceback
    assert PACKAGE not in error.remote_traceback


async def test_a_cause_that_parts_share_is_told_once(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> None:
        try:
            await (await cluster.client(NAMES[0])).call(request)
        except Deep as error:
            parts = []
            for name in ("first", "second"):
                try:
                    raise LookupError(name) from error
                except LookupError as part:
                    parts.append(part)
            raise ExceptionGroup("both", parts) from None

    await cluster.worker(arises, NAMES[0])
    await cluster.worker(handler, NAMES[1])
    error = await error_of(cluster, NAMES[1])
    for text in (error.remote_traceback, shown(error), reports(caplog)[1]):
        assert text.count("raise Deep(") == 1
        assert text.count("LookupError: first") >= 1
        assert text.count("LookupError: second") >= 1


def plain_function(request: Any) -> None:
    raise Deep("here it arose")


def plain_generator(request: Any) -> Iterator[int]:
    yield 1
    raise Deep("here it arose")


async def coroutine(request: Any) -> None:
    raise Deep("here it arose")


@pytest.mark.parametrize("handler", [arises, coroutine, plain_function, plain_generator])
async def test_the_runtimes_own_frames_are_hidden_unless_they_are_wanted(
    handler: Any, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.serve(cluster.runtime(), handler, "t.c.hidden")
    await cluster.serve(cluster.runtime(full_tracebacks=True), handler, "t.c.full")
    hidden, full = await error_of(cluster, "t.c.hidden"), await error_of(cluster, "t.c.full")
    told = reports(caplog)
    for text in (hidden.remote_traceback, told[0]):
        assert PACKAGE not in text
        assert handler.__name__ in text
    for text in (full.remote_traceback, told[1]):
        assert PACKAGE in text or COMPILED in text
        assert handler.__name__ in text


async def test_an_error_without_frames_of_the_user_is_its_last_line(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> int:
        return "no int"  # type: ignore[return-value]

    await cluster.worker(handler)
    error = await error_of(cluster, "t.c.e")
    assert "Traceback" not in error.remote_traceback
    assert error.remote_traceback.splitlines()[-1].startswith("TypeError: response: Expected `int`")
    assert "Traceback" not in reports(caplog)[0]


async def test_what_is_no_exception_is_told_like_one(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        raise SystemExit("enough")

    runtime = cluster.runtime()
    runtime.worker._exit_wanted = lambda error: None  # type: ignore[method-assign]
    await cluster.serve(runtime, handler)
    error = await error_of(cluster, "t.c.e")
    assert (error.type_name, error.message) == ("SystemExit", "enough")
    assert not isinstance(error, SystemExit)
    assert "raise SystemExit(" in error.remote_traceback
    assert "raise SystemExit(" in reports(caplog)[0]


async def test_a_log_record_has_the_exception_for_programs_that_look_at_it(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.worker(arises)
    await error_of(cluster, "t.c.e")
    record = next(each for each in caplog.records if each.levelno == logging.WARNING)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], Deep)
    assert record.funcName == "report"
