"""The start of a session: the two ends exchange hellos, and authenticate if there is a token."""

from __future__ import annotations

from collections.abc import Callable

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import FEATURE, REFUSED, Authentication
from triton_distributed.wire.hello import Hello, agree, hello_frame, hello_payload, read_hello

# An error repeats at most this many bytes of the text with which a peer refuses the greeting.
FAREWELL = 500


class Greeting:
    """One end's part in the greeting of one session.

    Args:
        hello: this end's hello.
        authentication: this end's part in the authentication; None if there is no token.
    """

    def __init__(self, hello: Hello, authentication: Authentication | None) -> None:
        self._hello = hello
        self._authentication = authentication

    @property
    def frames(self) -> int:
        """The number of frames that the peer sends for it."""
        return 1 if self._authentication is None else 2

    def opening(self) -> bytes:
        """Return the first frame of this end."""
        hello, authentication = self._hello, self._authentication
        return hello_frame(hello if authentication is None else authentication.opening(hello))

    def words(self, words: str) -> str:
        """Return an error's text for the peer: without details until it has proven that it knows the token."""
        return words if self._authentication is None else REFUSED

    def hear(self, kind: int, payload: bytes, send: Callable[[bytes], None]) -> tuple[Hello, int] | None:
        """Process a frame of the peer.

        Args:
            kind, payload: the frame.
            send: queues an answer.

        Returns:
            the peer's hello and the common version, once the greeting is complete; None before that.

        Raises:
            RemoteProtocolError: the peer speaks another protocol, has no common version, or does not know the token.
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
    """Read a hello without telling the peer, which may lack the token, what is wrong with it."""
    try:
        return read_hello(payload)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(REFUSED) from error
