"""Stop texts: an answer ends before the first of them, wherever its pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Looks for stop texts in a text that comes in pieces.

    The stop text that is complete first ends the text; of two that are complete at once, the longer one does. Text that
    may be the beginning of a stop text is held back until it is not.

    Args:
        stop: the stop texts, none of them empty.

    Attributes:
        found: the stop text that was met; None so far.
    """

    __slots__ = ("_held", "_stop", "found")

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add a piece.

        Returns:
            The text that can be given out now. After a stop text was found, it is empty.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        first: tuple[int, int, str] | None = None
        for stop in self._stop:
            at = text.find(stop)
            if at >= 0 and (first is None or (at + len(stop), at) < first[:2]):
                first = at + len(stop), at, stop
        if first is not None:
            self.found, self._held = first[2], ""
            return text[: first[1]]
        cut = len(text) - max((_beginning(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """The text that is held back, at the end of the answer."""
        text, self._held = self._held, ""
        return text


def _beginning(text: str, stop: str) -> int:
    """The length of the longest end of a text that is a beginning of a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
