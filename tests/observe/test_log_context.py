"""Each line that a handler logs has its request, its endpoint and its instance."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import logging.handlers
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.runtime import Context, LogContext, log_requests

logger = logging.getLogger("tests.log_context")
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


class Lines(logging.Handler):
    """Keeps each record as text."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(request_id)s %(endpoint)s %(instance_id)s %(traceparent)s %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    made = Lines()
    log_requests(made)
    logger.addHandler(made)
    logger.setLevel(logging.INFO)
    yield made.lines
    logger.removeHandler(made)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


@pytest.mark.any_loop
async def test_every_kind_of_handler_is_named(cluster: Cluster, lines: list[str]) -> None:
    async def coroutine(request: Any) -> None:
        logger.info(request)

    async def stream(request: Any) -> AsyncIterator[int]:
        logger.info(request)
        yield 1

    def plain(request: Any) -> None:
        logger.info(request)

    def generator(request: Any) -> Iterator[int]:
        yield 1
        logger.info(request)

    handlers = {"coroutine": coroutine, "stream": stream, "plain": plain, "generator": generator}
    expected = []
    for name, handler in handlers.items():
        worker = await cluster.worker(handler, f"t.logs.{name}")
        client = await cluster.client(f"t.logs.{name}")
        await patiently(drained(client.generate("here", context=Context(f"of-{name}"))))
        expected.append(f"of-{name} t.logs.{name} {worker.instance_id} - here")
    assert lines == expected


async def test_tasks_and_threads_of_a_handler_are_named(cluster: Cluster, lines: list[str]) -> None:
    async def handler(request: Any, context: Context) -> None:
        await asyncio.create_task(log("task"))
        await asyncio.to_thread(logger.info, "thread")

    async def log(words: str) -> None:
        logger.info(words)

    worker = await cluster.worker(handler)
    context = Context("r", travelling={"traceparent": TRACE})
    await patiently((await cluster.client()).call(1, context=context))
    assert lines == [f"r t.c.e {worker.instance_id} {TRACE} {words}" for words in ("task", "thread")]


async def test_nested_calls_log_one_id_and_their_own_endpoints(cluster: Cluster, lines: list[str]) -> None:
    async def inner(request: Any) -> None:
        logger.info("inner")

    async def outer(request: Any) -> None:
        logger.info("outer")
        await (await cluster.client("t.c.inner")).call(1)
        logger.info("outer again")

    below = await cluster.worker(inner, "t.c.inner")
    above = await cluster.worker(outer)
    await patiently((await cluster.client()).call(1, context=Context("r")))
    assert lines == [
        f"r t.c.e {above.instance_id} - outer",
        f"r t.c.inner {below.instance_id} - inner",
        f"r t.c.e {above.instance_id} - outer again",
    ]


async def test_requests_that_run_at_once_keep_their_own(cluster: Cluster, lines: list[str]) -> None:
    together = asyncio.Barrier(10)

    async def handler(request: Any) -> None:
        await together.wait()
        logger.info(request)

    client = await cluster.connect(handler)
    await patiently(asyncio.gather(*[client.call(f"{n}", context=Context(f"r{n}")) for n in range(10)]))
    assert sorted(f"{line.split()[0]} {line.split()[-1]}" for line in lines) == [f"r{n} {n}" for n in range(10)]


def test_outside_of_handlers_there_is_a_dash(lines: list[str]) -> None:
    logger.info("outside")
    assert lines == ["- - - - outside"]


def test_fields_of_the_program_stay(lines: list[str]) -> None:
    logger.info("own", extra={"request_id": "mine"})
    assert lines == ["mine - - - own"]


async def test_a_queue_of_records_keeps_the_fields(cluster: Cluster) -> None:
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    entry, final = logging.handlers.QueueHandler(records), Lines()
    log_requests(entry)
    log_requests(final)
    logger.addHandler(entry)
    logger.setLevel(logging.INFO)
    try:

        async def handler(request: Any) -> None:
            logger.info("queued")

        worker = await cluster.worker(handler)
        await patiently((await cluster.client()).call(1, context=Context("r")))
        record = records.get_nowait()
        assert final.filter(record)
        final.emit(record)
    finally:
        logger.removeHandler(entry)
    assert final.lines == [f"r t.c.e {worker.instance_id} - queued"]


def test_a_logger_means_its_handlers_and_none_gets_two() -> None:
    above, below = logging.Logger("above"), Lines()
    above.addHandler(below)
    log_requests(above)
    log_requests(above)
    assert [type(each) for each in below.filters] == [LogContext]
    assert above.filters == []


def test_without_an_argument_it_is_the_root_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Lines()
    monkeypatch.setattr(logging.getLogger(), "handlers", [made])
    log_requests()
    assert [type(each) for each in made.filters] == [LogContext]


def test_a_configuration_may_name_the_class() -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"requests": {"()": "triton_distributed.runtime.LogContext"}},
            "handlers": {"out": {"class": "logging.NullHandler", "filters": ["requests"]}},
            "loggers": {"tests.log_context.configured": {"handlers": ["out"]}},
        }
    )
    [handler] = logging.getLogger("tests.log_context.configured").handlers
    assert [type(each) for each in handler.filters] == [LogContext]


def test_what_cannot_have_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="'bare' has no handlers: call it after logging.basicConfig"):
        log_requests(logging.Logger("bare"))
    with pytest.raises(TypeError, match="must be a logging.Handler"):
        log_requests("root")  # type: ignore[arg-type]
