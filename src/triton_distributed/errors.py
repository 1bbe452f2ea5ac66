"""Everything that the runtime raises, as one tree.

    TritonError
    ├── ConfigError (ValueError)              a setting is wrong
    ├── InvalidName (ValueError)              a namespace, component, endpoint or instance id is not one
    ├── ForkError                             a runtime was used in a process forked from its own
    ├── WrongLoop (RuntimeError)              a runtime was used in another thread or event loop than its own
    ├── RuntimeClosed                         the runtime was shut down
    ├── AlreadyServed                         this runtime serves that endpoint already
    ├── NotServed (LookupError)               this runtime does not serve that endpoint
    ├── DiscoveryError                        instances cannot be registered or watched
    ├── BrokerError (ConnectionError)         NATS cannot be reached, or refuses what was asked
    ├── NoInstances (LookupError)             nobody serves the endpoint
    ├── InstanceNotFound (LookupError)        `direct` named an id that nobody has
    ├── ConnectionFailed (ConnectionError)    no instance could be reached
    ├── Overloaded                            every instance is at capacity
    ├── Draining                              every instance is shutting down
    ├── Paused                                every instance has paused the endpoint
    ├── DeadlineExceeded (TimeoutError)       the call's time is over
    ├── StreamIncomplete (ConnectionError)    the connection was lost after the handler had begun
    │   └── StreamClosed                      this process had closed the stream that is read
    ├── RequestIncomplete (ConnectionError)   the caller of a two-way stream is gone before its last request
    ├── NotUnary (ValueError)                 `call` got no item, or more than one
    ├── MessageTooLarge (ValueError)          a message is above `max_message_bytes`
    ├── SubscriptionClosed                    a subscription to events has ended
    ├── InvalidRequest (ValueError)           a request does not fit the handler's types
    ├── DecodeError (ValueError)              a payload that arrived cannot be read
    ├── RemoteError (ValueError)              the handler raised; also an instance of what it raised
    └── ProtocolError                         the two ends do not speak the same protocol
        ├── LocalProtocolError                this end would break it
        └── RemoteProtocolError               the peer broke it

Each error keeps what it knows in fields and composes its text from them: what was tried, the address or limit involved,
and the setting or command that helps.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

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
    "StreamClosed",
    "StreamIncomplete",
    "SubscriptionClosed",
    "TritonError",
    "WrongLoop",
]


class TritonError(Exception):
    """The root of every error that this package defines."""


_SECRETS = re.compile(r"PASSWORD|TOKEN|NKEY")
_USER = re.compile(r"://(?:(?!://).)*@", re.DOTALL)  # also where the password itself has an @ or a comma
_PEM = re.compile(r"-----BEGIN.*", re.DOTALL)


def without_secrets(text: str) -> str:
    """Return text with `***` for the user and password of each URL in it, and for the content of key files."""
    return _PEM.sub("***", _USER.sub("://***@", text))


def shown(setting: str, value: Any) -> Any:
    """Return the value of a setting as an error, a log line or a `repr` may show it."""
    if _SECRETS.search(setting):
        return value and "***"
    if not isinstance(value, str):
        text = str(value)
        return value if without_secrets(text) == text else without_secrets(text)
    before, mark, after = without_secrets(value).partition("://")
    if "@" in before:  # a URL without its scheme
        before = f"***@{before.rpartition('@')[2]}"
    query = mark and after.partition("?")[1]
    return f"{before}{mark}{after.partition('?')[0]}?***" if query else f"{before}{mark}{after}"


class ConfigError(TritonError, ValueError):
    """A setting cannot be used. Fields: `setting`, `value`, `reason`. Passwords in the value are replaced by `***`."""

    def __init__(self, setting: str, value: object, reason: str) -> None:
        value, reason = shown(setting, value), without_secrets(reason)
        super().__init__(setting, value, reason)
        self.setting, self.value, self.reason = setting, value, reason

    def __str__(self) -> str:
        return f"{self.setting}={self.value!r}: {self.reason}"


class InvalidName(TritonError, ValueError):
    """A name is not one. Fields: `kind` (what it should name), `name`, `reason`."""

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
                f"{self.operation}: this DistributedRuntime belongs to an event loop that this thread ran before: "
                "make a new one on the loop that runs now, e.g. inside the function that asyncio.run() runs"
            )
        return (
            f'{self.operation}: this DistributedRuntime belongs to the event loop of thread "{self.thread}", and was '
            "used in another thread: hand the work over with "
            "asyncio.run_coroutine_threadsafe(…, runtime.event_loop()), or make a runtime in this thread"
        )


class RuntimeClosed(TritonError):
    """The runtime was shut down before or during the operation. Field: `operation`."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation

    def __str__(self) -> str:
        return f"{self.operation}: this DistributedRuntime was shut down"


class AlreadyServed(TritonError):
    """One runtime serves an endpoint once. Field: `endpoint` (its path)."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.endpoint = endpoint

    def __str__(self) -> str:
        return f'this runtime serves endpoint "{self.endpoint}" already: another instance needs another runtime'


class NotServed(TritonError, LookupError):
    """An endpoint is not served by this runtime. Fields: `endpoint` (its path), `operation` (what was asked)."""

    def __init__(self, endpoint: str, operation: str) -> None:
        super().__init__(endpoint, operation)
        self.endpoint, self.operation = endpoint, operation

    def __str__(self) -> str:
        return (
            f'{self.operation}: this runtime does not serve endpoint "{self.endpoint}", or not yet: serve_endpoint does'
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
    """A message broker cannot be reached, or refuses. Fields: `broker`, `where` (its addresses), `reason`."""

    def __init__(self, broker: str, where: str, reason: str) -> None:
        where, reason = without_secrets(where), without_secrets(reason)
        super().__init__(broker, where, reason)
        self.broker, self.where, self.reason = broker, where, reason

    def __str__(self) -> str:
        return f"{self.broker} at {self.where}: {self.reason}"


class NoInstances(TritonError, LookupError):
    """Nobody serves the endpoint.

    Fields: `endpoint` (its path), `where` (the discovery that was asked), `elsewhere` (words on other folders of this
    user, where it is served).
    """

    def __init__(self, endpoint: str, where: str = "", elsewhere: str = "") -> None:
        super().__init__(endpoint, where, elsewhere)
        self.endpoint, self.where, self.elsewhere = endpoint, where, elsewhere

    def __str__(self) -> str:
        asked = f" ({self.where} was asked{self.elsewhere})" if self.where else ""
        return (
            f'no endpoints found for endpoint "{self.endpoint}"{asked}: '
            "start a worker that serves it, or await client.wait_for_instances()"
        )


class InstanceNotFound(TritonError, LookupError):
    """`direct` named an id that no instance has. Fields: `endpoint` (its path), `instance_id`, `known` (ids)."""

    def __init__(self, endpoint: str, instance_id: int, known: Sequence[int] = ()) -> None:
        super().__init__(endpoint, instance_id, tuple(known))
        self.endpoint, self.instance_id, self.known = endpoint, instance_id, tuple(known)

    def __str__(self) -> str:
        known = ", ".join(map(str, self.known[:5])) + (", …" if len(self.known) > 5 else "")
        return f'endpoint_id={self.instance_id} not found for endpoint "{self.endpoint}": known are [{known}]'


class ConnectionFailed(TritonError, ConnectionError):
    """No instance could be reached. Fields: `target` (what was called), `attempts` ((address, reason) each)."""

    def __init__(self, target: str, attempts: Sequence[tuple[str, str]]) -> None:
        super().__init__(target, tuple(attempts))
        self.target, self.attempts = target, tuple(attempts)

    def __str__(self) -> str:
        tried = "; ".join(f"{address}: {reason}" for address, reason in self.attempts)
        return f"cannot reach {self.target}, tried {tried or 'no address'}"


class Refusal(TritonError):
    """What `Overloaded` and `Draining` share: a request was refused before its handler began.

    Fields: `endpoint` (its path), `instance_id` (the last that refused), `reason` (its words), `attempts`.
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

    Further field: `retry_after_s`, seconds after which the last of them expects a free place; 0.0 if it cannot tell.
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

    `attempts` are those instances that did not take the request before, as (address, reason).
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
            "timeout=, or none; a handler's calls inherit what is left of its own"
        )


class StreamIncomplete(TritonError, ConnectionError):
    """The stream broke after the handler had begun, or where it may have.

    Fields: `target`, `instance_id`, `address`, `reason`, `items`, `began`, `instances`. `items` counts what the caller
    had received; those items are good. `began` is False if the connection was lost in such a way that this process
    cannot know. `instances` is how many the call was sent to, one after another; more than 1 with `idempotent=True` or
    `resume=True`.
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
            end = f"and the call had been sent to {self.instances} instances by then"
        elif self.began:
            end = "so the call was not sent elsewhere by itself"
        else:
            end = "so the call was not sent elsewhere by itself: idempotent=True allows that"
        return (
            f"the stream from {self.target} broke after {self.items} item(s): instance {self.instance_id} at "
            f"{self.address}: {self.reason}; the handler {'had' if self.began else 'may have'} begun, {end}"
        )


class StreamClosed(StreamIncomplete):
    """A stream is read that this process has closed, or that has failed before. Fields as in `StreamIncomplete`.

    `reason` says what closed it. `instance_id` is 0 and `address` empty if the request was not sent.
    """

    def __str__(self) -> str:
        return f"the stream from {self.target} ended here after {self.items} item(s), before its end: {self.reason}"


class RequestIncomplete(TritonError, ConnectionError):
    """A handler reads a stream of requests whose caller is gone, or has left, before its last one.

    Fields: `request_id`, `items` (requests that were received), `reason`.
    """

    def __init__(self, request_id: str, items: int, reason: str) -> None:
        super().__init__(request_id, items, reason)
        self.request_id, self.items, self.reason = request_id, items, reason

    def __str__(self) -> str:
        return f"the requests of {self.request_id} broke off after {self.items} item(s): {self.reason}"


class NotUnary(TritonError, ValueError):
    """`client.call` wants exactly one item. Fields: `target`, `items` (0, or 2 for "more than one")."""

    def __init__(self, target: str, items: int) -> None:
        super().__init__(target, items)
        self.target, self.items = target, items

    def __str__(self) -> str:
        got = "more than one item" if self.items else "no item"
        return f"{self.target} answered with {got}; call() wants exactly one: iterate over generate() instead"


class MessageTooLarge(TritonError, ValueError):
    """A message is above the limit. Fields: `what`, `size` and `limit` in bytes, `setting`."""

    def __init__(self, what: str, size: int, limit: int, setting: str = "TRD_MAX_MESSAGE_BYTES") -> None:
        super().__init__(what, size, limit, setting)
        self.what, self.size, self.limit, self.setting = what, size, limit, setting

    def __str__(self) -> str:
        where = " on both ends" if self.setting.startswith("TRD_") else ""  # a server's limit is one
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
    """A payload arrived whole, but what it holds cannot be read. Field: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"a payload that arrived cannot be read: {self.reason}"


@dataclass(frozen=True, slots=True)
class RemoteCause:
    """What the runtime knows of an error that a handler raised: `RemoteError.remote`.

    Attributes:
        type_name: the name of the type that the handler raised, e.g. `KeyError`.
        message: its text.
        own_traceback: the traceback where it was raised, without those of a group's parts.
        hops: instance id and request id of each handler on the error's way; the first raised it, each further one
            let it through, and the last one answered this call.
        types: module and qualified name of the type and of its bases, as the raising process knew them.
        parts: the same of each error of an ExceptionGroup.
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
        """The request that it answered."""
        return self.hops[-1][1] if self.hops else ""

    @property
    def remote_traceback(self) -> str:
        """The traceback where it was raised, followed by those of a group's parts."""
        text = self.own_traceback
        for number, part in enumerate(self.parts, 1):
            text += f"  +---------------- {number} ----------------\n"
            text += textwrap.indent(part.remote_traceback, "  | ", lambda line: True)
        return text

    @property
    def words(self) -> str:
        """Type and message."""
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


REMOTE = "__triton_remote__"
"""The key of a `RemoteCause` in the `__dict__` of an error that arrived. No attribute of a user's type has it."""

_NOT_REMOTE = RemoteCause()


class _Field:
    """A field of `RemoteCause` as an attribute of `RemoteError`, unless the error has one of that name itself.

    It has no `__set__`, so an attribute of the instance comes before it.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, error: Any, kind: Any = None) -> Any:
        remote = _NOT_REMOTE if error is None else error.__dict__.get(REMOTE, _NOT_REMOTE)
        return getattr(remote, self._name) if self._name else remote


class RemoteError(TritonError, ValueError):
    """The handler raised. What is caught is also an instance of the type that the handler raised, where that is known.

    A built-in type is itself here; a user's own type is where its module is already imported in this process; else the
    nearest base of it that is known. Nothing is imported or unpickled because a peer said so. The traceback of where
    the error was raised is attached as a note; where other handlers let the error through, a line for each says so.

    `args` and the attributes of the error arrive as they would in an answer, and what cannot be in an answer arrives as
    text. Where the error's own type has an attribute with one of the names below, the name means that attribute:
    `remote` holds what the runtime knows, and `RemoteError.cause_of(error)` does so whatever the type has.

    Attributes:
        type_name: the name of the type that the handler raised, e.g. `KeyError`.
        message: its text.
        remote_traceback: the traceback in the worker where it was raised, without the runtime's own frames.
        instance_id: the instance that answered.
        request_id: the request that it answered.
        remote: all of these and the way of the error, as a `RemoteCause`.
    """

    type_name: str = cast("str", _Field("type_name"))
    message: str = cast("str", _Field("message"))
    remote_traceback: str = cast("str", _Field("remote_traceback"))
    instance_id: int = cast("int", _Field("instance_id"))
    request_id: str = cast("str", _Field("request_id"))
    remote: RemoteCause = cast("RemoteCause", _Field(""))

    @staticmethod
    def cause_of(error: BaseException) -> RemoteCause | None:
        """What the runtime knows of an error that arrived from a handler; None for any other error."""
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
    """This end tried something that the protocol forbids in the present state: a defect here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed, too large or out of order; the session to it is closed."""
