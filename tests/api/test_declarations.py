"""`@serve`: the function stays as it is, and a handler that does not fit its contract is refused at import."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Generic, Protocol, TypedDict, TypeVar

import msgspec
import pydantic
import pytest

import triton_distributed as trd
from tests.api.contracts import EACH, MEASURE, TALK, Lengths, Texts, measure
from triton_distributed.api.declarations import declaration_of, declared_in

FLOATS = trd.Unary[float, float]("test.api.floats")


def test_a_declared_function_is_the_function_itself() -> None:
    def plain(request: Texts) -> Lengths:
        return Lengths([len(request.texts)])

    assert trd.serve(MEASURE, max_inflight=3)(plain) is plain
    declared = declaration_of(plain)
    assert declared is not None
    assert (declared.contract, declared.options) == (MEASURE, {"max_inflight": 3})
    assert plain(Texts(["a"])) == Lengths([1])
    assert asyncio.run(measure(Texts(["ab"]))) == Lengths([2])


def test_the_module_says_what_it_serves() -> None:
    from tests.api import contracts

    assert [each.__name__ for each in declared_in(vars(contracts))] == ["measure", "each", "maybe", "talk"]


async def fits_async(request: Texts) -> Lengths:
    raise NotImplementedError


def fits_plain(request: Texts, context: trd.Context) -> Lengths:
    raise NotImplementedError


def fits_base(request: object) -> Lengths:
    raise NotImplementedError


def fits_any(request: Any):
    raise NotImplementedError


def fits_nothing(request):
    raise NotImplementedError


async def fits_stream(request: Texts) -> AsyncIterator[Lengths]:
    yield Lengths([])


def fits_generator(request: Texts) -> Iterator[Lengths]:
    yield Lengths([])


async def fits_talk(request: AsyncIterator[Texts]) -> AsyncIterator[Lengths]:
    yield Lengths([])


def float_of_int(request: float) -> int:
    raise NotImplementedError


Positive = Annotated[int, msgspec.Meta(gt=0)]
Item = TypeVar("Item")


class HasTexts(Protocol):
    texts: list[str]


class Some(TypedDict):
    text: str


class More(TypedDict):
    text: str
    size: int


class Box(pydantic.BaseModel, Generic[Item]):
    item: Item


def fits_protocol(request: HasTexts) -> Lengths:
    raise NotImplementedError


def fits_bound(request: Positive) -> int:
    raise NotImplementedError


def fits_unbound(request: int) -> Positive:
    raise NotImplementedError


def fits_fewer_keys(request: Some) -> More:
    raise NotImplementedError


def fits_box(request: Box[int]) -> Box[int]:
    raise NotImplementedError


def fits_passed_on(request: Texts) -> trd.ItemStream[Lengths]:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("contract", "handler"),
    [
        (MEASURE, fits_async),
        (MEASURE, fits_plain),
        (MEASURE, fits_base),
        (MEASURE, fits_any),
        (MEASURE, fits_nothing),
        (EACH, fits_stream),
        (EACH, fits_generator),
        (TALK, fits_talk),
        (FLOATS, float_of_int),
        (MEASURE, fits_protocol),
        (trd.Unary[int, int]("a.b.c"), fits_bound),
        (trd.Unary[Positive, Positive]("a.b.c"), fits_unbound),
        (trd.Unary[More, Some]("a.b.c"), fits_fewer_keys),
        (trd.Unary[Box[Any], Box[Any]]("a.b.c"), fits_box),
        (EACH, fits_passed_on),
    ],
)
def test_fits(contract: Any, handler: Any) -> None:
    assert trd.serve(contract)(handler) is handler
    del handler.__trd_declared__


def wrong_request(request: Lengths) -> Lengths:
    raise NotImplementedError


def wrong_answer(request: Texts) -> Texts:
    raise NotImplementedError


def wrong_box(request: Box[int]) -> int:
    raise NotImplementedError


def wrong_item(request: list[int]) -> int:
    raise NotImplementedError


async def one_of_many(request: Texts) -> Lengths:
    raise NotImplementedError


async def not_a_stream(request: Texts) -> AsyncIterator[Lengths]:
    yield Lengths([])


@pytest.mark.parametrize(
    ("contract", "handler", "says"),
    [
        (MEASURE, wrong_request, "its parameter `request` is Lengths, not Texts"),
        (MEASURE, wrong_answer, "it answers with Texts, not Lengths"),
        (trd.Unary[list[str], int]("a.b.c"), wrong_item, r"its parameter `request` is list\[int\], not list\[str\]"),
        (trd.Unary[Box[str], int]("a.b.c"), wrong_box, r"its parameter `request` is Box\[int\], not Box\[str\]"),
        (MEASURE, fits_stream, "it makes a stream, and a unary endpoint answers with one value; use trd.Stream"),
        (MEASURE, fits_generator, "it makes a stream"),
        (EACH, one_of_many, "its return value is Lengths, not a stream of items; use trd.Unary"),
        (TALK, not_a_stream, "its parameter `request` takes one request; a bidirectional endpoint does not"),
        (EACH, fits_talk, "its parameter `request` takes a stream; a stream endpoint does not"),
    ],
)
def test_a_handler_that_does_not_fit_is_refused(contract: Any, handler: Any, says: str) -> None:
    with pytest.raises(TypeError, match=rf"handler {handler.__name__} does not fit .*: {says}"):
        trd.serve(contract)(handler)


class Embed(trd.Unary[Texts, Lengths]):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """Not how a contract is made."""


def test_a_contract_is_found_in_a_dict_of_another_process() -> None:
    program = (
        "import pickle, sys; from tests.api.contracts import MEASURE; "
        "print(pickle.loads(sys.stdin.buffer.read()) in {MEASURE: 1})"
    )
    sent = pickle.dumps(MEASURE)
    other = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    ended = subprocess.run([sys.executable, "-c", program], input=sent, env=other, capture_output=True, check=True)
    assert ended.stdout.split() == [b"True"]


serve: Any = trd.serve  # For slips that type checkers also find.


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        (lambda: serve(measure), "serve needs the endpoint"),
        (
            lambda: serve(MEASURE, max_inflght=3),
            "unexpected keyword argument 'max_inflght': the options are max_in",
        ),
        (lambda: trd.serve("a.b"), "the shorthand has three parts"),
        (lambda: trd.serve(MEASURE)(measure), "already serves test.api.measure"),
        (lambda: trd.serve("a.b.c")(Texts), "serve decorates a function or a method"),
        (lambda: trd.serve("a.b.c")([].append), "serve cannot mark .*, which takes no attributes.* use here.serve"),
        (lambda: trd.Contract("a.b.c"), r"a contract is a trd.Unary"),
        (lambda: Embed("a.b.c"), r"not of a subclass: write EMBED = trd.Unary\[Request, Answer\]\(\"a.b.c\"\)"),
        (lambda: serve(trd.Unary("a.b.c"))(fits_nothing), r"has no types: write trd.Unary\[Request, Answer\]\(\"a.b.c"),
        (lambda: trd.Stream["Texts", int]("a.b.c").types, r"has the type \"Texts\" as text: write Texts without"),
    ],
)
def test_slips_are_named(slip: Any, says: str) -> None:
    with pytest.raises((TypeError, trd.TritonError), match=says):
        slip()


def test_run_needs_a_declared_function() -> None:
    with pytest.raises(TypeError, match="is not declared: decorate it with @trd.serve"):
        trd.run(fits_plain)
    with pytest.raises(TypeError, match="found no declared function"):
        trd.run()


async def test_run_makes_its_own_loop() -> None:
    with pytest.raises(RuntimeError, match=r"run\(\) makes an event loop of its own, .*: use `await here.serve"):
        trd.run(measure)
