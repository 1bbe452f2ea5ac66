"""The file of `trd record`: a line of JSON about the recording, then one line for each request.

A value that JSON holds exactly is written as it is, below `json`. Any other value, e.g. an array, is written as the
bytes that travelled, below `body` and `buffers` in base64, with `shown` for readers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from triton_distributed import __version__
from triton_distributed.cli.failure import USAGE, Failure, one_line
from triton_distributed.cli.rendering import plain
from triton_distributed.errors import DecodeError
from triton_distributed.names import EndpointName
from triton_distributed.payload.codec import decode
from triton_distributed.runtime.recording import Exchange, Payload

FORMAT, VERSION = "trd-record", 1


class Header(msgspec.Struct):
    """The first line.

    Attributes:
        format: always `trd-record`.
        version: of the format.
        endpoint: what was recorded.
        began: in seconds since 1970.
        runtime: the version of this package.
    """

    format: str
    version: int
    endpoint: str = ""
    began: float = 0.0
    runtime: str = ""


class Value(msgspec.Struct, omit_defaults=True):
    """A request or an item.

    Attributes:
        json: the value; or else `body` and `buffers`, see `payload.codec`.
        shown: the value for readers, if it is not in `json`.
        after_s, annotated: see `recording.Payload`.
    """

    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body: bytes = b""
    buffers: list[bytes] = []
    shown: Any = msgspec.UNSET
    after_s: float = 0.0
    annotated: bool = False

    @property
    def encoded(self) -> bytes:
        """The body as it travelled."""
        if isinstance(self.json, msgspec.UnsetType):
            return self.body
        return msgspec.msgpack.encode(msgspec.json.decode(self.json))

    def value(self) -> Any:
        """The value itself.

        Raises:
            DecodeError: the bytes are damaged, or need a package that is not installed.
        """
        return decode(self.encoded, [bytearray(each) for each in self.buffers])


class Recorded(msgspec.Struct, omit_defaults=True):
    """One request and its answer, a line of the file; see `recording.Exchange`."""

    id: str
    began: float
    requests: list[Value]
    items: list[Value]
    outcome: str
    took_s: float
    streamed: bool = False
    error: tuple[str, str] = ("", "")
    metadata: dict[str, dict[str, Any]] = {}


def of(exchange: Exchange) -> Recorded:
    """A line of the file."""
    return Recorded(
        id=exchange.id,
        began=round(exchange.began, 6),
        requests=[_value(each) for each in exchange.requests],
        items=[_value(each) for each in exchange.items],
        outcome=exchange.outcome,
        took_s=round(exchange.took_s, 6),
        streamed=exchange.streamed,
        error=exchange.error,
        metadata=exchange.metadata,
    )


def _value(payload: Payload) -> Value:
    made = Value(after_s=round(payload.after_s, 6), annotated=payload.annotated)
    try:
        value = decode(payload.body, [bytearray(each) for each in payload.buffers])
    except DecodeError as error:  # The worker has a package that is missing here.
        made.shown = str(error)
    else:
        try:
            text = msgspec.json.encode(value)
            if not payload.buffers and msgspec.msgpack.encode(msgspec.json.decode(text)) == payload.body:
                made.json = msgspec.Raw(text)
                return made
        except (TypeError, ValueError, RecursionError):
            pass
        made.shown = plain(value)
    made.body, made.buffers = payload.body, payload.buffers
    return made


class Writer:
    """Writes a recording. The file is new, and only its user can read it.

    Args:
        path: the file.
        endpoint: what is recorded.
        began: in seconds since 1970.

    Attributes:
        size: bytes written so far.

    Raises:
        Failure: the file exists or cannot be made.
    """

    def __init__(self, path: Path, endpoint: EndpointName, began: float) -> None:
        try:
            self._file: IO[bytes] = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115
        except FileExistsError:
            raise Failure(f"{path} exists: a recording is not written over another file") from None
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror or error}") from error
        self.size = 0
        self._write(Header(FORMAT, VERSION, str(endpoint), round(began, 3), __version__))

    def add(self, exchange: Exchange) -> None:
        """Write one request.

        Raises:
            OSError: the disk is full, or fails. The requests before it are in the file.
        """
        self._write(of(exchange))

    def _write(self, line: msgspec.Struct) -> None:
        data = msgspec.json.encode(line, enc_hook=repr) + b"\n"
        self._file.write(data)
        self._file.flush()  # A recording that is killed keeps what it has.
        self.size += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Recordings:
    """Reads a recording.

    Args:
        path: the file.

    Attributes:
        header: its first line.
        cut: the last line is incomplete, because the recording was killed or the file was cut. Known after the
            iteration over the requests.

    Raises:
        Failure: the file cannot be read, is no recording, or has another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cut = False
        try:
            with open(path, "rb") as file:
                first = file.readline(100_000)
        except OSError as error:
            raise Failure(f"cannot read {path}: {error.strerror or error}", USAGE) from error
        try:
            self.header = msgspec.json.decode(first, type=Header)
        except msgspec.DecodeError:
            raise Failure(f"{path} was not written by `trd record`") from None
        if self.header.format != FORMAT:
            raise Failure(f"{path} was not written by `trd record`")
        if self.header.version != VERSION:
            writer = f"triton-distributed {self.header.runtime}" if self.header.runtime else "another program"
            raise Failure(
                f"{path} has version {self.header.version} of the format, written by {writer}; this is {__version__}, "
                f"which reads version {VERSION}: record it again, or use that version of trd"
            )

    def __iter__(self) -> Iterator[Recorded]:
        decoder = msgspec.json.Decoder(Recorded)
        try:
            with open(self._path, "rb") as file:
                file.readline()
                for number, line in enumerate(file, 2):
                    if not line.endswith(b"\n"):
                        self.cut = True
                        return
                    try:
                        yield decoder.decode(line)
                    except msgspec.DecodeError as error:
                        raise Failure(f"{self._path}, line {number} is damaged: {one_line(error)}") from None
        except OSError as error:
            raise Failure(f"cannot read {self._path}: {error.strerror or error}") from error
