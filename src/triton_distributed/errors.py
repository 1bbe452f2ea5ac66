"""Everything that the runtime raises, as one tree.

    TritonError
    ├── ConfigError (ValueError)              a setting is wrong
    ├── InvalidName (ValueError)              the name of a namespace, component or endpoint, or an id, is invalid
    ├── ForkError                             a runtime was used in a process forked from its own
    ├── WrongLoop (RuntimeError)              a runtime was used in another thread or event loop than its own
    ├── RuntimeClosed                         the runtime was shut down
    ├── AlreadyServed                         this runtime already serves that endpoint
    ├── NotServed (LookupError)               this runtime does not serve that endpoint
    ├── DiscoveryError                        instances cannot be registered or watched
    ├── BrokerError (ConnectionError)         NATS cannot be reached, or refuses an operation
    ├── NoInstances (LookupError)             no instance serves the endpoint
    ├── TooFewInstances (TimeoutError)        fewer instances than awaited have registered in time
    ├── InstanceNotFound (LookupError)        `direct` named an id that no instance has
    ├── ConnectionFailed (ConnectionError)    no instance could be reached
    ├── Overloaded                            every instance is at capacity
    ├── Draining                              every instance is shutting down
    ├── Paused                                every instance has paused the endpoint
    ├── DeadlineExceeded (TimeoutError)       the call's time is over
    ├── StreamIncomplete (ConnectionError)    the connection was lost after the handler had begun
    │   └── StreamClosed                      a stream was read after this process had closed it
    ├── SenderClosed (RuntimeError)           an item was sent after the request was over or the sender was closed
    ├── RequestIncomplete (ConnectionError)   the caller of a two-way stream left before its last request
    ├── NotUnary (ValueError)                 `call` got no item, or more than one
    ├── MessageTooLarge (ValueError)          a message is above `max_message_bytes`
    ├── SubscriptionClosed                    a subscription to events has ended
    ├── InvalidRequest (ValueError)           a request does not fit the handler's types
    ├── DecodeError (ValueError)              a payload that arrived cannot be read
    ├── RemoteError (ValueError)              the handler raised; also an instance of what it raised
    └── ProtocolError                         the two ends do not speak the same protocol
        ├── LocalProtocolError                this end tried to break it
        └── RemoteProtocolError               the peer broke it

Each error keeps its facts in fields and composes its text from them: what was tried, the address or limit involved, and
the setting or command that helps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from triton_distributed.redaction import shown, without_secrets

__all__ = [
    "AlreadyServed",
    "BrokerError",
    "ConfigError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DecodeError",
    "DiscoveryError",
    "Draining",
    "ForkError",
    "InstanceNotFound",
    "InvalidName",
    "InvalidRequest",
    "LocalProtocolError",
    "MessageTooLarge",
    "NoInstances",
    "NotServed",
    "NotUnary",
    "Overloaded",
    "Paused",
    "ProtocolError",
    "RemoteCause",
    "RemoteError",
    "RemoteProtocolError",
    "RequestIncomplete",
    "RuntimeClosed",
    "SenderClosed",
    "StreamClosed",
    "StreamIncomplete",
    "SubscriptionClosed",
    "TooFewInstances",
    "TritonError",
    "WrongLoop",
]


class TritonError(Exception):
    """The root of every error that this package defines."""


class ConfigError(TritonError, ValueError):
    """A setting is invalid. Fields: `setting`, `value`, `reason`. Passwords in the value are replaced by `***`."""

    def __init__(self, setting: str, value: object, reason: str) -> None:
        value, reason = shown(setting, value), without_secrets(reason)
        super().__init__(setting, value, reason)
        self.setting, self.value, self.reason = setting, value, reason

    def __str__(self) -> str:
        return f"{self.setting}={self.value!r}: {self.reason}"


class InvalidName(TritonError, ValueError):
    """A name is invalid. Fields: `kind` (what it should name), `name`, `reason`."""

    def __init__(self, kind: str, name: object, reason: str) -> None:
        super().__init__(kind, name, reason)
        self.kind, self.name, self.reason = kind, name, reason

    def __str__(self) -> str:
        return f"{self.name!r} cannot name {'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}: {self.reason}"


class ForkError(TritonError):
    """A runtime was used in a child process forked from the one that made it."""

    def __str__(self) -> str:
        return (
            "this DistributedRuntime was made before a fork and its connections belong to the parent process: "
            "make a new one in the child, or start the child with multiprocessing's 'spawn' method"
        )


class WrongLoop(TritonError, RuntimeError):
    """A runtime, or something that it made, was used in another thread or event loop than its own.

    Fields: `operation`, `thread` (the name of the runtime's thread), `same_thread` (whether only the loop differs).
    """

    def __init__(self, operation: str, thread: str, same_thread: bool) -> None:
        super().__init__(operation, thread, same_thread)
        self.operation, self.thread, self.same_thread = operation, thread, same_thread

    def __str__(self) -> str:
        if self.same_thread:
            return (
                f"{self.operation}: this runtime or connection belongs to an event loop that this thread ran before: "
                "make a new one on the loop that runs now, e.g. inside the function that asyncio.run() runs, or use "
                "triton_distributed.connect_sync(), which outlasts event loops"
            )
        return (
            f'{self.operation}: this runtime or connection belongs to the event loop of thread "{self.thread}", '
            "and was used in another thread: use triton_distributed.connect_sync() in threads, hand the work over with "
            "asyncio.run_coroutine_threadsafe(…, loop), or make another one in this thread"
        )


class RuntimeClosed(TritonError):
    """The runtime was shut down before or during the operation. Field: `operation`."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation

    def __str__(self) -> str:
        return f"{self.operation}: this runtime or connection was shut down"


class AlreadyServed(TritonError):
    """A runtime may serve an endpoint only once. Field: `endpoint` (its path)."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.endpoint = endpoint

    def __str__(self) -> str:
        return f'this runtime already serves endpoint "{self.endpoint}": another instance needs another runtime'


class NotServed(TritonError, LookupError):
    """This runtime does not serve an endpoint. Fields: `endpoint` (its path), `operation` (what was asked)."""

    def __init__(self, endpoint: str, operation: str) -> None:
        super().__init__(endpoint, operation)
        self.endpoint, self.operation = endpoint, operation

    def __str__(self) -> str:
        return (
            f'{self.operation}: this runtime does not serve endpoint "{self.endpoint}", or not yet: '
            "call serve_endpoint first"
        )


class DiscoveryError(TritonError):
    """Instances cannot be registered or watched. Fields: `backend`, `where` (its address or path), `reason`."""

    def __init__(self, backend: str, where: str, reason: str) -> None:
        where, reason = without_secrets(where), without_secrets(reason)
        super().__init__(backend, where, reason)
        self.backend, self.where, self.reason = backend, where, reason

    def __str__(self) -> str:
        return f"{self.backend} discovery at {self.where}: {self.reason}"


class BrokerError(TritonError, ConnectionError):
    """A message broker cannot be reached or refuses an operation. Fields: `broker`, `where` (addresses), `reason`."""

    def __init__(self, broker: str, where: str, reason: str) -> None:
        where, reason = without_secrets(where), without_secrets(reason)
        super().__init__(broker, where, reason)
        self.broker, self.where, self.reason = broker, where, reason

    def __str__(self) -> str:
        return f"{self.broker} at {self.where}: {self.reason}"


class NoInstances(TritonError, LookupError):
    """No instance serves the endpoint.

    Fields: `endpoint` (its path), `where` (the discovery that was asked), `elsewhere` (a text that names other folders
    of this user in which the endpoint is served), `waited_s` (seconds for which the call has waited for an instance).
    """

    def __init__(self, endpoint: str, where: str = "", elsewhere: str = "", waited_s: float = 0.0) -> None:
        super().__init__(endpoint, where, elsewhere, waited_s)
        self.endpoint, self.where, self.elsewhere, self.waited_s = endpoint, where, elsewhere, waited_s

    def __str__(self) -> str:
        asked = f" ({self.where} was asked{self.elsewhere})" if self.where else ""
        if self.waited_s:
            return (
                f'no instance of endpoint "{self.endpoint}" within {self.waited_s:g} s{asked}: start a worker that '
                "serves it; `trd ls` lists the endpoints that are served"
            )
        return (
            f'no endpoints found for endpoint "{self.endpoint}"{asked}: '
            "start a worker that serves it, or await client.wait_for_instances()"
        )


class TooFewInstances(TritonError, TimeoutError):
    """Fewer instances than awaited have registered in time. Fields: `wanted` and `found` (numbers), `timeout_s`, and
    those of `NoInstances`."""

    def __init__(self, endpoint: str, where: str, wanted: int, found: int, timeout_s: float, elsewhere: str = ""):
        super().__init__(endpoint, where, wanted, found, timeout_s, elsewhere)
        self.endpoint, self.where, self.elsewhere = endpoint, where, elsewhere
        self.wanted, self.found, self.timeout_s = wanted, found, timeout_s

    def __str__(self) -> str:
        return (
            f'endpoint "{self.endpoint}" has {self.found} of {self.wanted} instances after {self.timeout_s:g} s '
            f"({self.where} was asked{self.elsewhere}): start more workers that serve it, or give a larger timeout="
        )


class InstanceNotFound(TritonError, LookupError):
    """`direct` named an id that no instance has. Fields: `endpoint` (its path), `instance_id`, `known` (ids)."""

    def __init__(self, endpoint: str, instance_id: int, known: Sequence[int] = ()) -> None:
        super().__init__(endpoint, instance_id, tuple(known))
        self.endpoint, self.instance_id, self.known = endpoint, instance_id, tuple(known)

    def __str__(self) -> str:
        known = ", ".join(map(str, self.known[:5])) + (", …" if len(self.known) > 5 else "")
        return f'endpoint_id={self.instance_id} not found for endpoint "{self.endpoint}": known ids are [{known}]'


class ConnectionFailed(TritonError, ConnectionError):
    """No instance could be reached. Fields: `target` (what was called), `attempts` (pairs of address and reason)."""

    def __init__(self, target: str, attempts: Sequence[tuple[str, str]]) -> None:
        super().__init__(target, tuple(attempts))
        self.target, self.attempts = target, tuple(attempts)

    def __str__(self) -> str:
        tried = "; ".join(f"{address}: {reason}" for address, reason in self.attempts)
        return f"cannot reach {self.target}, tried {tried or 'no address'}"


class Refusal(TritonError):
    """The base of `Overloaded`, `Draining` and `Paused`: a request was refused before its handler began.

    Fields: `endpoint` (its path), `instance_id` (the last instance that refused), `reason` (its text), `attempts`.
    """

    word = "refused"

    def __init__(self, endpoint: str, instance_id: int, reason: str, attempts: int = 1) -> None:
        super().__init__(endpoint, instance_id, reason, attempts)
        self.endpoint, self.instance_id, self.reason, self.attempts = endpoint, instance_id, reason, attempts

    def __str__(self) -> str:
        tries = f" ({self.attempts} instances were tried)" if self.attempts > 1 else ""
        return f'endpoint "{self.endpoint}" {self.word}: instance {self.instance_id} said: {self.reason}{tries}'


class Overloaded(Refusal):
    """Every instance that was tried is at capacity; see `serve_endpoint(max_inflight=, max_queue=)`.

    Further field: `retry_after_s`, seconds until the last of them expects a free place; 0.0 if it has no estimate.
    """

    word = "is overloaded"

    def __init__(
        self, endpoint: str, instance_id: int, reason: str, attempts: int = 1, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(endpoint, instance_id, reason, attempts)
        self.args = (endpoint, instance_id, reason, attempts, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        hint = f"; try again in {self.retry_after_s:.3g} s" if self.retry_after_s else ""
        return super().__str__() + hint


class Draining(Refusal):
    """Every instance that was tried is shutting down."""

    word = "is draining"


class Paused(Refusal):
    """Every instance that was tried has paused the endpoint; see `Endpoint.pause`."""

    word = "is paused"


class DeadlineExceeded(TritonError, TimeoutError):
    """The call's time is over. Fields: `target` (what was called), `timeout_s` (seconds given), `attempts`.

    `attempts` lists the instances that did not take the request before that, as (address, reason).
    """

    def __init__(self, target: str, timeout_s: float, attempts: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(target, timeout_s, tuple(attempts))
        self.target, self.timeout_s, self.attempts = target, timeout_s, tuple(attempts)

    @property
    def _so_far(self) -> str:
        tried = "; ".join(f"{address}: {reason}" for address, reason in self.attempts)
        return f" ({tried})" if tried else ""

    def __str__(self) -> str:
        return (
            f"{self.target} did not finish within {max(0.0, self.timeout_s):g} s{self._so_far}: give the call a larger "
            "timeout=, or none; a handler's calls inherit its remaining time"
        )


class StreamIncomplete(TritonError, ConnectionError):
    """The stream broke after the handler had begun, or may have begun.

    Fields: `target`, `instance_id`, `address`, `reason`, `items`, `began`, `instances`. `items` is the number of items
    that the caller had received; these items are good. `began` is False if this process cannot know whether the handler
    had begun. `instances` is the number of instances that the call was sent to, one after another. It can be above 1
    only with `idempotent=True` or `resume=True`.
    """

    def __init__(
        self,
        target: str,
        instance_id: int,
        address: str,
        reason: str,
        items: int = 0,
        began: bool = True,
        instances: int = 1,
    ) -> None:
        super().__init__(target, instance_id, address, reason, items, began, instances)
        self.target, self.instance_id, self.address = target, instance_id, address
        self.reason, self.items, self.began, self.instances = reason, items, began, instances

    def __str__(self) -> str:
        if self.instances > 1:
            end = f"and the call had already been sent to {self.instances} instances"
        elif self.began:
            end = "so the call was not sent to another instance"
        else:
            end = "so the call was not sent to another instance: idempotent=True allows that"
        what = f"the stream from {self.target} broke after {self.items} item(s)"
        if not self.items:  # Then it may be a unary call, which has no stream.
            what = f"the call to {self.target} broke before an answer"
        return (
            f"{what}: instance {self.instance_id} at {self.address}: {self.reason}; "
            f"the handler {'had' if self.began else 'may have'} begun, {end}"
        )


class StreamClosed(StreamIncomplete):
    """A stream was read after this process had closed it, or after it had failed. Fields as in `StreamIncomplete`.

    `reason` names what closed it. `instance_id` is 0 and `address` is empty if the request was not sent.
    """

    def __str__(self) -> str:
        return f"the stream from {self.target} ended here after {self.items} item(s), before its end: {self.reason}"


class RequestIncomplete(TritonError, ConnectionError):
    """A handler reads a stream of requests whose caller was lost, or left, before the last request.

    Fields: `request_id`, `items` (requests that were received), `reason`.
    """

    def __init__(self, request_id: str, items: int, reason: str) -> None:
        super().__init__(request_id, items, reason)
        self.request_id, self.items, self.reason = request_id, items, reason

    def __str__(self) -> str:
        return f"the stream of requests of {self.request_id} broke after {self.items} item(s): {self.reason}"


class SenderClosed(TritonError, RuntimeError):
    """A `Sender` takes no more items. Field: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the sender takes no more items: {self.reason}"


class NotUnary(TritonError, ValueError):
    """`client.call` got no item, or several. Fields: `target`, `items` (0, or 2 for "more than one")."""

    def __init__(self, target: str, items: int) -> None:
        super().__init__(target, items)
        self.target, self.items = target, items

    def __str__(self) -> str:
        got = "more than one item" if self.items else "no item"
        return f"{self.target} answered with {got}; call() expects exactly one: iterate over generate() instead"


class MessageTooLarge(TritonError, ValueError):
    """A message is above the limit. Fields: `what`, `size` and `limit` in bytes, `setting`."""

    def __init__(self, what: str, size: int, limit: int, setting: str = "TRD_MAX_MESSAGE_BYTES") -> None:
        super().__init__(what, size, limit, setting)
        self.what, self.size, self.limit, self.setting = what, size, limit, setting

    def __str__(self) -> str:
        where = " on both ends" if self.setting.startswith("TRD_") else ""  # A server's own limit is on one end only.
        return f"{self.what} has {self.size:,} bytes, above the limit of {self.limit:,}: raise {self.setting}{where}"


class SubscriptionClosed(TritonError):
    """A subscription has ended: it was left or closed, or its runtime was shut down. Field: `subject`."""

    def __init__(self, subject: str) -> None:
        super().__init__(subject)
        self.subject = subject

    def __str__(self) -> str:
        return f"the subscription to {self.subject} has ended: subscribe again"


class InvalidRequest(TritonError, ValueError):
    """A request does not fit the handler's types, or the handler's kind. Fields: `target`, `reason`."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(target, reason)
        self.target, self.reason = target, reason

    def __str__(self) -> str:
        return f"Invalid request: {self.target}: {self.reason}" if self.target else f"Invalid request: {self.reason}"


class DecodeError(TritonError, ValueError):
    """A payload arrived whole, but its content is invalid. Field: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"a payload that arrived cannot be read: {self.reason}"


class RemoteCause(NamedTuple):
    """The facts that the runtime has about an error that a handler raised: `RemoteError.remote`.

    Attributes:
        type_name: the name of the type that the handler raised, e.g. `KeyError`.
        message: the text of the error.
        own_traceback: the traceback of the place that raised it, without the tracebacks of a group's parts.
        hops: instance id and request id of each handler that the error passed. The first handler raised it, each
            further one let it through, and the last one answered this call.
        types: module and qualified name of the type and of its bases, as the raising process knew them.
        parts: a `RemoteCause` for each error of an ExceptionGroup.
    """

    type_name: str = "Exception"
    message: str = ""
    own_traceback: str = ""
    hops: tuple[tuple[int, str], ...] = ()
    types: tuple[tuple[str, str], ...] = ()
    parts: tuple[RemoteCause, ...] = ()

    @property
    def instance_id(self) -> int:
        """The instance that answered."""
        return self.hops[-1][0] if self.hops else 0

    @property
    def request_id(self) -> str:
        """The request that this instance answered."""
        return self.hops[-1][1] if self.hops else ""

    @property
    def remote_traceback(self) -> str:
        """The traceback of the place that raised it, followed by the tracebacks of a group's parts."""
        text = self.own_traceback
        for number, part in enumerate(self.parts, 1):
            text += f"  +---------------- {number} ----------------\n"
            text += textwrap.indent(part.remote_traceback, "  | ", lambda line: True)
        return text

    @property
    def words(self) -> str:
        """The type's name and the message."""
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


REMOTE = "__triton_remote__"
"""The key of the `RemoteCause` in the `__dict__` of an error that arrived. Types of users have no such attribute."""

_NOT_REMOTE = RemoteCause()


class _Field:
    """A field of `RemoteCause` as an attribute of `RemoteError`, unless the error itself has an attribute of that name.

    This descriptor has no `__set__`, so an attribute of the instance takes precedence.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, error: Any, kind: Any = None) -> Any:
        remote = _NOT_REMOTE if error is None else error.__dict__.get(REMOTE, _NOT_REMOTE)
        return getattr(remote, self._name) if self._name else remote


class RemoteError(TritonError, ValueError):
    """The handler raised. The caught error is also an instance of the type that the handler raised, if that is known.

    A built-in type is always known. A user's type is known if this process has imported its module already; else the
    error has the nearest known base of that type. Nothing is imported or unpickled because of what a peer sends. The
    traceback from the worker is attached as a note, with one line for each handler that let the error through.

    `args` and the attributes of the error arrive as they would in an answer. A value that an answer cannot hold arrives
    as text. If the error's own type has an attribute with one of the names below, the name means that attribute.
    `remote` holds the runtime's facts, and `RemoteError.cause_of(error)` returns them whatever attributes the type has.

    Attributes:
        type_name: the name of the type that the handler raised, e.g. `KeyError`.
        message: the text of the error.
        remote_traceback: the traceback in the worker that raised it, without the runtime's own frames.
        instance_id: the instance that answered.
        request_id: the request that this instance answered.
        remote: all of these, and the handlers that the error passed, as a `RemoteCause`.
    """

    type_name: str = cast("str", _Field("type_name"))
    message: str = cast("str", _Field("message"))
    remote_traceback: str = cast("str", _Field("remote_traceback"))
    instance_id: int = cast("int", _Field("instance_id"))
    request_id: str = cast("str", _Field("request_id"))
    remote: RemoteCause = cast("RemoteCause", _Field(""))

    @staticmethod
    def cause_of(error: BaseException) -> RemoteCause | None:
        """Return the runtime's facts about an error that arrived from a handler; None for any other error."""
        found = error.__dict__.get(REMOTE) if isinstance(error, RemoteError) else None
        return found if isinstance(found, RemoteCause) else None

    def __str__(self) -> str:
        remote = RemoteError.cause_of(self)
        if remote is not None:
            return remote.words
        if "type_name" not in self.__dict__:
            return super().__str__() or type(self).__name__
        return f"{self.type_name}: {self.message}" if self.message else self.type_name

    def __reduce__(self) -> Any:
        return (type(self).__new__, (type(self), *self.args), dict(self.__dict__))


class ProtocolError(TritonError):
    """The two ends of a session do not speak the same protocol. Field: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class LocalProtocolError(ProtocolError):
    """This end tried something that the protocol forbids in the present state: a defect in this process."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed, too large or out of order; the session with it is closed."""
