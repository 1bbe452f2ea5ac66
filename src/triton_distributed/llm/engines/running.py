"""What engines that stand on another engine share: counted requests, and its refusals as errors of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton_distributed.llm.contract.engine import EngineMetrics
from triton_distributed.llm.contract.errors import EngineDead, InvalidParameter
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.contract.request import Request

__all__: list[str] = []


class Counted:
    """The tokens of a request: the engine sets `generated` and `cached`."""

    def __init__(self, request: Request) -> None:
        self.prompt = len(request.prompt) // 4
        self.generated = self.cached = 0

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(self.prompt, self.generated, self.cached)


class Running:
    """The requests that are in an engine, and the tokens since its start."""

    def __init__(self) -> None:
        self._active = self._prompt = self._cached = self._generated = 0

    @contextmanager
    def request(
        self, request: Request, *, refusal: type[Exception] = ValueError, death: type[Exception] = EngineDead
    ) -> Iterator[Counted]:
        """Count a request that runs in the block.

        Args:
            request: what is asked.
            refusal: what the engine raises, besides `ValueError`, if a request is invalid.
            death: what the engine raises if it can compute nothing any more.

        Raises:
            InvalidParameter: the block raised a refusal; its `parameter` is the field, if it has one.
            EngineDead: the block raised a `death`.
        """
        one = Counted(request)
        self._active += 1
        try:
            yield one
        except (InvalidParameter, EngineDead):
            raise
        except death as error:
            raise EngineDead(str(error)) from error
        except (ValueError, refusal) as error:
            raise InvalidParameter(getattr(error, "parameter", None) or "request", str(error)) from error
        finally:
            self._active -= 1
            self._prompt += one.prompt
            self._cached += one.cached
            self._generated += one.generated

    def metrics(self) -> EngineMetrics:
        """The requests that run now, and the tokens of those that have ended."""
        return EngineMetrics(
            active=self._active,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            generated_tokens=self._generated,
        )
