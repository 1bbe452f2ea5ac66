"""Mutual TLS between a TCP transport and a session.

A layer of our own over `ssl.MemoryBIO`, the same on every loop. A session relies on four things that the loops' own TLS
does not provide. Unwritten output is known at once (an ACCEPT must have left before its handler begins). The bytes of
large messages are decrypted directly into them. A peer learns from an alert that its certificate was refused. And a
connection counts as a session from the start, so that limits apply before handshakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

from triton_distributed.external.tls import TlsFiles
from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import TLS_STARTS

# The plain text of one record has at most this many bytes (RFC 8446 section 5.1).
RECORD = 16 * 1024
SETTINGS = "TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA"
# A plain peer of our protocol understands this frame.
_SPEAK_TLS = f"this worker accepts only TLS: set {SETTINGS}".encode()
FAREWELL = f.coded(f.GOAWAY, 0, f.GoawayCode.PROTOCOL, _SPEAK_TLS)


class TlsFailed(ConnectionError):
    """TLS failed; the text says why, and which setting helps."""


class SessionTls:
    """Makes the TLS layer of TCP sessions; both ends present a certificate signed by the authority.

    Args:
        files: certificate, key and authority; checked again for each handshake.
        server_name: the name that a worker's certificate must carry; empty accepts any that the authority has signed.

    Raises:
        ConfigError: a file cannot be read, or is invalid.
    """

    def __init__(self, files: TlsFiles, server_name: str = "") -> None:
        self._files, self._server_name = files, server_name
        # Errors show at the start, and a handshake can use the older context if a renewed file is unusable.
        files.context(server=True)
        files.context(server=False, check_hostname=bool(server_name))

    def accepting(self, protocol: StreamProtocol) -> TlsTransport:
        """Wrap the protocol of an accepted connection."""
        return TlsTransport(protocol, self._files.context(server=True), True, None)

    def dialling(self, protocol: StreamProtocol) -> TlsTransport:
        """Wrap the protocol of a dialled connection."""
        name = self._server_name
        context = self._files.context(server=False, check_hostname=bool(name))
        return TlsTransport(protocol, context, False, name or None)


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """A protocol for the TCP transport below, and a transport for the session above.

    The session is connected at once. Its output before the end of the handshake waits here: only its hello, since it
    sends nothing more before the peer's hello. The session's timer bounds the handshake.
    """

    def __init__(
        self, protocol: StreamProtocol, context: ssl.SSLContext, server: bool, server_name: str | None
    ) -> None:
        super().__init__()
        self._protocol: Any = protocol
        self._in_place = False
        self._context, self._server, self._server_name = context, server, server_name
        self._plain: Any = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: Any = None  # made once the session wants the connection
        self._waiting: list[bytes] = []
        self._heard = self._secure = self._closing = False
        self._failure: TlsFailed | None = None

    # StreamProtocol, called by the transport below

    def connection_made(self, transport: Any) -> None:
        self._plain = transport
        self._protocol.connection_made(self)
        if not self._closing:
            self._tls = self._context.wrap_bio(
                self._incoming, self._outgoing, server_side=self._server, server_hostname=self._server_name
            )
            self._shake()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._heard:
            self._heard = True
            if len(data) > 1 and int.from_bytes(data[:2], "little") not in TLS_STARTS:
                self._not_tls()
                return
        self._incoming.write(data)
        if self._secure or self._shake():
            self._read()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._protocol.connection_lost(self._failure or error)  # the session may call `decrypted`
        self._tls = None

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    # asyncio.Transport, called by the session above

    def write(self, data: Any) -> None:
        if self._closing:
            return
        if not self._secure:
            self._waiting.append(bytes(data))
            return
        self._encrypt(data)
        self._push()

    def close(self) -> None:
        if self._closing:
            return
        if self._secure:
            with contextlib.suppress(ssl.SSLError):  # the peer's close_notify is not awaited
                self._tls.unwrap()
            self._push()
        self._closing = True
        self._plain.close()

    def abort(self) -> None:
        self._closing = True
        self._plain.abort()

    def is_closing(self) -> bool:
        return self._closing or bool(self._plain.is_closing())

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol  # type: ignore[no-any-return]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._in_place = isinstance(protocol, asyncio.BufferedProtocol)

    def pause_reading(self) -> None:
        """Stop reading; bytes that are already decrypted are still delivered."""
        if not self._plain.is_closing():
            self._plain.pause_reading()

    def resume_reading(self) -> None:
        if not self._plain.is_closing():
            self._plain.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._plain.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        return int(self._plain.get_write_buffer_size())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        return self._plain.get_extra_info(name, default)

    # TLS

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._push()
            return False
        except ssl.SSLError as error:
            self._fail(error)
            return False
        self._secure = True
        for each in self._waiting:
            self._encrypt(each)
        self._waiting.clear()
        self._push()
        return True

    def _read(self) -> None:
        tls, incoming = self._tls, self._incoming
        pieces: list[bytes] = []  # at most what was read from the socket at once
        ended = False
        try:
            while (incoming.pending or tls.pending()) and not self._closing:
                if self._in_place:
                    buffer = self._protocol.get_buffer(-1)
                    count = tls.read(len(buffer), buffer)
                    if count:
                        self._protocol.buffer_updated(count)
                        continue
                elif piece := tls.read(RECORD):
                    pieces.append(piece)
                    continue
                ended = True
                break
        except ssl.SSLWantReadError:
            pass  # half a record
        except ssl.SSLError as error:
            self._fail(error)
            return
        if pieces:
            self._protocol.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if ended:
            self.close()
        elif not self._closing:
            self._push()  # e.g. the answer to a change of keys

    def decrypted(self, data: bytes) -> bytes:
        """Decrypt bytes that were read from the socket directly after the connection was lost.

        Raises:
            TlsFailed: the bytes cannot be decrypted.
        """
        self._incoming.write(data)
        pieces: list[bytes] = []  # no more than `data` holds
        try:
            while piece := self._tls.read(RECORD):
                pieces.append(piece)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass  # half a record, or the peer's close_notify
        except ssl.SSLError as error:
            raise TlsFailed(explain(error, self._server)) from error
        return b"".join(pieces)

    def _encrypt(self, data: Any) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            self._fail(error)

    def _push(self) -> None:
        if data := self._outgoing.read():
            self._plain.write(data)

    def _fail(self, error: ssl.SSLError) -> None:
        self._give_up(explain(error, self._server))
        self._push()  # the alert that tells the peer
        if self._secure and self._plain.get_write_buffer_size():
            self._plain.abort()  # the peer reads nothing, and nothing here would end it later
        else:
            self._plain.close()

    def _not_tls(self) -> None:
        if self._server:
            self._give_up("the peer does not speak TLS, and this worker accepts nothing else: see TRD_TLS_CERT")
            self._plain.write(FAREWELL)
        else:
            self._give_up(f"the worker does not speak TLS, and this end does: set {SETTINGS} there, or not here")
        self._plain.close()

    def _give_up(self, words: str) -> None:
        self._failure = self._failure or TlsFailed(words)
        self._closing = True


def explain(error: ssl.SSLError, server: bool) -> str:
    """Return why TLS failed, and which setting helps.

    Args:
        server: True if this end was dialled.
    """
    peer, own = ("client", "this worker's") if server else ("worker", "this end's")
    if isinstance(error, ssl.SSLCertVerificationError):
        name = "" if server or error.verify_code != 62 else "TRD_TLS_SERVER_NAME and "  # X509_V_ERR_HOSTNAME_MISMATCH
        words = (error.verify_message or str(error)).rstrip(".")
        return f"the {peer}'s certificate is not accepted: {words}; see {name}TRD_TLS_CA here, TRD_TLS_CERT there"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if "alert" in reason:
        return f"the {peer} refused {own} certificate: {reason}; see TRD_TLS_CERT here, TRD_TLS_CA there"
    if "did not return a certificate" in reason:
        return "the client shows no certificate: it needs TRD_TLS_CERT and TRD_TLS_KEY"
    return f"TLS with the {peer} failed: {reason}; see {SETTINGS}"
