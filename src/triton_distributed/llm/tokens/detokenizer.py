"""Incremental detokenizing: the text of an answer while its tokens come. Whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from triton_distributed.llm.tokens.tokenizer import Tokenizer

_PATIENCE = 16
"""How many steps in a row may end within a character. Four bytes make one, so more of them are not UTF-8."""


_WINDOW = 64
"""How many tokens are decoded again, if those without a text follow each other."""


class Detokenizer:
    """The state of one answer's text.

    Args:
        tokenizer: of the model.
        skip: tokens without a text, besides the special ones: the ids that end the answer.
        skip_special_tokens: False to write special tokens out.
    """

    __slots__ = ("_bytes", "_held", "_held_steps", "_ids", "_read", "_skip", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip: Collection[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip, self._skip_special = tokenizer, frozenset(skip), skip_special_tokens
        self._bytes = b"" if tokenizer.joins_bytes else None  # of a character that is not complete
        # Otherwise a token's text can depend on the one before it (a leading space). So the tokens of the step before
        # are decoded again with the new ones, and their text, `_held`, is cut off.
        self._ids: list[int] = []
        self._read = 0  # how many of them have been given out
        self._held = ""
        self._held_steps = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens.

        Args:
            token_ids: the next ones.

        Returns:
            The text that is complete by now; it may be empty.
        """
        if self._skip and not self._skip.isdisjoint(token_ids):
            token_ids = [each for each in token_ids if each not in self._skip]
        if self._bytes is not None:
            new = self._tokenizer.joined(token_ids, skip_special_tokens=self._skip_special)
            return self._decoded(self._bytes + new, False)
        if not token_ids:
            return ""
        self._ids.extend(token_ids)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
        if text.endswith("\ufffd") and self._held_steps < _PATIENCE:
            self._held_steps += 1
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The rest of the text. A character that stayed incomplete becomes U+FFFD."""
        if self._bytes is not None:
            return self._decoded(self._bytes, True)
        if self._read == len(self._ids):
            return ""
        return self._advance(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special))

    def _decoded(self, content: bytes, final: bool) -> str:
        text, read = codecs.utf_8_decode(content, "replace", final)
        self._bytes = content[read:]
        return text

    def _advance(self, text: str) -> str:
        new = text[len(self._held) :]
        if not new:  # Only special tokens, or a leading space that is cut off where a text begins.
            if len(self._ids) > _WINDOW:
                del self._ids[self._read :]
            self._read, self._held_steps = len(self._ids), 0
            return ""
        del self._ids[: self._read]
        self._read, self._held_steps = len(self._ids), 0
        self._held = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
        return new
