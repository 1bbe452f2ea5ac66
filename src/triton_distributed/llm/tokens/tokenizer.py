"""Tokenizers: text to packed token ids and back, with the fastest library that can read the model's file."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from triton_distributed.llm.contract.errors import LLMError
from triton_distributed.llm.contract.request import packed

if TYPE_CHECKING:
    import fastokens
    import tokenizers

_SEGMENT_CACHE_BYTES = 16 << 20
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer(ABC):
    """Turns text into token ids and back. All methods may be called from any thread.

    Attributes:
        vocabulary: ids are below it; 0 if it is not known.
        joins_bytes: the text of tokens is that of their bytes, one after the other. So each token can be decoded once.
    """

    vocabulary: int = 0
    joins_bytes: bool = False

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        """Turn text into token ids, packed as in `Request.prompt`.

        Args:
            text: the text. Special tokens that are written out in it become these tokens.
            add_special_tokens: add what the tokenizer puts around a text, e.g. a token of the beginning.

        Raises:
            UnicodeEncodeError: the text has half of a surrogate pair.
        """

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text. Ids above the vocabulary have no text; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the text of one token has, also where they are a part of a character."""

    def joined(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> bytes:
        """The bytes of several tokens, as `decode` makes text of them if `joins_bytes` is set."""
        return b"".join(map(self.token_bytes, token_ids))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a whole answer, as `Detokenizer` makes it in steps. Special tokens have none."""
        return self.joined(token_ids).decode(errors="replace") if self.joins_bytes else self.decode(token_ids)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special ones included. Parts of a character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


def load_tokenizer(content: bytes | Literal["bytes"]) -> Tokenizer:
    """Make a tokenizer. It takes up to 0.1 s, so call it in a thread.

    Args:
        content: a `tokenizer.json`, or `bytes`: see `Model.tokenizer`.

    Raises:
        LLMError: no installed library can read the content. The error names the reasons.
        ImportError: no such library is installed.
    """
    if content == "bytes":
        return ByteTokenizer()
    assert isinstance(content, bytes)
    try:
        text = content.decode()
        shape = msgspec.json.decode(content, type=_File)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise LLMError(f"the model's tokenizer is not a tokenizer.json: {error}") from error
    refusals: list[str] = []
    for backend in (_Fastokens, _Tokenizers):
        try:
            return backend(text, shape)
        except ImportError:
            continue
        except Exception as error:  # Both libraries raise several classes, Exception itself among them.
            refusals.append(f"{backend.library}: {error}")
    if not refusals:
        raise ImportError("tokenizers of models need a library: pip install 'triton-distributed[llm]'")
    raise LLMError(f"the model's tokenizer cannot be read: {'; '.join(refusals)}")


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8. Ids above 255 are special tokens without a text."""

    joins_bytes = True

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        content = text.encode()
        found = bytearray(4 * len(content))
        found[::4] = content
        return bytes(found)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return byte_tokens(token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return byte_tokens((token_id,))

    def joined(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> bytes:
        return byte_tokens(token_ids)


def byte_tokens(token_ids: Sequence[int]) -> bytes:
    """The bytes of tokens that are bytes, without special tokens."""
    try:
        return bytes(token_ids)
    except ValueError:
        return bytes(each for each in token_ids if 0 <= each < 256)


class _AddedToken(msgspec.Struct):
    id: int
    special: bool = False


class _File(msgspec.Struct):
    """The parts of a tokenizer.json that are read here."""

    model: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    decoder: Any = None


class _FromFile(Tokenizer):
    """A tokenizer of a tokenizer.json."""

    library = ""
    _native: Any

    def __init__(self, shape: _File) -> None:
        kinds = set(_types(shape.decoder))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._space = bool(kinds & {"ByteFallback", "Metaspace"})  # A leading U+2581 stands for a space.
        self._added = {each.id for each in shape.added_tokens}
        self.joins_bytes = kinds == {"ByteLevel"}
        self._shown = _Shown(self, {each.id for each in shape.added_tokens if each.special})

    def token_bytes(self, token_id: int) -> bytes:
        token: str | None = self._native.id_to_token(token_id)
        if token is None:
            return b""
        if token_id not in self._added:
            if self._byte_level:
                try:
                    return bytes(map(_BYTE_OF.__getitem__, token))
                except KeyError:
                    return token.encode()
            if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes.fromhex(match[1])
            if self._space:
                return token.replace("\u2581", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def joined(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> bytes:
        return b"".join(map(self._shown.__getitem__ if skip_special_tokens else self.token_bytes, token_ids))


class _Shown(dict[int, bytes]):
    """The bytes of each token that has been asked for; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer, special: set[int]) -> None:
        self._tokenizer, self._special = tokenizer, special

    def __missing__(self, token_id: int) -> bytes:
        found = b"" if token_id in self._special else self._tokenizer.token_bytes(token_id)
        if token_id < self._tokenizer.vocabulary:
            self[token_id] = found
        return found


class _Fastokens(_FromFile):
    library = "fastokens"
    _native: fastokens.Tokenizer

    def __init__(self, text: str, shape: _File) -> None:
        from fastokens import Tokenizer as Native

        super().__init__(shape)
        self._native = Native.from_json_str(text)
        self._native.no_truncation()
        self._native.no_padding()
        self._native.enable_segment_cache(_SEGMENT_CACHE_BYTES)
        self.vocabulary = max(self._native.vocab_size, max(self._added, default=-1) + 1)

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        found: bytes = self._native.encode_batch_flat([text], add_special_tokens=add_special_tokens)[0]
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._native.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text


class _Tokenizers(_FromFile):
    library = "tokenizers"
    _native: tokenizers.Tokenizer

    def __init__(self, text: str, shape: _File) -> None:
        from tokenizers import Tokenizer as Native

        super().__init__(shape)
        self._native = Native.from_str(text)
        self._native.no_truncation()
        self._native.no_padding()
        self.vocabulary = max(self._native.get_vocab_size(), max(self._added, default=-1) + 1)

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        text.encode()  # The library raises a TypeError about the form of its input otherwise.
        # `encode` and `encode_batch` hold the GIL for the whole text.
        return packed(self._native.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._native.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _types(decoder: Any) -> list[str]:
    """The types of a decoder and of those that it is composed of."""
    if not isinstance(decoder, dict):
        return []
    inner = [found for each in decoder.get("decoders") or () for found in _types(each)]
    return [str(decoder.get("type")), *inner]


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: GPT-2's table."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_of()
