"""Everything that the runtime raises, as one tree.

    TritonError
    ├── ConfigError (ValueError)              a setting is wrong
    ├── InvalidName (ValueError)              a namespace, component, endpoint or instance id is not one
    ├── ForkError                             a runtime was used in a process forked from its own
    ├── RuntimeClosed                         the runtime was shut down
    ├── AlreadyServed                         this runtime serves that endpoint already
    ├── NotServed (LookupError)               this runtime does not serve that endpoint
    ├── DiscoveryError                        instances cannot be registered or watched
    ├── BrokerError (ConnectionError)         NATS cannot be reached, or refuses what was asked
    ├── NoInstances (LookupError)             nobody serves the endpoint
    ├── InstanceNotFound (LookupError)        `direct` named an id that nobody has
    ├── ConnectionFailed (ConnectionError)    no instance could be reached
    ├── Overloaded                            every instance refused for want of room
    ├── Draining                              every instance is shutting down
    ├── DeadlineExceeded (TimeoutError)       the call's time is over
    ├── StreamIncomplete (ConnectionError)    the connection was lost after the handler had begun
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

from collections.abc import Sequence
from typing import Any

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
    "ProtocolError",
    "RemoteError",
    "RemoteProtocolError",
    "RuntimeClosed",
    "StreamIncomplete",
    "SubscriptionClosed",
    "TritonError",
]


class TritonError(Exception):
    """The root of every error that this package defines."""


class ConfigError(TritonError, ValueError):
    """A setting cannot be used. Fields: `setting`, `value`, `reason`."""

    def __init__(self, setting: str, value: object, reason: str) -> None:
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
        super().__init__(backend, where, reason)
        self.backend, self.where, self.reason = backend, where, reason

    def __str__(self) -> str:
        return f"{self.backend} discovery at {self.where}: {self.reason}"


class BrokerError(TritonError, ConnectionError):
    """A message broker cannot be reached, or refuses. Fields: `broker`, `where` (its addresses), `reason`."""

    def __init__(self, broker: str, where: str, reason: str) -> None:
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
    """Every instance that was tried refused for want of room; see `serve_endpoint(max_inflight=, max_queue=)`.

    Further field: `retry_after_s`, seconds after which the last of them expects to have room; 0.0 where it cannot tell.
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

    Fields: `target`, `instance_id`, `address`, `reason`, `items`, `began`. `items` counts what the caller had received;
    those items are good. `began` is False where the connection was lost in such a way that nobody here can know.
    """

    def __init__(
        self, target: str, instance_id: int, address: str, reason: str, items: int = 0, began: bool = True
    ) -> None:
        super().__init__(target, instance_id, address, reason, items, began)
        self.target, self.instance_id, self.address = target, instance_id, address
        self.reason, self.items, self.began = reason, items, began

    def __str__(self) -> str:
        return (
            f"the stream from {self.target} broke after {self.items} item(s): instance {self.instance_id} at "
            f"{self.address}: {self.reason}; the handler {'had' if self.began else 'may have'} begun, so the call was "
            f"not sent elsewhere by itself{'' if self.began else ': idempotent=True allows that'}"
        )


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


class RemoteError(TritonError, ValueError):
    """The handler raised. What is caught is also an instance of the type that the handler raised, where that is known.

    A built-in type is itself here; a user's own type is where its module is already imported in this process; else the
    nearest base of it that is known. Nothing is imported or unpickled because a peer said so. The remote traceback is
    attached as a note.

    Attributes:
        type_name: the name of the type that the handler raised, e.g. `KeyError`.
        message: its text.
        remote_traceback: the formatted traceback in the worker.
        instance_id: who answered.
        request_id: which request it was.
    """

    type_name: str = "Exception"
    message: str = ""
    remote_traceback: str = ""
    instance_id: int = 0
    request_id: str = ""

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name

    def __reduce__(self) -> Any:
        return (RemoteError.__new__, (RemoteError, *self.args), dict(self.__dict__))


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
