"""What the two ends say before anything else: what they are, and, where there is a token, that they know it."""

from __future__ import annotations

from collections.abc import Callable

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import FEATURE, REFUSED, Authentication
from triton_distributed.wire.hello import Hello, agree, hello_frame, hello_payload, read_hello

# This many bytes are repeated of the words with which a peer refuses the greeting.
FAREWELL = 500


class Greeting:
    """One end's part in it, for one session.

    Args:
        hello: what this end says of itself.
        authentication: this end's part in proving that both know the token; None where there is none.
    """

    def __init__(self, hello: Hello, authentication: Authentication | None) -> None:
        self._hello = hello
        self._authentication = authentication

    @property
    def frames(self) -> int:
        """How many frames the peer needs for it."""
        return 1 if self._authentication is None else 2

    def opening(self) -> bytes:
        """The first frame of this end."""
        hello, authentication = self._hello, self._authentication
        return hello_frame(hello if authentication is None else authentication.opening(hello))

    def words(self, words: str) -> str:
        """How to name a fault of the peer to it: without details while it has not proven that it knows the token."""
        return words if self._authentication is None else REFUSED

    def hear(self, kind: int, payload: bytes, send: Callable[[bytes], None]) -> tuple[Hello, int] | None:
        """Take a frame of the peer.

        Args:
            kind: and payload: the frame.
            send: queues an answer.

        Returns:
            its hello and the version that both speak, once the greeting is complete; None before that.

        Raises:
            RemoteProtocolError: the peer speaks another protocol, no common version, or does not know the token.
        """
        authentication = self._authentication
        if kind == f.GOAWAY and payload and (authentication is None or authentication.dialer):
            words = payload[1 : 1 + FAREWELL].decode("utf-8", "replace")
            raise RemoteProtocolError("".join([each if each.isprintable() else "?" for each in words]))
        if authentication is not None:
            return self._authenticate(authentication, kind, payload, send)
        if kind != f.HELLO:
            raise RemoteProtocolError("the peer's first frame is not a hello")
        peer = read_hello(payload)
        if FEATURE in peer.features:
            raise RemoteProtocolError(REFUSED)
        return peer, self._agree(peer)

    def _authenticate(
        self, authentication: Authentication, kind: int, payload: bytes, send: Callable[[bytes], None]
    ) -> tuple[Hello, int] | None:
        if kind == f.HELLO and not authentication.heard:
            opening = _read(payload)
            self._agree(opening)
            authentication.hear(opening)
            if authentication.dialer:
                send(self._proof(authentication))
            return None
        if kind == f.AUTH and authentication.heard:
            peer = _read(authentication.verify(payload))
            if not authentication.dialer:
                send(self._proof(authentication))
            return peer, self._agree(peer)
        raise RemoteProtocolError(REFUSED)

    def _proof(self, authentication: Authentication) -> bytes:
        return f.frame(f.AUTH, 0, authentication.prove(hello_payload(self._hello)))

    def _agree(self, peer: Hello) -> int:
        version = agree(self._hello, peer)
        if not version:
            raise RemoteProtocolError(
                f"no common protocol version: this end speaks {self._hello.lowest} to {self._hello.version}, "
                f"the peer {peer.lowest} to {peer.version}"
            )
        return version


def _read(payload: bytes) -> Hello:
    """A hello of a peer that must not learn what is wrong with it."""
    try:
        return read_hello(payload)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(REFUSED) from error
