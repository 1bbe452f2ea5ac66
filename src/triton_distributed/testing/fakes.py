"""Answers of endpoints without a worker: `trd_fake[EMBED].returns(answer)`.

The fake is served by a runtime in memory beside the caller, so encoding, checks, deadlines and cancellation are those
of a worker. Only an error that the runtime itself raises is raised at the caller, where its own place would be.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, overload

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Contract
from triton_distributed.api.fit import check_handler
from triton_distributed.api.targets import Target
from triton_distributed.calling.items import ItemDecoder
from triton_distributed.context import Context
from triton_distributed.errors import RemoteError, TritonError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.payload.typed import typed_checker
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import Policy
from triton_distributed.runtime.client import Client

R = TypeVar("R")
A = TypeVar("A")


class UnexpectedCall(AssertionError):
    """The program has called an endpoint that has no answer in this test. Fields: `endpoint` (its name), `known`."""

    def __init__(self, endpoint: str, known: tuple[str, ...] = ()) -> None:
        super().__init__(endpoint, known)
        self.endpoint, self.known = endpoint, known

    def __str__(self) -> str:
        return (
            f'unexpected call of "{self.endpoint}": the test has no answer for it. Say one, e.g. with '
            f"trd_fake[CONTRACT].returns(…); faked endpoints: {', '.join(self.known) or 'none'}"
        )


class Answer(NamedTuple):
    """One answer.

    Attributes:
        items: the items, in order.
        error: raised after them; None for no error.
        function: answers instead of the items.
    """

    items: tuple[Any, ...] = ()
    error: BaseException | None = None
    function: Callable[..., Any] | None = None

    @property
    def error_of_caller(self) -> TritonError | None:
        """The error, if the runtime of the caller raises it and not a handler."""
        error = self.error
        return error if isinstance(error, TritonError) and not isinstance(error, RemoteError) else None


class Fake:
    """The fakes of one test: `fake[CONTRACT]` is the fake of an endpoint; see `FakeEndpoint`.

    Attributes:
        problems: what fails the test: unexpected calls, and answers that do not fit their contract.
        listeners: called when an endpoint is faked.
    """

    def __init__(self) -> None:
        self._endpoints: dict[EndpointName, FakeEndpoint[Any, Any]] = {}
        self.problems: list[str] = []
        self.listeners: list[Callable[[], None]] = []

    @overload
    def __getitem__(self, endpoint: Contract[R, A]) -> FakeEndpoint[R, A]: ...
    @overload
    def __getitem__(self, endpoint: str) -> FakeEndpoint[Any, Any]: ...

    def __getitem__(self, endpoint: Any) -> FakeEndpoint[Any, Any]:
        contract = endpoint if isinstance(endpoint, Contract) else None
        name = EndpointName.parse(endpoint) if contract is None else contract.name
        found = self._endpoints.get(name)
        if found is None:
            found = self._endpoints[name] = FakeEndpoint(self, name, contract)
            self.changed()
        elif contract is not None and found.contract != contract:
            raise TypeError(
                f"trd_fake: {name} is faked as {found.contract or 'a name without types'}, not {contract!r}"
            )
        return found

    def __contains__(self, name: EndpointName) -> bool:
        return name in self._endpoints

    def changed(self) -> None:
        """Tell the connections that other endpoints are faked now."""
        for each in self.listeners:
            each()

    def expected(self, name: EndpointName) -> FakeEndpoint[Any, Any]:
        """The fake of an endpoint that is called.

        Raises:
            UnexpectedCall: the test gave no answer.
        """
        found = self._endpoints.get(name)
        if found is None:
            raise self.unexpected(name)
        return found

    def unexpected(self, name: EndpointName) -> UnexpectedCall:
        """The error of a call for which there is no answer. It fails the test, even if the program catches it."""
        known = tuple(sorted(map(str, self._endpoints)))
        error = UnexpectedCall(str(name), known)
        self.problems.append(str(error))
        return error

    def __repr__(self) -> str:
        return f"<Fake of {len(self._endpoints)} endpoints>"


class Answers(Generic[R, A]):
    """Answers that are given in order; the last one is given to all further calls. Each method adds one."""

    def __init__(self, endpoint: FakeEndpoint[R, A]) -> None:
        self._endpoint = endpoint

    def returns(self, value: A) -> Answers[R, A]:
        """Answer with one value.

        Raises:
            TypeError: the value does not fit the contract, or the endpoint is not unary.
        """
        if self._endpoint.streams:
            raise TypeError(f"{self._endpoint}.returns(): {self._endpoint.contract!r} answers with items: use yields()")
        return self._add(Answer((self._endpoint.fit(value),)))

    def yields(self, *items: A, raises: Exception | None = None) -> Answers[R, A]:
        """Answer with items.

        Args:
            items: the items, in order.
            raises: an error that the handler raises after them.

        Raises:
            TypeError: an item does not fit the contract, the endpoint is unary, or no handler can raise the error.
        """
        if self._endpoint.unary:
            raise TypeError(f"{self._endpoint}.yields(): {self._endpoint.contract!r} answers once: use returns()")
        answer = Answer(tuple(map(self._endpoint.fit, items)), None if raises is None else _error(raises))
        if items and answer.error_of_caller is not None:
            raise TypeError(
                f"{self._endpoint}.yields(): no handler raises {type(raises).__name__}. To break a stream after its "
                "first items, serve it with `worker = await trd.worker()` and call `await worker.kill()`"
            )
        return self._add(answer)

    def raises(self, error: Exception) -> Answers[R, A]:
        """Answer with an error: one of this package, such as `Overloaded`, or one that a handler raises.

        Raises:
            TypeError: it is not an exception.
        """
        return self._add(Answer(error=_error(error)))

    def answers(self, function: Callable[..., Any]) -> Answers[R, A]:
        """Answer with what a function makes of the request.

        Args:
            function: as a handler: plain or async, a function or a generator, with the request and optionally the
                context. A plain one runs on the loop of the caller.

        Raises:
            TypeError: the function does not fit the contract.
        """
        if not callable(function):
            raise TypeError(f"{self._endpoint}.answers() takes a function, not {function!r}: use returns()")
        if self._endpoint.contract is not None:
            check_handler(function, self._endpoint.contract)
        return self._add(Answer(function=function))

    def _add(self, answer: Answer) -> Answers[R, A]:
        self._endpoint.queue.append(answer)
        return Answers(self._endpoint)


class FakeEndpoint(Answers[R, A]):
    """The fake of one endpoint. Each statement replaces the answers before; a chain gives several in order.

        trd_fake[EMBED].raises(Overloaded(…)).returns(answer)  # first the error, then always the answer

    Attributes:
        contract: its contract; None if the test gave only a name.
        requests: the requests that it got, in order, of the contract's type. Of a stream of requests, each one.
    """

    def __init__(self, fake: Fake, name: EndpointName, contract: Contract[R, A] | None) -> None:
        super().__init__(self)
        self._fake = fake
        self.name = name
        self.contract = contract
        self.requests: list[R] = []
        self.queue: deque[Answer] = deque()
        self._chosen: deque[Answer] = deque()  # Answers of requests that are on their way.
        self._check = None if contract is None else typed_checker(contract.types.answer, "answer")

    @property
    def unary(self) -> bool:
        """Whether it answers with exactly one value."""
        return self.contract is not None and self.contract.kind == "unary"

    @property
    def streams(self) -> bool:
        """Whether it answers with a stream."""
        return self.contract is not None and not self.unary

    def fit(self, value: Any) -> Any:
        """Check a value of the answer against the contract.

        Raises:
            TypeError: it does not fit.
        """
        if self._check is not None:
            try:
                self._check(value)
            except TypeError as error:
                raise TypeError(f"{self}: {error}") from None
        return value

    def _add(self, answer: Answer) -> Answers[R, A]:
        self.queue.clear()
        return super()._add(answer)

    def choose(self, request: Any) -> None:
        """Choose the answer of a request that is about to be sent.

        Raises:
            UnexpectedCall: the test gave no answer.
            TritonError: it is an error of the caller's runtime.
        """
        answer = self._next()
        if (error := answer.error_of_caller) is not None:
            self.requests.append(request)
            raise copy.copy(error)
        self._chosen.append(answer)

    def _next(self) -> Answer:
        if not self.queue:
            raise self._fake.unexpected(self.name)
        return self.queue.popleft() if len(self.queue) > 1 else self.queue[0]

    async def serve(self, faking: Connection, caller: Connection) -> None:
        """Serve the fake on a connection of its own.

        Args:
            faking: serves it.
            caller: the connection that the calls of a function of the test use.
        """
        if self.name in (each.name for each in faking.runtime.worker.server.endpoints):
            return

        async def once(request: Any, context: Context) -> Any:
            self.requests.append(request)
            async for item in self._items(request, context, caller):
                return item
            return None

        async def items(request: Any, context: Context) -> AsyncIterator[Any]:
            if isinstance(request, AsyncIterable):
                request = self._recorded(request)
            else:
                self.requests.append(request)
            async for item in self._items(request, context, caller):
                yield item

        target: Any = self.contract or str(self.name)
        try:
            await faking.serve(target, once if self.unary else items)
        except Exception as error:
            self._fake.problems.append(f"{self} cannot be served: {error!r}")
            raise

    async def _recorded(self, requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for each in requests:
            self.requests.append(each)
            yield each

    async def _items(self, request: Any, context: Context, caller: Connection) -> AsyncIterator[Any]:
        answer = self._chosen.popleft() if self._chosen else self._next()
        if answer.function is not None:
            async for item in _called(answer.function, request, context, caller):
                yield self._fitting(item)
            return
        if isinstance(request, AsyncIterable):
            async for _ in request:
                pass
        for item in answer.items:
            yield item
        if answer.error is not None:
            raise copy.copy(answer.error)

    def _fitting(self, item: Any) -> Any:
        try:
            return self.fit(item)
        except TypeError as error:
            self._fake.problems.append(str(error))
            raise

    def __str__(self) -> str:
        return f'trd_fake["{self.name}"]'

    def __repr__(self) -> str:
        return f"<{self}, {len(self.requests)} requests>"


async def _called(
    function: Callable[..., Any], request: Any, context: Context, caller: Connection
) -> AsyncIterator[Any]:
    """The items that a function of the test makes of a request."""
    needed = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default is each.empty
    ]
    with caller.as_here():
        result = function(request, context) if len(needed) > 1 else function(request)
        if inspect.isawaitable(result):
            result = await result
    if isinstance(result, AsyncIterable):
        async for item in result:
            yield item
    elif isinstance(result, Iterator):
        for item in result:
            yield item
    else:
        yield result


def _error(error: Any) -> Exception:
    if isinstance(error, type) and issubclass(error, Exception):
        raise TypeError(f"raises() takes an exception, not a class: raises({error.__name__}(…))")
    if not isinstance(error, Exception):
        raise TypeError(f"raises() takes an exception, not {error!r}")
    return error


class FakeTarget(Target):
    """A faked endpoint, as a connection calls it.

    Args:
        client, contract: see `Target`.
        endpoint: the fake.
    """

    __slots__ = ("_endpoint",)

    def __init__(self, client: Client, contract: Contract[Any, Any] | None, endpoint: FakeEndpoint[Any, Any]) -> None:
        self._endpoint = endpoint
        super().__init__(client, contract)
        client.limit(self.choose)
        if contract is not None and self.decoder is None and contract.types.answer is not Any:
            self.decoder = ItemDecoder(contract.types.answer)

    def _compare(self) -> None:
        super()._compare()
        self.client.limit(self.choose)  # Each attempt chooses an answer, also if all contracts fit.

    def choose(self, policy: Policy, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        """Choose the answer, then the instance."""
        self._endpoint.choose(request)
        return super().choose(policy, request, instances, load)
