"""`@trd.route` and `@trd.health_check`: what a program declares is on its status port."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import triton_distributed as trd
from tests.status.web import fetch
from triton_distributed.api.operating import add_declared
from triton_distributed.cli.target import Target

CONFIG = trd.Config(status_port=0, discovery="memory")


@trd.route("POST /module")
def at_module(body: Any) -> Any:
    return body


class Engine:
    def __init__(self) -> None:
        self.awake = True

    @trd.serve("t.c.e")
    async def generate(self, request: Any) -> Any:
        return request

    @trd.serve("t.c.double")
    async def double(self, request: Any) -> Any:
        return 2 * request

    @trd.route("POST /wake")
    @trd.route("POST /engine/wake")
    async def wake(self) -> str:
        self.awake = True
        answer: str = await trd.call("t.c.e", "awake")  # The connection that serves is here.
        return answer

    @trd.route("POST /sleep")
    def sleep(self) -> None:
        if not self.awake:
            raise trd.HttpError(409, "it sleeps already")
        self.awake = False

    @trd.health_check
    def is_awake(self) -> bool:
        return self.awake

    @trd.health_check(timeout_s=7)
    async def is_there(self) -> None:
        pass


async def test_methods_of_a_served_object_and_functions_of_its_module() -> None:
    async with trd.connect(CONFIG) as here:
        target = Target(f"{__name__}:Engine")
        handlers = [each for each, _ in target.declared(sys.modules[__name__])]
        add_declared(here, vars(sys.modules[__name__]), handlers)
        for each in handlers:
            await here.serve(each)
        port = here.runtime.status_port
        assert set(port.routes) == {
            ("POST", "/module"),
            ("POST", "/wake"),
            ("POST", "/engine/wake"),
            ("POST", "/sleep"),
        }
        assert [each.timeout_s for each in port.checks.values()] == [1.0, 7]
        url = port.url
        assert (await fetch(f"{url}/module", "POST", b"[1]")).json() == [1]
        assert (await fetch(f"{url}/sleep", "POST")).json() is None
        asleep = await fetch(f"{url}/health")
        assert (asleep.status, asleep.json()["reasons"]) == (503, ["health check Engine.is_awake: it returned False"])
        assert (await fetch(f"{url}/sleep", "POST")).status == 409
        assert (await fetch(f"{url}/wake", "POST")).json() == "awake"
        assert (await fetch(f"{url}/health")).status == 200


async def test_a_connection_takes_them_one_by_one() -> None:
    async def answer() -> Any:
        return await trd.call("t.c.double", 4)

    async with trd.connect(CONFIG) as here:
        await here.serve(Engine().double)
        here.route("GET /eight", answer)
        here.health_check(lambda: "too hot", timeout_s=2)
        assert (await fetch(f"{here.runtime.status_port.url}/eight")).json() == 8
        assert (await fetch(f"{here.runtime.status_port.url}/health")).status == 503


@pytest.mark.parametrize(
    ("declare", "error"),
    [
        (lambda: trd.route("sleep"), ValueError),
        (lambda: trd.route("POST /metrics"), ValueError),
        (lambda: trd.route("POST /a")(Engine), TypeError),
        (lambda: trd.health_check(timeout_s=0), ValueError),
        (lambda: trd.health_check(3), TypeError),  # type: ignore[call-overload]
    ],
)
def test_a_declaration_that_cannot_work_is_refused(declare: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        declare()


async def test_two_functions_with_one_route_are_refused() -> None:
    module = ModuleType("module")
    for name in ("one", "other"):
        setattr(module, name, trd.route("POST /same")(lambda: None))
    module.alias = module.one  # type: ignore[attr-defined]
    async with trd.connect(trd.Config(discovery="memory")) as here:
        with pytest.raises(ValueError, match="is taken by"):
            add_declared(here, vars(module), [])
