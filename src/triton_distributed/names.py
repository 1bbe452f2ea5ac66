"""Values that name things: endpoints, instances, services.

Everything here is plain immutable data that every room may import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from triton_distributed.errors import InvalidName

__all__ = [
    "MAX_INSTANCE_ID",
    "MAX_NAME_LENGTH",
    "EndpointName",
    "Instance",
    "check_name",
    "request_subject",
    "service_name",
    "stream_name",
    "subject_token",
]

MAX_INSTANCE_ID = 2**63 - 1
MAX_NAME_LENGTH = 255  # one part; three of them and an id still fit a discovery record's key

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNSAFE = re.compile(r"[^!-~]|[.*>%]")  # in a token of a NATS subject, and `%`, which marks what was replaced
_LONGEST_TOKEN = 255  # two of them fit NATS' control line of 4,096 bytes
_SLUG = re.compile(r"[^a-z0-9_]")


def check_name(kind: str, text: str) -> str:
    """Return `text` if it can name a namespace, component or endpoint.

    Args:
        kind: what is being named, for the error's text.
        text: any non-empty text of at most 255 characters without control characters; `/` and `.` are legal.

    Raises:
        InvalidName: it is empty, too long, not text, or holds a control character.
    """
    if not isinstance(text, str):
        raise InvalidName(kind, text, f"a name is a str, not {type(text).__name__}")
    if not text:
        raise InvalidName(kind, text, "a name is not empty")
    if len(text) > MAX_NAME_LENGTH:
        raise InvalidName(kind, text, f"a name has at most {MAX_NAME_LENGTH} characters, not {len(text)}")
    if found := _CONTROL.search(text):
        raise InvalidName(kind, text, f"a name holds no control character, found {found.group()!r}")
    return text


@dataclass(frozen=True, slots=True, order=True)
class EndpointName:
    """The address of a service: namespace, component and endpoint."""

    namespace: str
    component: str
    endpoint: str

    def __post_init__(self) -> None:
        check_name("namespace", self.namespace)
        check_name("component", self.component)
        check_name("endpoint", self.endpoint)

    @classmethod
    def parse(cls, text: str) -> EndpointName:
        """Read the dotted shorthand `namespace.component.endpoint`, with or without `dyn://` before it.

        Raises:
            InvalidName: there are not exactly three non-empty parts.
        """
        if not isinstance(text, str):
            raise InvalidName("endpoint", text, f"a name is a str, not {type(text).__name__}")
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3:
            raise InvalidName(
                "endpoint",
                text,
                "the shorthand has three parts, namespace.component.endpoint; "
                "where a part contains a dot use namespace(…).component(…).endpoint(…)",
            )
        return cls(*parts)

    @property
    def path(self) -> str:
        """`namespace/components/component/endpoint`, the form that error texts use."""
        return f"{self.namespace}/components/{self.component}/{self.endpoint}"

    @property
    def key(self) -> int:
        """64 bits that name the endpoint in a request: one session to a worker serves all of its endpoints."""
        text = "\0".join((self.namespace, self.component, self.endpoint))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    def __str__(self) -> str:
        parts = (self.namespace, self.component, self.endpoint)
        return ".".join(parts) if not any("." in part for part in parts) else self.path


@dataclass(frozen=True, slots=True)
class Instance:
    """One served endpoint in one process.

    Attributes:
        endpoint: what it serves.
        id: 0 < id < 2^63, the same for every endpoint of one runtime.
        addresses: where it listens, best first: `unix:///path`, `tcp://host:port`, `memory://name`,
            `nats://subject`.
        host: names the machine and boot it runs on; Unix sockets are only tried where it equals our own.
        metadata: what its server published about it: plain JSON values.
        busy: its loop is stuck, as its own watchdog says: others are called while there are any.
    """

    endpoint: EndpointName
    id: int
    addresses: tuple[str, ...]
    host: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    busy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.id <= MAX_INSTANCE_ID:
            raise InvalidName("instance", str(self.id), "an instance id is greater than 0 and less than 2^63")


def service_name(namespace: str, component: str) -> str:
    """The slug under which a component's subjects are published, e.g. `triton_init_backend_720278f8`.

    The readable part is the lower-cased `namespace|component` with everything outside `[a-z0-9_]` replaced by `_`; the
    suffix is the last 8 hex digits of its blake3 hash, so that two names with one slug stay apart.
    """
    from blake3 import blake3  # here, because few programs need a service name and all pay for an import

    text = f"{namespace}|{component}"
    return f"{_SLUG.sub('_', text.lower())}_{blake3(text.encode()).hexdigest()[-8:]}".lstrip("_")


def subject_token(text: str) -> str:
    """Make any name one token of a NATS subject: it is never a wildcard, never several tokens, never empty.

    Printable ASCII stays as it is but for `.`, `*`, `>` and `%`; these, spaces and everything else become `%XX` for
    each byte of their UTF-8, as in a URL. Two names never share a token. What is longer than 255 characters by then
    keeps its first 200, followed by `%%` and 32 hex digits of the name's blake3 hash.
    """
    token = _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()), text)
    if len(token) <= _LONGEST_TOKEN:
        return token
    from blake3 import blake3  # as in `service_name`

    return f"{token[:200]}%%{blake3(text.encode()).hexdigest()[:32]}"


def stream_name(namespace: str, component: str, queue: str) -> str:
    """What a component's work queue is called in JetStream: `queue_`, a slug of at most 150 characters, 16 hex digits.

    The slug is made as in `service_name`, the digits are of the blake3 hash of `namespace|component|queue`; a stream's
    name has at most 255 bytes and none of `.`, `*`, `>`, spaces and slashes.
    """
    from blake3 import blake3  # as in `service_name`

    text = f"{namespace}|{component}|{queue}"
    return f"queue_{_SLUG.sub('_', text.lower())[:150]}_{blake3(text.encode()).hexdigest()[:16]}"


def request_subject(name: EndpointName, instance_id: int) -> str:
    """The NATS subject on which an instance takes requests: `{service_name}.{endpoint}-{id:x}`.

    The endpoint's name is made safe as `subject_token` says. Two runtimes never share a subject, for their ids differ.
    """
    return f"{service_name(name.namespace, name.component)}.{subject_token(name.endpoint)}-{instance_id:x}"
