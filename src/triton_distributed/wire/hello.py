"""The hello, the first frame of each side: versions, limits and features.

The payload is the magic `TRD\\0` and a msgpack map. Its form never changes, so that peers of any two versions can tell
each other why they disconnect. Unknown keys are ignored.

An end with a token sends two hellos. The first, in the clear, holds only its versions, the feature `token` and a
challenge. The second, which is complete, follows the proof in AUTH (`wire.authentication`).
"""

from __future__ import annotations

import msgspec

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire.frames import HELLO, MAX_FRAME, SMALL, frame

MAGIC = b"TRD\0"
VERSION = 1
LOWEST_VERSION = 1
LOAD_REPORTS = "load"
"""The feature of an end that knows ASK and LOAD."""
SHARED_MEMORY = "memory"
"""The feature of an end that knows MEMORY and the flag LENT."""
TIMES = "times"
"""The feature of an end that knows the flag TIMES."""


class Hello(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The contents of a hello.

    Attributes:
        version: the highest protocol version that the sender speaks.
        lowest: the lowest protocol version that the sender speaks.
        agent: the sender's software, for logs.
        max_message: the largest message that the sender accepts, bytes.
        max_frame: the largest frame that the sender accepts as the continuation of a message, bytes of its payload.
            Other frames have at most `MAX_FRAME`.
        max_streams: number of streams that the peer may have open at once.
        window: bytes that the peer may send on a stream that it opened before it gets credit.
        nonce: a random number; together with a stream's id it identifies a request.
        features: optional features; one is used if both sides list it.
        challenge: 32 random bytes for the peer's proof, in the first hello of an end with a token.
    """

    version: int = VERSION
    lowest: int = LOWEST_VERSION
    agent: str = ""
    max_message: int = 1 << 30
    max_frame: int = MAX_FRAME  # of peers that do not say it: versions before this field
    max_streams: int = 100_000
    window: int = 65536
    nonce: int = 0
    features: list[str] = []
    challenge: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Hello).decode


def hello_payload(hello: Hello) -> bytes:
    """Return the payload of a HELLO; an AUTH has the same after its proof."""
    return MAGIC + _encode(hello)


def hello_frame(hello: Hello) -> bytes:
    """Return a HELLO frame."""
    return frame(HELLO, 0, hello_payload(hello))


def read_hello(payload: bytes) -> Hello:
    """Read the payload of a HELLO.

    Raises:
        RemoteProtocolError: the payload is not a hello.
    """
    if not payload.startswith(MAGIC):
        raise RemoteProtocolError("the peer's first bytes are not a hello: it does not speak this protocol")
    try:
        hello = _decode(payload[len(MAGIC) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the peer's hello cannot be read: {error}") from error
    limits_fit = hello.max_message >= SMALL and hello.max_frame >= MAX_FRAME and hello.max_streams >= 0
    if not 0 < hello.window < 2**32 or not limits_fit:
        raise RemoteProtocolError("the peer's hello has invalid limits")
    return hello


def agree(ours: Hello, theirs: Hello) -> int:
    """Return the highest version that both sides speak, or 0 if their versions do not overlap."""
    version = min(ours.version, theirs.version)
    return version if version >= max(ours.lowest, theirs.lowest) else 0
