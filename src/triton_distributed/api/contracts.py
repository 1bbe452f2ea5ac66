"""Contracts: an endpoint's name and types, as a value that workers and clients share."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, ForwardRef, Generic, TypeVar, final, get_args

from triton_distributed.api.schema import described
from triton_distributed.errors import TritonError
from triton_distributed.names import EndpointName
from triton_distributed.serving.signatures import Types

logger = logging.getLogger("triton_distributed.runtime")

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")

MAX_SCHEMA_BYTES = 16 * 1024
"""The largest schema that a worker publishes, in bytes of JSON. A larger one is not compared."""


class Contract(Generic[RequestT, AnswerT]):
    """An endpoint's name and types. Use `Unary`, `Stream` or `Bidirectional`. Two with the same parts are equal.

    Args:
        name: the endpoint, `namespace.component.endpoint`.

    Attributes:
        name: the endpoint's name.
        kind: `unary`, `stream` or `bidirectional`.

    Raises:
        InvalidName: the name does not have exactly three valid parts.
    """

    kind: ClassVar[str] = ""

    def __init__(self, name: str) -> None:
        if type(self) not in (Unary, Stream, Bidirectional):
            raise TypeError(
                "a contract is a trd.Unary, a trd.Stream or a trd.Bidirectional, and not of a subclass: write "
                f'{type(self).__name__.upper()} = trd.Unary[Request, Answer]("{name}")'
            )
        self.name = EndpointName.parse(name)
        self._hash = hash((self.kind, self.name))

    # `Unary[A, B](…)` sets `__orig_class__` after `__init__`, so the types are read when they are first needed.

    @functools.cached_property
    def types(self) -> Types:
        """The types of the request and of the answer, or of their items.

        Raises:
            TypeError: the contract was made without types, or a type is only a text.
        """
        kind = type(self).__name__
        given = get_args(getattr(self, "__orig_class__", None))
        if not given:
            raise TypeError(
                f'trd.{kind}("{self.name}") has no types: write trd.{kind}[Request, Answer]("{self.name}"). An '
                "annotation of the variable does not give them. For values of any type use the name alone"
            )
        request, answer = given
        for each in given:
            if isinstance(each, ForwardRef):
                text = each.__forward_arg__
                raise TypeError(
                    f'trd.{kind}[…]("{self.name}") has the type "{text}" as text: write {text} without quotes, after '
                    "the definition of the class"
                )
        return Types(request, answer, self.kind == "bidirectional")

    @functools.cached_property
    def schema(self) -> Mapping[str, Any] | None:
        """The contract's schema as plain JSON values; None if it is too large to publish."""
        request, answer, _ = self.types
        found = {"kind": self.kind, **described(request, answer)}
        if len(json.dumps(found)) <= MAX_SCHEMA_BYTES:
            return found
        logger.info("%r: its schema is above %d bytes and is not compared with that of callers", self, MAX_SCHEMA_BYTES)
        return None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contract) and type(self) is type(other) and self._parts == other._parts

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr(self, "__orig_class__", type(self)), (str(self.name),)  # Hashes differ between processes.

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.name, self.types

    def __repr__(self) -> str:
        types = ", ".join(map(_short, get_args(getattr(self, "__orig_class__", None))))
        return f'{type(self).__name__}[{types or "…"}]("{self.name}")'


@final
class Unary(Contract[RequestT, AnswerT]):
    """The contract of an endpoint that answers a request with one value: `Unary[Request, Answer]("ns.comp.ep")`."""

    kind = "unary"


@final
class Stream(Contract[RequestT, AnswerT]):
    """The contract of an endpoint that answers a request with a stream: `Stream[Request, Item]("ns.comp.ep")`."""

    kind = "stream"


@final
class Bidirectional(Contract[RequestT, AnswerT]):
    """The contract of an endpoint that takes and answers with streams: `Bidirectional[Item, Item]("ns.comp.ep")`."""

    kind = "bidirectional"


class ContractMismatch(TritonError, TypeError):
    """The worker and the caller have contracts that do not fit.

    Fields: `endpoint` (its path), `instance_id`, `differences` (a text for each).
    """

    def __init__(self, endpoint: str, instance_id: int, differences: Sequence[str]) -> None:
        super().__init__(endpoint, instance_id, tuple(differences))
        self.endpoint, self.instance_id, self.differences = endpoint, instance_id, tuple(differences)

    def __str__(self) -> str:
        found = "".join(f"\n  - {each}" for each in self.differences)
        return (
            f'endpoint "{self.endpoint}": the contract of this process does not fit that of instance '
            f"{self.instance_id}:{found}\nBoth must import the same contract, or versions of it that fit"
        )


def _short(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
