"""One answer: the outputs of a worker as text, and of the next worker when the first one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import weakref
from array import array
from typing import Any, Final, Self

import msgspec

from triton_distributed.api.targets import Target
from triton_distributed.calling.call import Call
from triton_distributed.calling.item_stream import CANCELLED
from triton_distributed.calling.state import ENDED, OPEN
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    NoInstances,
    Overloaded,
    Refusal,
    RemoteError,
    StreamClosed,
    StreamIncomplete,
)
from triton_distributed.llm.contract.errors import AnswerLost, EngineDead, EngineStalled, InvalidParameter, LLMError
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Output
from triton_distributed.llm.contract.request import Request, encoded, packed
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.elsewhere import Elsewhere
from triton_distributed.llm.models.loss import Next, Progress, decide
from triton_distributed.llm.models.routed import Routed
from triton_distributed.llm.models.stalls import FIRST, StallWatch
from triton_distributed.llm.models.text import AnswerText
from triton_distributed.llm.router.placement import Placement
from triton_distributed.llm.routing.view import Decision
from triton_distributed.routing.policies import Policy

logger = logging.getLogger("triton_distributed.llm")

END_S: Final = 1.0
"""Seconds to wait for the end of the stream after the last output."""

PAUSE_S: Final = 0.05
"""Seconds until a refused continuation is tried again, if the worker does not say. They double up to 1 s."""

TICK_S: Final = 0.001
"""When less time than this is left before a limit, the limit is reached: clocks have a resolution."""

_NEVER: Final = float("inf")


class Answer:
    """The deltas of one answer, to be read with `async for` by one task.

    The call has begun when this object exists, unless the router holds the request: then it begins when it is no longer
    held, whether the answer is read or not.

    Leaving it early, by `aclose()`, by cancelling the reading task or by dropping it, cancels the engine's work.
    Exactly one delta has a finish reason: the last one.

    Args:
        target: `generate` of the model.
        card: the model.
        request: what is sent, with its prompt.
        text: makes text of the tokens.
        stalls: watches the answer. Its timeout is the time between two outputs after which the worker has stalled; see
            `FIRST`.
        options: options of the call; see `StreamOptions`. `timeout` is for the whole answer.
        routed: chooses the worker; None to leave it to the call's policy.
        tokens: of the prompt; 0 if they are not known.
        session: names a conversation or a user, for the router.
        explain: the decision has all candidates.

    Attributes:
        losses: how many workers were lost, or have stalled, so far.
        tokens: of the prompt; 0 if they are not known.

    Raises:
        Overloaded: the router holds too many requests.
        InvalidParameter: a value of the request cannot travel.

    Raises, from iteration:
        Overloaded, Draining, Paused, NoInstances, ConnectionFailed: no worker takes the request.
        DeadlineExceeded: the time is over.
        AnswerLost: the worker was lost, and the answer cannot go on elsewhere.
        EngineStalled: the same, of a worker that makes no progress.
        StreamIncomplete: worker after worker was lost before the first token.
        RemoteError: the engine failed; `InvalidRequest` or `InvalidParameter` if it cannot do what the request asks.
        LLMError: the engine broke its contract.
    """

    __slots__ = (
        "__weakref__", "_avoided", "_barren", "_call", "_card", "_deadline", "_finished", "_first", "_loop", "_options",
        "_over", "_pause", "_pause_s", "_placement", "_policy", "_request", "_routed", "_session", "_since", "_stall_s",
        "_stalled", "_target", "_text", "_tokens", "_until", "losses", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        target: Target,
        card: ModelCard,
        request: Request,
        text: AnswerText,
        stalls: StallWatch,
        options: dict[str, Any],
        routed: Routed | None = None,
        tokens: int = 0,
        session: str = "",
        explain: bool = False,
    ) -> None:
        self._call: Call | None = None  # None while the router holds the request.
        if "resume" in options:
            raise TypeError("answer() takes no resume=: the answer goes on at another worker without it")
        self._loop = asyncio.get_running_loop()
        self._target = target
        self._card = card
        self._request = request
        self._text = text
        self._stall_s = stalls.timeout_s
        self._policy = options.pop("policy", None)
        self._options: dict[str, Any] = {"idempotent": True, **options}
        timeout = options.get("timeout")
        self._deadline = None if timeout is None else self._loop.time() + timeout
        self._tokens = array("I")  # Of the whole answer.
        self._barren = 0  # Workers lost in a row without a new token.
        self._avoided: Elsewhere | None = None  # The instances that were lost or have stalled.
        self._first = True  # The present worker has sent no output.
        self._finished = self._over = self._stalled = False
        self._since = _NEVER  # Since when a reader waits for the next output.
        self._pause: asyncio.Future[None] | None = None
        self._until, self._pause_s = 0.0, PAUSE_S  # How long, and how often, a refused continuation is tried again.
        self.losses = 0
        self._routed, self._session, self.tokens = routed, session, tokens
        self._placement: Placement | None = None
        waiter = None
        if routed is not None:
            self._placement = routed.place(routed.question(request, tokens, session, explain), self._options)
            request.router = routed.router.id
            waiter = self._placement.waiter
        if waiter is None:
            self._send(request)
        else:
            waiter.add_done_callback(_Beginning(self))
        stalls.add(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._finished:
                await self._read_end()
                raise StopAsyncIteration
            delta: Delta | None = None
            while True:
                call = self._call
                if call is None:
                    await self._placed()
                    continue
                try:
                    while (output := next(call.items, None)) is None:
                        if taken := call.take():
                            if taken == ENDED:
                                break
                            continue
                        self._since = self._loop.time()
                        try:
                            await call.pending()
                        except asyncio.CancelledError:
                            call.leave(CANCELLED)
                            raise
                except (StreamIncomplete, EngineDead, asyncio.CancelledError) as error:
                    delta = self._lost(error)
                except (Refusal, NoInstances, ConnectionFailed) as error:
                    await self._refused(error)
                except ValueError as error:
                    if not isinstance(error, RemoteError) or not self._without_transfer():
                        cause = error.__cause__
                        raise cause if isinstance(cause, EngineStalled) else error from None  # `Elsewhere` raises it.
                else:
                    self._since = _NEVER
                    if output is None:
                        raise LLMError(f"the engine of {self._card.name!r} ended an answer without a reason")
                    delta = self._taken(output)
                if delta is not None:
                    return delta
        except BaseException:
            self._close()
            raise

    async def more(self) -> Delta | None:
        """Return the next delta if it is there already, and None if it has to be waited for."""
        call = self._call
        assert call is not None  # There was a delta before.
        try:
            while not self._finished and not self._over:
                output = next(call.items, None)
                if output is None:
                    if call.stream is None or not call.stream.inbox:
                        break
                    call.take()
                elif (delta := self._taken(output)) is not None:
                    return delta
        except BaseException:
            self._close()
            raise
        return None

    async def aclose(self) -> None:
        """Cancel the engine's work, if the answer is not over. A task that waits for the next delta is cancelled."""
        self._close()

    def _close(self) -> None:
        if self._over:
            return
        self._over = True
        if self._pause is not None:
            self._pause.cancel()
        if self._placement is not None:
            self._placement.release()
        if self._call is not None and self._call.state <= OPEN:
            self._call.cancel()

    def __del__(self) -> None:
        call = self._call
        if call is not None and call.state <= OPEN:
            call.services.from_finalizer(call.leave)

    @property
    def decision(self) -> Decision | None:
        """Which worker the router has chosen last, and why; None before a choice, and without a router."""
        return None if self._placement is None else self._placement.decision

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    # The place of the request.

    async def _placed(self) -> None:
        """Wait until the router does not hold the request any more.

        Raises:
            DeadlineExceeded: the time of the answer is over.
            NoInstances: the last worker has left meanwhile.
            ValueError: the router's policy is a user's own, and it failed.
        """
        assert self._placement is not None
        waiter = self._placement.waiter
        assert waiter is not None
        try:
            async with asyncio.timeout_at(self._deadline):
                await waiter
        except TimeoutError:
            raise DeadlineExceeded(f"the model {self._card.name!r}", self._options["timeout"]) from None
        except asyncio.CancelledError:
            if self._over or _is_cancelled():
                raise
            raise NoInstances(f"the model {self._card.name!r}") from None
        if self._call is None:
            self._send(self._request)

    def begin(self) -> None:
        """Call the worker, since the router does not hold the request any more."""
        placement = self._placement
        if self._over or placement is None:
            return
        if self._routed is not None and placement.decision is not None:
            self._routed.held(placement.decision)
        with contextlib.suppress(Exception):  # The reader tries again, and sees the error.
            self._send(self._request)

    def _begun(self, output: Output) -> None:
        """Note the first output of a worker."""
        self._first = False
        placement, routed = self._placement, self._routed
        if placement is None or routed is None:
            return
        placement.first_output(None if output.usage is None else output.usage.cached_tokens)
        if placement.kv_transfer is not None and placement.handover is not None:
            self._text.computed_elsewhere(placement.handover.cached_tokens)
        if placement.decision is not None:
            routed.begun(placement.decision)

    # The way of each output.

    def _taken(self, output: Output) -> Delta | None:
        """Turn an output into a delta; None if it has nothing for the caller yet."""
        ids = output.token_ids
        if ids:
            try:
                self._tokens.extend(ids)
            except OverflowError:
                raise LLMError(f"the engine of {self._card.name!r} answered with an invalid token id: {ids}") from None
            self._barren = 0
        if self._first:
            self._begun(output)
        delta = self._text.taken(output)
        if delta is not None and delta.finish_reason is not None:
            self._finished = True
            if self._placement is not None:
                self._placement.release()
                if self._routed is not None and output.usage is not None and not self.losses:
                    self._routed.measured(0 if delta.usage is None else delta.usage.cached_tokens)
            assert self._call is not None
            if output.finish_reason is None or self._call.state > OPEN:  # After a stop text, the engine would go on.
                self._close()
        return delta

    async def _read_end(self) -> None:
        """Read the end of the stream after the last output, so that the call counts as answered and not as left."""
        call = self._call
        assert call is not None
        timer = self._loop.call_later(END_S, call.cancel)
        try:
            # An output after the last one is the engine's mistake. The answer is whole.
            while next(call.items, None) is None and not call.take():
                await call.pending()
        except (StreamIncomplete, RemoteError):
            pass
        except asyncio.CancelledError:
            if _is_cancelled() or self._over:
                raise
        finally:
            timer.cancel()

    # After a loss.

    def _lost(self, error: BaseException) -> Delta | None:
        """Go on at another worker; return the last delta if the answer is complete already.

        Raises:
            BaseException: the answer cannot go on, or the reader has left.
        """
        stalled = self._stalled and not _is_cancelled() and not self._over
        dead = isinstance(error, EngineDead)  # It is a RemoteError, too.
        foreign = isinstance(error, RemoteError | StreamClosed) and not dead
        if foreign or not (stalled or dead or isinstance(error, StreamIncomplete)):
            raise error
        self._since, self._stalled = _NEVER, False
        instances = error.instances if isinstance(error, StreamIncomplete) else 1
        self.losses += instances
        self._barren += instances
        call = self._call
        assert call is not None
        lost_id = None if call.instance is None else call.instance.id
        seconds = self._limit_s
        if self._avoided is None:
            policy = self._policy if self._placement is None else self._placement
            self._avoided = Elsewhere(policy, self._card.name)
        self._avoided.add(lost_id, seconds if stalled else 0.0)
        text = self._text
        known = Progress(len(self._tokens), text.engine_text, text.ends(self._tokens), self._barren)
        following = decide(self._request, self._card.continues, known)
        if self._card.decode_only and following in (Next.AGAIN, Next.CONTINUE):
            following = "no other worker can compute its prompt"
        if following is Next.STOPPED or following is Next.LENGTH:
            delta = text.finished("stop" if following is Next.STOPPED else "length")
            self._close()
            return delta
        if isinstance(following, str):
            if stalled:
                raise EngineStalled(self._card.name, seconds) from None
            if not known.tokens and not known.engine_text:
                raise error
            raise AnswerLost(self._card.name, following, known.tokens) from error
        logger.info(
            "an answer of model %r goes on at another worker after %d tokens: instance %s: %s",
            self._card.name, known.tokens, lost_id, "it has stalled" if stalled else error,
        )  # fmt: skip
        text.new_worker()
        self._until, self._pause_s = self._loop.time() + self._stall_s, PAUSE_S
        request = self._rest() if following is Next.CONTINUE else self._request
        if self._placement is not None and self._routed is not None:
            self._placement.again(self._routed.question(request, len(request.prompt) // 4, self._session))
        self._send(request)
        return None

    def _without_transfer(self) -> bool:
        """Send a request again whose worker has failed before the first token, if it had to fetch its prompt's blocks.

        Perhaps they are lost with the prefill worker. This time the worker computes the prompt itself.
        """
        placement = self._placement
        if placement is None or placement.kv_transfer is None or not self._first or self._card.decode_only:
            return False
        logger.info("an answer of model %r begins again, without the computed prompt", self._card.name)
        placement.again()
        self._send(self._request)
        return True

    def _rest(self) -> Request:
        """The request for the rest of the answer."""
        request, tokens = self._request, self._tokens
        return msgspec.structs.replace(
            request,
            prompt=request.prompt + packed(tokens),
            continued=request.continued + len(tokens),
            max_tokens=request.max_tokens - len(tokens),
            min_tokens=max(0, request.min_tokens - len(tokens)),
        )

    def _send(self, request: Request) -> None:
        """Call a worker.

        Raises:
            DeadlineExceeded: the time of the answer is over.
            InvalidParameter: a value cannot travel, as a whole number above 64 bits.
        """
        self._first = True
        options, placement = self._options, self._placement
        if placement is not None:
            request.rank, request.kv_transfer = placement.rank, placement.kv_transfer
        if self._deadline is not None:
            left = self._deadline - self._loop.time()
            if left <= 0:
                raise DeadlineExceeded(f"the model {self._card.name!r}", self._options["timeout"])
            options = {**options, "timeout": left}
        try:
            self._call = self._target.start(request, self._chooses(), options, encoded(request))
        except ValueError as error:
            path, _, reason = str(error).partition(": ")
            if type(error) is not ValueError or not path.startswith("request."):
                raise
            param = re.sub(r'\["(\w+)"\]', r".\1", path.removeprefix("request."))
            raise InvalidParameter(param, reason, "invalid_value") from None

    def _chooses(self) -> Policy:
        """The policy of the next call."""
        if self._avoided is None and self._placement is not None:
            return self._placement
        return self._target.client.policy_of(self._policy if self._avoided is None else self._avoided)

    async def _refused(self, error: Refusal | NoInstances | ConnectionFailed) -> None:
        """Try again a little later if the caller has a part of the answer. Other callers learn of the refusal.

        Raises:
            AnswerLost: no worker has taken the rest for `stall_timeout_s`.
        """
        self._since = _NEVER
        if isinstance(error, RemoteError) or not self._tokens:
            raise error
        now = self._loop.time()
        if now >= self._until:
            raise AnswerLost(
                self._card.name, f"no other worker takes the rest{_why(error)}", len(self._tokens)
            ) from error
        if self._placement is not None:
            self._placement.again()
        hint = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        await self._wait(min(hint or random.uniform(0.5, 1.5) * self._pause_s, self._until - now))
        self._pause_s = min(1.0, 2 * self._pause_s)
        self._send(self._rest())

    async def _wait(self, seconds: float) -> None:
        """Sleep until `aclose` at the latest."""
        self._since = _NEVER
        self._pause = self._loop.create_future()
        handle = self._loop.call_later(seconds, _wake, self._pause)
        try:
            await self._pause
        finally:
            handle.cancel()
            self._pause = None

    # The progress timeout.

    @property
    def _limit_s(self) -> float:
        return self._stall_s * (FIRST if self._first else 1)

    def watch(self) -> float | None:
        """Cancel the worker if it makes no progress. Called by `StallWatch`."""
        if self._over or self._finished:
            return None
        now = self._loop.time()
        limit, call = self._limit_s, self._call
        if call is None:
            return limit
        if self._first and self._since != _NEVER and not (call.stream is not None and call.stream.accepted):
            self._since = now
        left = limit if self._since == _NEVER else self._since + limit - now
        if left < TICK_S:
            self._stalled = True
            call.cancel()  # The reader gets CancelledError.
            left = limit
        return left


class _Beginning:
    """Begins the call of an answer when its router no longer holds it. It does not keep the answer alive."""

    __slots__ = ("_answer",)

    def __init__(self, answer: Answer) -> None:
        self._answer = weakref.ref(answer)

    def __call__(self, waiter: asyncio.Future[None]) -> None:
        if waiter.cancelled() or waiter.exception() is not None:  # The reader gets the error.
            return
        if (answer := self._answer()) is not None:
            answer.begin()


def _why(error: Refusal | NoInstances | ConnectionFailed) -> str:
    """Why no worker takes the rest of an answer, for callers: without an address."""
    if isinstance(error, Overloaded):
        return ": they are at capacity"
    return ": no worker is left" if isinstance(error, NoInstances) else ""


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _is_cancelled() -> bool:
    """Whether the task that runs was cancelled itself, rather than the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
