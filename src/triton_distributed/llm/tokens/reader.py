"""The text of one answer: detokenizing and stop texts together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from triton_distributed.llm.tokens.detokenizer import Detokenizer
from triton_distributed.llm.tokens.stops import StopTexts
from triton_distributed.llm.tokens.tokenizer import Tokenizer


class TextReader:
    """Makes the text of an answer from its tokens, or from its text, and ends it at a stop text.

    The text, the place where it ends and `tokens` do not depend on how the tokens are divided into steps.

    Args:
        tokenizer: of the model; None for an engine that makes text itself.
        stop: the stop texts.
        min_tokens: stop texts are not looked for in the text of this many tokens.
        skip: tokens without a text: those that end the answer.
        skip_special_tokens: False to write special tokens out.
        include_stop: True to keep the stop text at the end of the answer's text.

    Attributes:
        tokens: how many tokens the answer has, up to the one that completed a stop text.
    """

    __slots__ = ("_detokenizer", "_include", "_left", "_stops", "tokens")

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip: Collection[int] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, skip=skip, skip_special_tokens=skip_special_tokens)
        )
        self._stops = StopTexts(stop) if stop else None
        self._left, self._include = min_tokens, include_stop
        self.tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended the answer; None so far."""
        return None if self._stops is None else self._stops.found

    def push(self, token_ids: Sequence[int]) -> str:
        """Add the tokens of a step.

        Returns:
            The text that is complete by now. If `stopped_by` is set after it, the answer has ended.
        """
        detokenizer = self._detokenizer
        assert detokenizer is not None
        if self._stops is None:
            self.tokens += len(token_ids)
            return detokenizer.push(token_ids)
        text = ""
        for each in token_ids:  # One by one: the token that completes a stop text is the last one that counts.
            if self._stops.found is not None:
                break
            self.tokens += 1
            text += self._checked(detokenizer.push((each,)))
        return text

    def push_text(self, text: str, tokens: int = 0) -> str:
        """Add the text of a step, from an engine that makes text itself.

        Args:
            text: the new text.
            tokens: how many tokens it is made of, if that is known.
        """
        if self.stopped_by is not None:
            return ""
        self.tokens += tokens
        return self._checked(text, max(tokens, 1))

    def finish(self) -> str:
        """The rest of the text, at the end of the answer. It too can complete a stop text."""
        if self.stopped_by is not None:
            return ""
        rest = "" if self._detokenizer is None else self._detokenizer.finish()
        if self._stops is None:
            return rest
        text = self._checked(rest, 0)
        return text if self._stops.found is not None else text + self._stops.finish()

    def _checked(self, text: str, tokens: int = 1) -> str:
        if self._stops is None:
            return text
        if self._left > 0:
            self._left -= tokens
            return text
        text = self._stops.push(text)
        found = self._stops.found
        return text + found if found is not None and self._include else text
