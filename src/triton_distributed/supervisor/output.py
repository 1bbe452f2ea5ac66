"""The output of all replicas as one stream of lines, each with the replica's number: `[0] text`.

In a log of JSON, a line that is an object stays one: it gets the field `replica` instead. Each other line of standard
error becomes an object, with the field `message`.

A thread copies it, because writing may block: a reader of the output that stands still must not stop the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import sys
import threading
from typing import IO, Any

import msgspec

LONGEST_LINE = 64 * 1024
"""Bytes of a line that are held; a longer one is written in parts."""

FLUSH_S = 1.0
"""Seconds that the end of the supervisor waits for the output to be written."""


class _Source:
    """One pipe of a replica."""

    def __init__(self, pipe: IO[bytes], name: str, target: IO[str] | None, json: bool, log: bool) -> None:
        self.pipe = pipe
        self.whole = json and log
        self.field = f'{{"replica":{name},'.encode() if json else None
        self.prefix = f"[{name}] ".encode()
        self.target = target
        self.rest = b""

    def lines(self, data: bytes) -> bytes:
        """Return the complete lines, with the prefix; without data, also the incomplete one."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) >= LONGEST_LINE):
            lines.append(self.rest)
            self.rest = b""
        return b"".join(self._named(line) + b"\n" for line in lines)

    def _named(self, line: bytes) -> bytes:
        if self.field is not None and line.startswith(b'{"') and line.endswith(b"}"):
            return self.field + line[1:]
        if self.field is not None and self.whole:
            return self.field + b'"message":' + msgspec.json.encode(line.decode(errors="backslashreplace")) + b"}"
        return self.prefix + line


class Output:
    """Copies what replicas write. The thread starts at once and runs until `close`.

    Args:
        json: the log has one JSON object in each line.
    """

    def __init__(self, json: bool = False) -> None:
        self._json = json
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._new: list[_Source] = []
        self._own: list[str] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trd-output", daemon=True)
        self._thread.start()

    def add(self, pipe: IO[bytes], name: str, target: IO[str] | None, log: bool = False) -> None:
        """Copy a pipe until its end, and close it then.

        Args:
            pipe: the pipe's end for reading, without a buffer.
            name: the replica's, which begins each line.
            target: where the lines go; None to discard them.
            log: it is standard error, which has the log.
        """
        os.set_blocking(pipe.fileno(), False)
        with self._lock:
            self._new.append(_Source(pipe, name, target, self._json, log))
        os.write(self._woken, b"\0")

    def say(self, line: str) -> None:
        """Write a line of the supervisor's own to standard output, after all that replicas have written before."""
        with self._lock:
            self._own.append(line)
        os.write(self._woken, b"\0")

    def close(self) -> None:
        """Write what has arrived, and stop. If the reader of the output stands still, the rest is lost."""
        self._closing = True
        os.write(self._woken, b"\0")
        self._thread.join(FLUSH_S)
        if not self._thread.is_alive():
            os.close(self._woken)

    def _run(self) -> None:
        closing = woken = False
        while not closing:
            # What a replica has written before the wake-up is found by the same select.
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._copy(key.data)
                else:
                    os.read(self._wake, 4096)
                    woken = True
            if woken:
                woken, closing = False, self._closing
                with self._lock:
                    new, self._new, own, self._own = self._new, [], self._own, []
                _write(sys.stdout, "".join(f"{line}\n" for line in own).encode())
                for each in new:
                    self._selector.register(each.pipe, selectors.EVENT_READ, each)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._drain(key.data)
        self._selector.close()
        os.close(self._wake)

    def _copy(self, source: _Source) -> bool:
        """Copy what one read returns; return whether there may be more."""
        try:
            data = os.read(source.pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        _write(source.target, source.lines(data))
        if not data:
            self._selector.unregister(source.pipe)
            source.pipe.close()
        return bool(data)

    def _drain(self, source: _Source) -> None:
        """Copy what is in the pipe. A process that a replica left behind may hold the pipe open."""
        while self._copy(source):
            pass
        if not source.pipe.closed:
            _write(source.target, source.lines(b""))
            source.pipe.close()


def _write(target: Any, data: bytes) -> None:
    """Write all bytes. A target that cannot be written to, e.g. because its reader has left, gets nothing."""
    if target is None or not data:
        return
    try:
        number = target.fileno()
    except (AttributeError, OSError, ValueError):  # The program has replaced it by an object of its own.
        with contextlib.suppress(Exception):
            target.write(data.decode(errors="backslashreplace"))
        return
    # Not the stream's own buffer: its lock, held by this thread when the interpreter ends, would be a fatal error.
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(number, view) :]
        except BlockingIOError:
            select.select([], [number], [])
        except OSError:
            return
