"""Values that name things: endpoints, instances, services.

Everything here is plain immutable data. Every package of the project may import it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from triton_distributed.errors import InvalidName

__all__ = [
    "INSPECT",
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
MAX_NAME_LENGTH = 255  # characters of one part; three parts and an id still fit the key of a discovery record

_LONGEST_TOKEN = 255  # characters; two tokens fit NATS' control line of 4,096 bytes


def check_name(kind: str, text: str) -> str:
    """Return `text` if it can name a namespace, component or endpoint.

    Args:
        kind: the kind of thing that the name is for; appears in the error's text.
        text: any non-empty text of at most 255 characters without control characters; `/` and `.` are legal.

    Raises:
        InvalidName: the text is empty, too long, not a str, or contains a control character.
    """
    if not isinstance(text, str):
        raise InvalidName(kind, text, f"a name must be a str, not {type(text).__name__}")
    if not text:
        raise InvalidName(kind, text, "a name must not be empty")
    if len(text) > MAX_NAME_LENGTH:
        raise InvalidName(kind, text, f"a name may have at most {MAX_NAME_LENGTH} characters, not {len(text)}")
    if not text.isprintable() and (found := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)):
        raise InvalidName(kind, text, f"a name must not contain the control character {found.group()!r}")
    return text


@dataclass(frozen=True, slots=True, order=True)
class EndpointName:
    """The full name of an endpoint: namespace, component and endpoint."""

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
            raise InvalidName("endpoint", text, f"a name must be a str, not {type(text).__name__}")
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3:
            raise InvalidName(
                "endpoint",
                text,
                "the shorthand has three parts, namespace.component.endpoint; "
                "if a part contains a dot, use namespace(…).component(…).endpoint(…)",
            )
        return cls(*parts)

    @property
    def path(self) -> str:
        """`namespace/components/component/endpoint`, the form that error texts use."""
        return f"{self.namespace}/components/{self.component}/{self.endpoint}"

    @property
    def key(self) -> int:
        """64 bits that identify the endpoint in a request; one session to a worker serves all of its endpoints."""
        text = "\0".join((self.namespace, self.component, self.endpoint))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    def __str__(self) -> str:
        parts = (self.namespace, self.component, self.endpoint)
        return ".".join(parts) if not any("." in part for part in parts) else self.path


INSPECT = EndpointName("_trd", "runtime", "inspect")
"""The reserved endpoint at which each worker answers questions about itself; see `runtime.inspection`."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One served endpoint in one process.

    Attributes:
        endpoint: the endpoint that it serves.
        id: 0 < id < 2^63, the same for every endpoint of one runtime.
        addresses: where it listens, best first: `unix:///path`, `tcp://host:port`, `memory://name`,
            `nats://subject`.
        host: identifies the machine and boot it runs on; clients try Unix sockets only on the same host.
        metadata: plain JSON values that the worker published about it.
        busy: its watchdog reported that its loop is stuck; clients call other instances as long as there are any.
        contract: the schema of the endpoint's contract, as plain JSON values; None if the worker published none.
        status_url: the URL of its process's status port, e.g. `http://10.0.0.7:9090`; empty if it has none. A status
            port on the loopback address is reached from `host` only.
        pid: the number of its process on its host; 0 if it is not known.
        since: when its worker began to serve the endpoint, in seconds since the epoch by the worker's clock; 0 if it is
            not known.
    """

    endpoint: EndpointName
    id: int
    addresses: tuple[str, ...]
    host: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    busy: bool = False
    contract: Mapping[str, Any] | None = field(default=None, compare=False)
    status_url: str = field(default="", compare=False)
    pid: int = field(default=0, compare=False)
    since: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.id <= MAX_INSTANCE_ID:
            raise InvalidName("instance", str(self.id), "an instance id is greater than 0 and less than 2^63")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]", "_", text.lower())


def service_name(namespace: str, component: str) -> str:
    """Return the slug that begins the subjects of a component, e.g. `triton_init_backend_720278f8`.

    The readable part is the lower-cased `namespace|component` with everything outside `[a-z0-9_]` replaced by `_`; the
    suffix is the last 8 hex digits of its blake3 hash, so that two names with one slug stay apart.
    """
    from blake3 import blake3  # imported here, because few programs need a service name

    text = f"{namespace}|{component}"
    return f"{_slug(text)}_{blake3(text.encode()).hexdigest()[-8:]}".lstrip("_")


def subject_token(text: str) -> str:
    """Turn any name into one token of a NATS subject: never a wildcard, never several tokens, never empty.

    Printable ASCII stays, except for `.`, `*`, `>` and `%`. These, spaces and all other characters become `%XX` for
    each byte of their UTF-8, as in a URL. Two names never share a token. If the result is longer than 255 characters,
    its first 200 are kept, followed by `%%` and 32 hex digits of the name's blake3 hash.
    """
    token = re.sub(r"[^!-~]|[.*>%]", lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()), text)
    if len(token) <= _LONGEST_TOKEN:
        return token
    from blake3 import blake3  # as in `service_name`

    return f"{token[:200]}%%{blake3(text.encode()).hexdigest()[:32]}"


def stream_name(namespace: str, component: str, queue: str) -> str:
    """Return the JetStream name of a component's work queue: `queue_`, a slug of at most 150 characters, 16 hex digits.

    The slug is made as in `service_name`. The digits come from the blake3 hash of `namespace|component|queue`. The name
    of a JetStream stream may have at most 255 bytes, without `.`, `*`, `>`, spaces and slashes.
    """
    from blake3 import blake3  # as in `service_name`

    text = f"{namespace}|{component}|{queue}"
    return f"queue_{_slug(text)[:150]}_{blake3(text.encode()).hexdigest()[:16]}"


def request_subject(name: EndpointName, instance_id: int) -> str:
    """Return the NATS subject on which an instance takes requests: `{service_name}.{endpoint}-{id:x}`.

    `subject_token` makes the endpoint's name safe. Two runtimes never share a subject, because their ids differ.
    """
    return f"{service_name(name.namespace, name.component)}.{subject_token(name.endpoint)}-{instance_id:x}"
