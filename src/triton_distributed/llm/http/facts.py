"""What is known of a request of the OpenAI API, for the access log and for metrics."""

from __future__ import annotations

from triton_distributed.llm.contract.output import Usage

KEY = "trd.llm"
"""A middleware puts a `Facts`, or its own subclass, into the scope under this name before it calls the app."""


class Facts:
    """The app fills it while it answers.

    Attributes:
        model: the name that the caller used; empty if the body was not read.
        stream: whether the answer is streamed.
        usage: of the whole request, once its answer is complete.
        error: the code of the error that the caller saw, or its type; empty without one.
    """

    __slots__ = ("error", "model", "stream", "usage")

    def __init__(self) -> None:
        self.model = self.error = ""
        self.stream = False
        self.usage: Usage | None = None

    def arrived(self, tokens: int) -> None:
        """Tokens of the answer have arrived from the worker. It is called often."""
