"""Slips are found when a function is decorated, and the text says what helps."""

from __future__ import annotations

import collections.abc
import functools
import typing
from typing import Any

import pytest

import triton_distributed as trd
from triton_distributed.runtime import Context


def answer(requests: list[int]) -> list[int]:
    return requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_size": 0}, "max_size=0: must be a whole number from 1 to 100,000"),
        ({"max_size": 2.0}, "max_size=2.0"),
        ({"max_size": True}, "max_size=True"),
        ({"max_batches": 0}, "max_batches=0: must be a whole number"),
        ({"max_wait_s": -1}, "max_wait_s=-1: must be a number of seconds of at least 0"),
        ({"max_wait_s": float("inf")}, "max_wait_s=inf"),
        ({"max_wait_s": "5ms"}, "max_wait_s='5ms'"),
        ({"preferred_sizes": [64]}, r"preferred_sizes=\[64\]: each must be from 1 to max_size=32"),
        ({"preferred_sizes": [0]}, r"preferred_sizes=\[0\]"),
        ({"preferred_sizes": 5}, "preferred_sizes=5: must be a list of sizes"),
        ({"policies": [3]}, r"policies=\[3\]: must be a mapping of priorities to QueuePolicy"),
        ({"priority": 3}, r"priority=3: must be a function \(request, context\) -> int"),
        ({"policy": 3}, "policy= must be a QueuePolicy"),
        ({"policies": {"high": trd.QueuePolicy()}}, "policies= a mapping of priorities"),
        ({"policies": {1: None}}, "policies= a mapping of priorities"),
        ({"keep_order": True, "priority": lambda request, context: 0}, "keep_order=True: priority= and policies="),
        ({"keep_order": True, "policies": {1: trd.QueuePolicy()}}, "keep_order=True: priority= and policies="),
        (
            {"keep_order": True, "policy": trd.QueuePolicy(timeout_s=1, on_timeout="delay")},
            "keep_order=True: a policy with on_timeout='delay' would change the order",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_is_not_valid_is_named(options: dict[str, Any], words: str):
    with pytest.raises((TypeError, ValueError), match=words):
        trd.batched(**options)
    with pytest.raises((TypeError, ValueError), match=words):
        trd.batched_arrays(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_waiting": 0}, "max_waiting=0: must be a whole number"),
        ({"timeout_s": 0}, "timeout_s=0: must be a number of seconds above 0"),
        ({"on_timeout": "drop"}, "on_timeout='drop': must be 'reject' or 'delay'"),
        ({"allow_override": 1}, "allow_override=1: must be True or False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_policy_that_is_not_valid_is_refused(options: dict[str, Any], words: str):
    with pytest.raises((TypeError, ValueError), match=words):
        trd.QueuePolicy(**options)


def test_the_options_of_arrays():
    with pytest.raises(ValueError, match="max_length=-1: must be a whole number of at least 0, or None"):
        trd.batched_arrays(max_length=-1)


def no_parameter() -> list[int]:
    return []


def another_second(requests: list[int], ctxs: list[Context]) -> list[int]:
    return []


def keyword_only(*, requests: list[int]) -> list[int]:
    return []


def generator(requests: list[int]) -> collections.abc.Iterator[int]:
    yield 1


def one_request(requests: int) -> list[int]:
    return []


def one_answer(requests: list[int]) -> int:
    return 1


def fixed_answers(requests: list[int]) -> tuple[int, str]:
    return 1, ""


def unknown_name(requests: list[Nothing]) -> list[int]:  # type: ignore[name-defined]  # noqa: F821
    return []


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (3, "batched decorates a function, not int: 3"),
        (no_parameter, r"no_parameter has the parameters \(\): a batch function takes the requests and optionally"),
        (another_second, r"another_second has the parameters .*`contexts`; a method has `self` before them"),
        (keyword_only, "keyword_only has the parameters"),
        (generator, "generator is a generator: a batch function returns a list of answers"),
        (one_request, r"batched: one_request: its requests are annotated with int: must be list\[Request\]"),
        (one_answer, r"batched: one_answer: its return value is annotated with int: must be list\[Answer\]"),
        (fixed_answers, r"its return value is annotated with tuple\[int, str\]"),
        (unknown_name, "unknown_name: `requests` is annotated with .*Nothing.*, which cannot be resolved"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_function_that_does_not_fit_is_named(function: Any, words: str):
    with pytest.raises(TypeError, match=words):
        trd.batched(function)


def test_a_function_of_arrays_takes_the_lengths():
    with pytest.raises(
        TypeError, match=r"batched_arrays: answer has the parameters .*takes the requests and `lengths`"
    ):
        trd.batched_arrays(answer)  # type: ignore[arg-type]


class CallableObject:
    async def __call__(self, requests: collections.abc.Sequence[str]) -> tuple[float | LookupError, ...]:
        return (1.0,) * len(requests)


def untyped(requests):
    return requests


def quoted(requests: "list[int]") -> "list[typing.Annotated[str, 'named']]":  # noqa: UP037
    return ["a"] * len(requests)


def only_errors(requests: list[Any]) -> list[Exception]:
    return [ValueError()] * len(requests)


@pytest.mark.parametrize(
    ("function", "request_", "answer_"),
    [
        (answer, int, int),
        (functools.partial(answer), int, int),
        (CallableObject(), str, float),
        (untyped, Any, Any),
        (quoted, int, typing.Annotated[str, "named"]),
        (only_errors, Any, Exception),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_the_handler_has_the_types_of_one_request(function: Any, request_: Any, answer_: Any):
    handler = trd.batched(max_wait_s=0)(function)
    assert handler.__annotations__["request"] == request_
    assert handler.__annotations__["return"] == answer_
    assert not hasattr(handler, "__wrapped__")  # Checks would read the types of the list from it.
    assert handler.function is function


def test_a_contract_is_compared_with_the_types_of_one_request():
    with pytest.raises(TypeError, match="its parameter `request` is int, not str"):
        trd.serve(trd.Unary[str, int]("a.b.c"))(trd.batched(answer))  # type: ignore[arg-type]


@pytest.mark.parametrize("decorator", [trd.batched, trd.batched_arrays])
def test_a_misspelt_option_names_the_one_that_was_meant(decorator: Any) -> None:
    words = rf"{decorator.__name__}\(\) got an unexpected keyword argument 'max_wait'; did you mean 'max_wait_s'\?"
    with pytest.raises(TypeError, match=words):
        decorator(max_wait=0.1)
