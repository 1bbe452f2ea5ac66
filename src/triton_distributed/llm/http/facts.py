"""What is known of a request of the OpenAI API, and what its response gets besides its answer."""

from __future__ import annotations

from triton_distributed.integrations.http.request import CLIENT_LEFT
from triton_distributed.llm.contract.output import Usage

KEY = "trd.llm"
"""The front end puts a `Facts` into the scope under this name before it calls the app."""

GONE = "client_left"
"""The error of a request whose client has left, before its task is cancelled."""


class Facts:
    """The app fills it while it answers.

    Attributes:
        headers: further headers of the response. The app sends them, which is cheaper than a `send` that adds them.
        status: of the response once it is complete, of an error once it begins; 499 (the client has left) before.
        model: the name that the caller used; empty if the body was not read.
        stream: whether the answer is streamed.
        begun: whether a part of the response was sent.
        usage: of the whole request, once its answer is complete.
        held: bytes of memory that count for its body; see `Held`.
        error: the code of the error that the caller saw, or its type; empty without one.
    """

    __slots__ = ("begun", "error", "headers", "held", "model", "status", "stream", "usage")

    def __init__(self) -> None:
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.status = CLIENT_LEFT
        self.model = self.error = ""
        self.stream = self.begun = False
        self.held = 0
        self.usage: Usage | None = None

    def arrived(self, tokens: int) -> None:
        """Tokens of the answer have arrived from the worker. It is called often."""
