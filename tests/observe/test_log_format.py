"""The form of log lines: JSON and text."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from typing import Any

import pytest

from triton_distributed.context import Context
from triton_distributed.observe.log_context import LogContext
from triton_distributed.observe.log_format import log_formatter
from triton_distributed.testing import LocalCluster


def lines(form: str, log: Any) -> list[str]:
    """What a logger writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log_formatter(form))
    handler.addFilter(LogContext())
    logger = logging.Logger("shop")
    logger.addHandler(handler)
    log(logger)
    return stream.getvalue().splitlines()


def test_json_outside_of_handlers() -> None:
    def log(logger: logging.Logger) -> None:
        logger.warning("two\nlines %d", 7, extra={"model": "tiny", "object": object})

    (line,) = lines("json", log)
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "shop",
        "message": "two\nlines 7",
        "model": "tiny",
        "object": repr(object),
    }


def test_no_line_is_lost_or_misleading() -> None:
    def log(logger: logging.Logger) -> None:
        logger.info("cannot read \udcff", extra={"level": "debug", "time": 0, "odd": {1: object()}})

    (line,) = lines("json", log)
    found = json.loads(line)
    assert found["message"] == "cannot read \\udcff"
    assert (found["level"], found["time"][:2]) == ("info", "20")


def test_an_exception_is_one_field() -> None:
    def log(logger: logging.Logger) -> None:
        try:
            raise ValueError("no")
        except ValueError:
            logger.exception("failed")

    (line,) = lines("json", log)
    assert json.loads(line)["exception"].splitlines()[-1] == "ValueError: no"
    assert lines("text", log)[-1] == "ValueError: no"


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_handlers_lines_name_its_request(form: str) -> None:
    found: list[str] = []

    async def handler(request: Any) -> int:
        found.extend(lines(form, lambda logger: logger.info("looking up")))
        return 1

    async def main() -> None:
        async with LocalCluster() as cluster:
            worker = await cluster.worker("shop.api.price", handler)
            client = await cluster.client("shop.api.price")
            trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
            await client.call(1, context=Context("REQ-1", travelling={"traceparent": trace}))
            if form == "json":
                said = json.loads(found[0])
                assert said["request_id"] == "REQ-1"
                assert said["endpoint"] == "shop.api.price"
                assert said["instance_id"] == str(worker.instance_id)
                assert said["traceparent"] == trace
                assert (said["trace_id"], said["span_id"]) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
            else:
                assert found[0].endswith(" INFO shop: [REQ-1 trace 4bf92f3577b34da6a3ce929d0e0e4736] looking up")
            await client.call(1, context=Context("REQ-2"))
            assert found[1].endswith("[REQ-2] looking up") if form == "text" else "trace_id" not in found[1]

    asyncio.run(main())


def test_what_the_runtime_logs(caplog: pytest.LogCaptureFixture) -> None:
    """It says when an endpoint is served and when it ends, and how many calls a lost worker took with it."""

    async def forever(request: Any) -> Any:
        yield 1
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with LocalCluster() as cluster:
            worker = await cluster.worker("a.b.c", forever)
            client = await cluster.client("a.b.c")
            streams = [aiter(client.generate(each)) for each in range(2)]
            for each in streams:
                await anext(each)
            (session,) = worker.worker.server.sessions
            session.close("cut by the test")
            for each in streams:
                with pytest.raises(Exception, match="cut by the test|lost|closed"):
                    await anext(each)

    with caplog.at_level(logging.INFO, "triton_distributed"):
        asyncio.run(main())
    messages = [record.getMessage() for record in caplog.records]
    assert any(each.startswith("a.b.c: serving as instance ") for each in messages)
    assert any(each.startswith("a.b.c: not served any more") and each.endswith("requests: 2 lost") for each in messages)
    (lost,) = [record for record in caplog.records if "was lost with 2 call(s)" in record.getMessage()]
    assert lost.levelno == logging.WARNING
    assert sys.exc_info() == (None, None, None)
