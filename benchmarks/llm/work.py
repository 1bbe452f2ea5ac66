"""The requests of the benchmarks. Standard library only: servers of other systems read it too."""

from __future__ import annotations

import json
from dataclasses import dataclass

CONTENT = "Say hello to the world."


@dataclass(frozen=True)
class Work:
    """A chat request.

    Args:
        name: of the workload. The model has the same name.
        tokens: of the answer.
        stream: whether the answer is streamed.
        each: whether each token of the answer comes alone; else all come at once.
        step_s: the time from one token to the next; 0 for none.
    """

    name: str
    tokens: int
    stream: bool
    each: bool = False
    step_s: float = 0.0

    @property
    def endless(self) -> bool:
        """Whether the answer lasts longer than its reader wants it."""
        return self.tokens * self.step_s > 10

    def body(self, model: str = "", content: str = "", tokens: int = 0) -> str:
        """The body of the request.

        Args:
            model: the model's name, if it is not that of the workload.
            content: the user's message, if it is not the usual one.
            tokens: of the answer, if they are not those of the workload.
        """
        message = {"role": "user", "content": content or CONTENT}
        limit = {"max_tokens": tokens or self.tokens, "stream": self.stream}
        return json.dumps({"model": model or self.name, "messages": [message], **limit})


WHOLE = Work("whole", 16, stream=False)
SINGLE = Work("single", 16, stream=True)
CHUNKS = Work("chunks", 200, stream=True, each=True)
PACED = Work("paced", 200, stream=True, each=True, step_s=0.01)
STEPS = Work("steps", 4_000, stream=True, each=True, step_s=0.02)
EVERY = {each.name: each for each in (WHOLE, SINGLE, CHUNKS, PACED, STEPS)}
