"""The services that all calls of one client share. A call refers to them, but not to the client or the runtime."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import _get_running_loop as _running_loop
from collections.abc import Callable, Coroutine, Sequence
from threading import get_ident
from typing import Any, Protocol

from triton_distributed.calling.attempts import Attempts
from triton_distributed.calling.candidates import Candidates
from triton_distributed.calling.failover import Ending, Stay, Verdict
from triton_distributed.calling.prober import Prober
from triton_distributed.compiled import caused
from triton_distributed.errors import ConnectionFailed, DeadlineExceeded, NoInstances, RuntimeClosed, TritonError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import CallStats, Outcome
from triton_distributed.routing.budget import RetryBudget
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import Direct, Policy
from triton_distributed.transport.pool import SessionPool
from triton_distributed.transport.session import Session
from triton_distributed.transport.shared_memory import Loan

FIRST_INSTANCE_S = 10.0
"""Seconds that a native call without a timeout waits for a first instance of its endpoint."""


Limit = Callable[[Policy, Any, tuple[Instance, ...], LoadBook], Instance]
"""Chooses with a policy among some of the offered instances: (policy, request, instances, load) → instance."""


class Core(Protocol):
    """The part of the runtime that calls use.

    Attributes:
        unusable: the runtime was shut down, and its sessions are closed or about to close.
    """

    unusable: bool

    @property
    def closing(self) -> bool:
        """The runtime is being shut down, or was."""

    def check(self, operation: str) -> None:
        """Raise an error if the runtime cannot be used."""

    def check_loop(self, operation: str) -> None:
        """Raise WrongLoop outside the runtime's event loop."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that ends with the runtime."""

    @property
    def looks_elsewhere(self) -> bool:
        """There may be instances in folders that this runtime does not watch."""

    def elsewhere(self, name: EndpointName | None) -> str:
        """A text about other folders in which an endpoint is served, or the empty text."""


class NotTaken(Exception):
    """An instance did not take a request, which was not sent.

    Attributes:
        ending: how the attempt ended.
        failures: pairs of address and reason.
    """

    def __init__(self, ending: Ending, failures: Sequence[tuple[str, str]]) -> None:
        super().__init__(ending, failures)
        self.ending = ending
        self.failures = failures


class Services:
    """The services that the calls of one client share.

    Args:
        core: the runtime.
        loop: its event loop, which is running in this thread.
        candidates: the endpoint's instances, shared by its clients.
        pool: the runtime's sessions.
        prober: takes workers that cannot be reached out of rotation.
        where: the place of discovery, for error texts.
        retries: see `TRD_RETRIES`.

    Attributes:
        thread: the thread of the loop.
        load: the number of streams that this runtime has open on each instance.
        ejector: counts the failures of instances.
        key: the key of the endpoint in a request.
        target: the endpoint's name, for error texts.
        limit: chooses with a policy among the instances whose contracts fit, at each attempt; None if all fit.
        stats: counters of this client.
    """

    __slots__ = (
        "_budget",
        "_prober",
        "candidates",
        "core",
        "ejector",
        "key",
        "limit",
        "load",
        "loop",
        "pool",
        "retries",
        "stats",
        "target",
        "thread",
        "where",
    )

    def __init__(
        self,
        core: Core,
        loop: asyncio.AbstractEventLoop,
        candidates: Candidates,
        pool: SessionPool,
        prober: Prober,
        where: str,
        retries: int,
    ) -> None:
        self.core = core
        self.loop = loop
        self.thread = get_ident()
        self.candidates = candidates
        self.load = candidates.load
        self.ejector = candidates.ejector
        self.key = candidates.name.key
        self.target = f'endpoint "{candidates.name.path}"'
        self.pool = pool
        self._prober = prober
        self.where = where
        self.retries = retries
        self.limit: Limit | None = None
        self.stats = CallStats()
        self._budget = RetryBudget(loop.time())

    def check_loop(self, operation: str) -> None:
        """Check that the client's own event loop runs this.

        Raises:
            WrongLoop: another thread or event loop runs it.
        """
        if _running_loop() is not self.loop:
            self.core.check_loop(operation)

    def choose(self, policy: Policy, request: Any, attempts: Attempts | None) -> Instance:
        """The next instance to try.

        Args:
            policy: the call's policy.
            request: the request, for the policy.
            attempts: the failed attempts; None for a first attempt.

        Raises:
            NoInstances, InstanceNotFound, ConnectionFailed, Refusal, StreamIncomplete: no instance is left to try.
            Exception: a user's policy raised it.
        """
        candidates = self.candidates.instances
        direct = isinstance(policy, Direct)
        if attempts is None:
            if not candidates and not direct:
                raise self.no_instances()
            return self._ask(policy, request, candidates)
        offered = attempts.next(candidates, self.candidates.table.instances, direct)
        if not offered:
            known = candidates or direct or attempts.refusal is not None
            raise attempts.error(self.target) if known else self.no_instances()
        instance = self._ask(policy, request, offered)
        attempts.chosen(instance.id)
        return instance

    def _ask(self, policy: Policy, request: Any, instances: tuple[Instance, ...]) -> Instance:
        limit = self.limit
        return policy(request, instances, self.load) if limit is None else limit(policy, request, instances, self.load)

    async def first_instance(self, bounded: bool, attempts: Attempts | None) -> None:
        """Wait until the instances are known and there is at least one.

        Args:
            bounded: wait for at most `FIRST_INSTANCE_S`, because the call has no deadline.
            attempts: the failed attempts of the call. It waits again if none of their instances is left and none has
                refused the request for a reason that the caller should know.

        Raises:
            NoInstances: no worker has registered within that time.
            DiscoveryError: discovery cannot be read.
            RuntimeClosed: the runtime was closed meanwhile.
        """
        candidates = self.candidates
        if attempts is not None and (candidates.instances or attempts.refusal is not None):
            return
        try:
            await candidates.open()
            if not candidates.instances:
                await self._wait_for_one(bounded)
        except RuntimeClosed:
            raise caused(RuntimeClosed("a call"), None)
        if attempts is not None:
            attempts.returned(candidates.table.by_id.keys())

    async def _wait_for_one(self, bounded: bool) -> None:
        candidates = self.candidates
        name, core = candidates.name, self.core
        waiting = candidates.wait(self.where, (lambda: core.elsewhere(name)) if core.looks_elsewhere else None)
        try:
            await asyncio.wait_for(waiting, FIRST_INSTANCE_S if bounded else None)
        except TimeoutError:
            raise caused(self.no_instances(FIRST_INSTANCE_S), None)

    def expired(
        self, attempts: Attempts | None, chosen: Instance | None, waits: bool, timeout_s: float
    ) -> tuple[TritonError, Outcome]:
        """The error of a call whose time is over, and its outcome.

        Args:
            attempts: the failed attempts; None without any.
            chosen: the instance to which the request was about to be sent.
            waits: the call waits for a first instance.
            timeout_s: the time of the call in seconds.
        """
        candidates = self.candidates
        if waits and attempts is None and chosen is None and candidates.is_empty:
            return self.no_instances(timeout_s), Outcome.UNREACHABLE
        failures = [] if attempts is None else [*attempts.failures]
        if chosen is not None and self.pool.get(chosen.addresses) is None:
            failures.append((", ".join(chosen.addresses), "no connection yet"))
        elif not candidates.is_open:
            failures.append((self.where, "it has not answered yet"))
        return DeadlineExceeded(self.target, timeout_s, failures), Outcome.DEADLINE

    def no_instances(self, waited_s: float = 0.0) -> NoInstances:
        """The error of a call to an endpoint that has no instance."""
        name = self.candidates.name
        return NoInstances(name.path, self.where, self.core.elsewhere(name), waited_s)

    async def session_to(self, instance: Instance, decide: Callable[[Ending, Instance], Verdict]) -> Session:
        """Return a session that can send a request to `instance` now; dial if none is open.

        Args:
            instance: the instance.
            decide: returns what to do if the worker is silent and the session takes no more bytes.

        Raises:
            NotTaken: the instance takes no request. A worker that cannot be reached is out of rotation until a probe
                succeeds.
        """
        try:
            session = await self.pool.connect(instance.addresses)
        except ConnectionFailed as error:
            self._prober.lost(instance.addresses)
            raise caused(NotTaken(Ending.UNREACHED, error.attempts), None)
        # A stream gets its id when its request is written: ids are sent in ascending order, a CANCEL after its request.
        while session.paused and session.lost is None:
            if session.silent and not isinstance(decide(Ending.STALLED, instance), Stay):
                words = "it takes no more bytes, and has sent nothing for a long time"
                raise NotTaken(Ending.STALLED, [(session.address, words)])
            await session.resumed()
        if session.lost is not None:
            raise NotTaken(Ending.UNSENT, [(session.address, session.lost)])
        if session.full:
            words = f"{len(session.streams):,} streams are open on the session"
            raise NotTaken(Ending.UNREACHED, [(session.address, words)])
        if not session.usable:
            raise NotTaken(Ending.UNREACHED, [(session.address, "it takes no more calls")])
        return session

    async def prepare(
        self, instance: Instance, decide: Callable[[Ending, Instance], Verdict], buffers: Sequence[memoryview]
    ) -> tuple[Session, Loan | None]:
        """Return a session as `session_to` does, and the large buffers of the request in shared memory.

        Raises:
            NotTaken: as in `session_to`.
        """
        session = await self.session_to(instance, decide)
        size = sum(each.nbytes for each in buffers)
        while session.memory is not None and size <= session.send_limit and session.memory.wants(buffers):
            loan = await session.memory.lend(buffers)
            try:
                now = await self.session_to(instance, decide)  # Much may have happened meanwhile.
            except BaseException:
                loan.drop()
                raise
            if now is session:
                return session, loan
            loan.drop()
            session = now
        return session, None

    def take_retry(self) -> bool:
        """Take one retry from the budget. False if the budget is empty."""
        stats = self.stats
        return self._budget.take(self.loop.time(), stats.inflight + sum(stats.ended), stats.inflight)

    def from_finalizer(self, work: Callable[[], None]) -> None:
        """Run `work` on the loop's thread. The garbage collector may run finalizers in any thread."""
        if self.loop.is_closed():
            return
        if get_ident() == self.thread:
            work()
        else:
            with contextlib.suppress(RuntimeError):  # The loop was closed at this moment.
                self.loop.call_soon_threadsafe(work)
