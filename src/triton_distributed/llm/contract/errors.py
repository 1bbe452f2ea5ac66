"""The errors of models and their requests."""

from __future__ import annotations

from collections.abc import Sequence

from triton_distributed.errors import TritonError


class LLMError(TritonError):
    """The base of these errors."""


class ModelNotFound(LLMError, LookupError):
    """No worker serves a model of this name.

    Fields: `name`, `known` (the names of the models that are served).
    """

    def __init__(self, name: str, known: Sequence[str] = ()) -> None:
        super().__init__(name, tuple(known))
        self.name, self.known = name, tuple(known)

    def __str__(self) -> str:
        served = ", ".join(self.known) or "none"
        return f"the model {self.name!r} is not served; models that are: {served}"


class PrefillOnly(LLMError, LookupError):
    """All workers of a model have the role `prefill`, and none can answer.

    Field: `name`.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the model {self.name!r} has prefill workers only; start one with `--role decode` or without `--role`"


class InvalidParameter(LLMError, ValueError):
    """A field of a request is invalid, or the model cannot do what it asks.

    Fields: `param` (the field, e.g. `stop` or `messages[0].content`), `reason`, `code` (for programs; may be empty).
    """

    callers_fault = True  # A worker logs it as one line, at the level INFO.

    def __init__(self, param: str, reason: str, code: str = "") -> None:
        super().__init__(param, reason, code)
        self.param, self.reason, self.code = param, reason, code

    def __str__(self) -> str:
        return f"{self.param}: {self.reason}"


class ModelConflict(LLMError):
    """A worker's model has the name and the generation of another one that is served, and a different card.

    Fields: `name`, `generation`, `differences` (a text for each field that differs), `served_by` (an instance).
    """

    def __init__(self, name: str, generation: int, differences: Sequence[str], served_by: str) -> None:
        super().__init__(name, generation, tuple(differences), served_by)
        self.name, self.generation, self.served_by = name, generation, served_by
        self.differences = tuple(differences)

    def __str__(self) -> str:
        found = "".join(f"\n  - {each}" for each in self.differences)
        return (
            f"the model {self.name!r}, generation {self.generation}, is already served by {self.served_by}, "
            f"with another card:{found}\nServe this one under another name, or as generation {self.generation + 1}"
        )


class AnswerLost(LLMError, ConnectionError):
    """The worker of an answer was lost in the middle, and no other worker can continue the answer exactly.

    Fields: `model`, `reason` (why not), `tokens` (how many tokens of the answer the caller has).
    """

    def __init__(self, model: str, reason: str, tokens: int) -> None:
        super().__init__(model, reason, tokens)
        self.model, self.reason, self.tokens = model, reason, tokens

    def __str__(self) -> str:
        return f"the worker of model {self.model!r} was lost after {self.tokens} tokens of the answer: {self.reason}"


class EngineStalled(LLMError, TimeoutError):
    """A worker has made no progress with a request for too long.

    Fields: `model`, `seconds`.
    """

    def __init__(self, model: str, seconds: float) -> None:
        super().__init__(model, seconds)
        self.model, self.seconds = model, seconds

    def __str__(self) -> str:
        return f"the worker of model {self.model!r} has made no progress for {self.seconds:g} s"


class EngineDead(LLMError):
    """An engine can compute nothing any more, so no further request should reach it.

    An engine raises it in `generate` or `embed`. Its worker then stops serving the model, and ends with this error.
    Running answers go on at other workers, as far as these can continue them.

    Field: `reason`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the engine is dead: {self.reason}"


class NoWorkers(LLMError, LookupError):
    """A `KvRouter` knows no worker. The text begins as the original's, with its spelling.

    Fields: `component`, `seconds` (how long it has waited).
    """

    def __init__(self, component: str, seconds: float) -> None:
        super().__init__(component, seconds)
        self.component, self.seconds = component, seconds

    def __str__(self) -> str:
        return (
            f"no endpoints aviailable to route work: no worker of {self.component} has told its load within "
            f"{self.seconds:g} s; workers tell it with KvMetricsPublisher"
        )


class RouterClosed(LLMError):
    """The runtime of a `KvRouter` or `KvIndexer` was shut down. The text is the original's."""

    def __str__(self) -> str:
        return "endpoint subscriber shutdown"
