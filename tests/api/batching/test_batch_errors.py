"""Errors of a batch: of one request, of all of them, and results that are no answers."""

from __future__ import annotations

import asyncio
import gc
import traceback
import weakref
from typing import Any

import pytest

from tests.api.batching.model import each, virtually
from triton_distributed.api.batching import batched
from triton_distributed.api.batching.copies import own_copy


def test_an_exception_in_place_of_an_answer_fails_only_that_request():
    async def program() -> None:
        same = KeyError("twice")

        @batched()
        async def embed(requests: list[int]) -> list[int | Exception]:
            return [same if each % 2 else each for each in requests]

        answers = await each(*(embed(number) for number in range(4)))
        assert answers[0::2] == [0, 2]
        assert [repr(answer) for answer in answers[1::2]] == ["KeyError('twice')"] * 2
        assert answers[1] is not answers[3]

    virtually(program())


class Refused(Exception):
    """An error whose `__init__` does not take its own `args`."""

    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"refused with {code}")
        self.code, self.place = code, place


def test_each_caller_gets_its_own_copy_of_an_error_of_the_batch():
    async def program() -> None:
        @batched()
        async def embed(requests: list[int]) -> list[int]:
            error = Refused(7, place="here")
            error.add_note("a note")
            raise error from ValueError("because")

        errors = await each(*(embed(number) for number in range(3)))
        assert len({id(error) for error in errors}) == 3
        for error in errors:
            assert (type(error), str(error), error.code, error.place) == (Refused, "refused with 7", 7, "here")
            assert error.__notes__ == ["a note"]
            assert repr(error.__cause__) == "ValueError('because')"
            entries = [each.name for each in traceback.extract_tb(error.__traceback__)]
            assert entries.count("answer") == 1
            assert entries[-1] == "embed"

    virtually(program())


class Noticed(Exception):
    """An error that can be referred to weakly."""


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_an_error_does_not_wait_for_the_collector(plain):
    async def program() -> None:
        made: list[weakref.ref[Noticed]] = []

        def noticed() -> Noticed:
            error = Noticed()
            made.append(weakref.ref(error))
            return error

        def fail(requests: list[int]) -> list[int | Exception]:
            if requests[0]:
                raise noticed()
            return [noticed(), 1]

        async def fail_on_loop(requests: list[int]) -> list[int | Exception]:
            return fail(requests)

        embed = batched(max_size=2)(fail) if plain else batched(max_size=2)(fail_on_loop)
        for number in range(2):
            errors = await each(embed(number), embed(number))
            assert isinstance(errors[0], Noticed)
            del errors
        await asyncio.sleep(0)  # The task of the batch ends after its callers have their answers.
        assert len(made) == 2
        assert [ref() for ref in made] == [None, None]

    gc.disable()
    try:
        virtually(program())
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        ExceptionGroup("several", [ValueError("one")]),
        SystemExit(3),
        AttributeError("no", name="field"),
        MemoryError("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_built_in_errors_are_copied_whole(error: BaseException):
    made = own_copy(error)
    assert made is not error
    assert (type(made), str(made), made.args) == (type(error), str(error), error.args)
    for name in ("errno", "filename", "object", "exceptions", "code", "name"):
        assert getattr(made, name, None) == getattr(error, name, None)


class Stubborn(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name in ("args", "__dict__"):
            raise RuntimeError("not readable")
        return super().__getattribute__(name)


def test_an_error_that_cannot_be_copied_arrives_as_its_text():
    assert repr(own_copy(Stubborn("words"))) == "RuntimeError('Stubborn: words')"


@pytest.mark.parametrize(
    ("returned", "kind", "words"),
    [
        ([1, 2], ValueError, "embed returned 2 answers for a batch of 3 requests: it must return one answer"),
        ([], ValueError, "embed returned 0 answers for a batch of 3 requests"),
        ({1: 2}, TypeError, "embed returned a dict for a batch of 3 requests: it must return a list"),
        (None, TypeError, "embed returned a NoneType for a batch of 3 requests"),
        (7, TypeError, "embed returned an int for a batch of 3 requests"),
    ],
)
def test_each_caller_learns_of_a_result_that_is_no_answer(returned, kind, words):
    async def program() -> None:
        @batched()
        async def embed(requests: list[int]) -> Any:
            return returned

        for error in await each(*(embed(number) for number in range(3))):
            assert type(error) is kind
            assert words in str(error)

    virtually(program())


def test_a_function_that_cancels_itself_cancels_its_callers_only():
    async def program() -> None:
        @batched()
        async def embed(requests: list[int]) -> list[int]:
            if requests[0] == 0:
                raise asyncio.CancelledError
            return requests

        error, *_ = await each(embed(0))
        assert isinstance(error, asyncio.CancelledError)
        assert await embed(1) == 1

    virtually(program())
