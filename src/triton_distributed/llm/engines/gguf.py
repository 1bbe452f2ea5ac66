"""Reads the metadata of GGUF files, the format of llama.cpp's models. Pure, apart from the file that it reads.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

__all__: list[str] = []

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_LONGEST = 1 << 28  # bytes of a text, or items of a list: no real file has more


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file: numbers, texts and lists of them, by key.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a GGUF file of version 2 or 3, or it is damaged.
    """
    with Path(path).open("rb") as file:
        try:
            return _metadata(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from None


def _metadata(file: BinaryIO) -> dict[str, Any]:
    if file.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    version = _number(file, "I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3 in little-endian order")
    _number(file, "Q")  # the number of tensors
    found = {}
    for _ in range(_length(file)):
        key = _text(file)
        found[key] = _value(file, _number(file, "I"))
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        if kind not in _NUMBERS:
            raise ValueError(f"the file is damaged: no type has the number {kind}")
        return _number(file, _NUMBERS[kind])
    kind = _number(file, "I")
    length = _length(file)
    if code := _NUMBERS.get(kind):
        packed = struct.Struct(f"<{length}{code}")
        return list(packed.unpack(_bytes(file, packed.size)))
    return [_value(file, kind) for _ in range(length)]


def _text(file: BinaryIO) -> str:
    return _bytes(file, _length(file)).decode("utf-8", "surrogateescape")


def _length(file: BinaryIO) -> int:
    length: int = _number(file, "Q")
    if length > _LONGEST:
        raise ValueError("the file is damaged: a length is impossible")
    return length


def _number(file: BinaryIO, code: str) -> Any:
    packed = struct.Struct("<" + code)
    return packed.unpack(_bytes(file, packed.size))[0]


def _bytes(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise EOFError("the file is damaged: it ends too early")
    return found
