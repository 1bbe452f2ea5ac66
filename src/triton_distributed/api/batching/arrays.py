"""`batched_arrays`: arrays of different lengths become one padded array."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack, overload

from triton_distributed.api.batching.decorator import (
    Batched,
    BatchedMethod,
    BatchOptions,
    checked_options,
    handler,
    name_of,
)
from triton_distributed.api.batching.signature import read
from triton_distributed.serving.handlers import UnfitRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

InT = TypeVar("InT", bound="np.generic")
OutT = TypeVar("OutT", bound="np.generic")
SelfT = TypeVar("SelfT")


Arrays = Callable[["NDArray[InT]", "NDArray[np.intp]"], "NDArray[OutT] | Awaitable[NDArray[OutT]]"]
ArraysMethod = Callable[[SelfT, "NDArray[InT]", "NDArray[np.intp]"], "NDArray[OutT] | Awaitable[NDArray[OutT]]"]


class ArrayBatching(Protocol):
    """The decorator that `batched_arrays(…)` returns."""

    @overload
    def __call__(self, function: Arrays[InT, OutT], /) -> Batched[NDArray[InT], NDArray[OutT]]: ...
    @overload
    def __call__(
        self, function: ArraysMethod[SelfT, InT, OutT], /
    ) -> BatchedMethod[SelfT, NDArray[InT], NDArray[OutT]]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Decorate a function."""


@overload
def batched_arrays(function: Arrays[InT, OutT], /) -> Batched[NDArray[InT], NDArray[OutT]]: ...
@overload
def batched_arrays(
    function: ArraysMethod[SelfT, InT, OutT], /
) -> BatchedMethod[SelfT, NDArray[InT], NDArray[OutT]]: ...
@overload
def batched_arrays(
    *,
    pad: float = 0,
    cut: bool = False,
    max_length: int | None = None,
    **options: Unpack[BatchOptions],
) -> ArrayBatching: ...
def batched_arrays(
    function: Callable[..., Any] | None = None,
    /,
    *,
    pad: float = 0,
    cut: bool = False,
    max_length: int | None = None,
    **options: Unpack[BatchOptions],
) -> Any:
    """Decorate `def f(batch, lengths)` for requests that are NumPy arrays, async or plain, also a method.

    A request is an array of shape (n, …). The function gets `batch`, of shape (b, longest n, …), in which shorter
    arrays are padded at their end, and `lengths`, of shape (b,) and dtype intp, with each request's n. It returns an
    array of shape (b, …). Each caller gets a copy of its row. Requests of one batch whose dtypes or whose further axes
    differ are given to the function in several calls, one after another.

    Args:
        pad: the value after the end of shorter arrays.
        cut: the second axis of the result is that of the batch, and each caller gets only the first n of it.
        max_length: the largest n. Longer requests are invalid. None for no limit: then one long request makes the
            arrays of its whole batch long.
        options: see `BatchOptions`.

    Further errors: see `batched`.

    Raises (from the handler):
        InvalidRequest: the request is not an array with at least one axis, its dtype is not that of the function's
            annotation, or it is longer than `max_length`.
        TypeError, ValueError: the function has not returned an array of the right shape.
    """
    checked = checked_options("batched_arrays", options, ("pad", "cut", "max_length"))
    if max_length is not None and (type(max_length) is not int or max_length < 0):
        raise ValueError(f"max_length={max_length!r}: must be a whole number of at least 0, or None")

    def decorate(function: Callable[..., Any]) -> Any:
        np = _numpy()
        signature = read(function, "batched_arrays", "lengths", needed=True)
        unknown = inspect.Parameter.empty
        types = tuple(np.ndarray if each is unknown else each for each in (signature.batch, signature.answers))
        padding = _Padding(name_of(function), pad, cut, max_length, _dtype(signature.batch))
        call = padding.on_loop(function) if signature.on_loop else padding.in_thread(function)
        return handler(
            function, call, signature, (types[0], types[1]), checked, takes_contexts=False, check=padding.check
        )

    return decorate if function is None else decorate(function)


class _Padding:
    """Makes one array of several, and several of one.

    Args:
        name: the function's name, for errors.
        pad, cut, max_length: see `batched_arrays`.
        dtype: the scalar type of the function's annotation; None if it names none.
    """

    def __init__(self, name: str, pad: float, cut: bool, max_length: int | None, dtype: Any) -> None:
        self._name, self._pad, self._cut, self._max_length, self._dtype = name, pad, cut, max_length, dtype

    def check(self, request: Any) -> None:
        """Raise UnfitRequest if a request may not join a batch."""
        np = sys.modules["numpy"]
        if not isinstance(request, np.ndarray):
            raise UnfitRequest("", f"it is {type(request).__name__}, and {self._name} takes a NumPy array")
        if not request.ndim:
            raise UnfitRequest("", f"its array has no axis, and {self._name} takes arrays of shape (n, …)")
        if self._dtype is not None and not issubclass(request.dtype.type, self._dtype):
            raise UnfitRequest("", f"its dtype is {request.dtype}, and {self._name} takes {self._dtype.__name__}")
        if self._max_length is not None and len(request) > self._max_length:
            raise UnfitRequest("", f"its length is {len(request):,}, above max_length={self._max_length:,}")

    def in_thread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that a thread calls with the list of arrays."""

        def call(*arguments: Any) -> list[Any]:
            *instance, arrays = arguments
            answers: list[Any] = [None] * len(arrays)
            for rows in _alike(arrays):
                batch, lengths = self._stacked([arrays[row] for row in rows])
                self._split(function(*instance, batch, lengths), lengths, batch.shape, rows, answers)
            return answers

        return call

    def on_loop(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same for an async function."""

        async def call(*arguments: Any) -> list[Any]:
            *instance, arrays = arguments
            answers: list[Any] = [None] * len(arrays)
            for rows in _alike(arrays):
                batch, lengths = self._stacked([arrays[row] for row in rows])
                self._split(await function(*instance, batch, lengths), lengths, batch.shape, rows, answers)
            return answers

        return call

    def _stacked(self, arrays: list[Any]) -> tuple[Any, Any]:
        np = sys.modules["numpy"]
        lengths = np.fromiter(map(len, arrays), np.intp, len(arrays))
        shape = (len(arrays), int(lengths.max()), *arrays[0].shape[1:])
        batch = (
            np.full(shape, self._pad, arrays[0].dtype)
            if (lengths != shape[1]).any()
            else np.empty(shape, arrays[0].dtype)
        )
        for row, array in enumerate(arrays):
            batch[row, : len(array)] = array
        return batch, lengths

    def _split(self, result: Any, lengths: Any, shape: tuple[int, ...], rows: list[int], answers: list[Any]) -> None:
        """Copy the rows of a result. A view would keep the whole result alive until the slowest caller has read its
        row, and would change with it if the function uses the memory again."""
        np = sys.modules["numpy"]
        if not isinstance(result, np.ndarray):
            raise TypeError(
                f"{self._name} returned {type(result).__name__} for a batch of {len(rows)} arrays: "
                "it must return an array with a row for each"
            )
        fits = result.shape[:2] == shape[:2] if self._cut else result.shape[:1] == shape[:1]
        if not fits:
            expected = f"({shape[0]}, {shape[1]}, …), because of cut=True" if self._cut else f"({shape[0]}, …)"
            raise ValueError(f"{self._name} returned an array of shape {result.shape}: the shape must be {expected}")
        for number, row in enumerate(rows):
            answers[row] = (result[number, : lengths[number]] if self._cut else result[number, ...]).copy()


def _alike(arrays: list[Any]) -> list[list[int]]:
    """The indices of the arrays that can be stacked, for each kind, in their order."""
    kinds: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        kinds.setdefault((array.dtype, array.shape[1:]), []).append(index)
    return list(kinds.values())


def _dtype(hint: Any) -> Any:
    """The scalar type in the annotation of an array, e.g. numpy.float32; None if the annotation names no type."""
    # `NDArray[float32]` is an alias whose argument is the type itself, or an array whose dtype has it as an argument.
    for each in typing.get_args(hint):
        for kind in (each, *typing.get_args(each)):
            if isinstance(kind, type) and issubclass(kind, sys.modules["numpy"].generic):
                return kind
    return None


@functools.cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError("batched_arrays needs NumPy: pip install 'triton-distributed[numpy]'") from error
    return numpy
