"""The conditions that a simulation must satisfy after its calls have ended, and again after everything is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from harness.simulated.hosts import HostsLoop
from harness.simulated.members import Caller, Member, Worker
from harness.simulated.network import Registry, Switch
from triton_distributed.runtime import Client
from triton_distributed.testing.virtual_time import waiting
from triton_distributed.transport.session import Phase, Session


def idle(member: Member) -> Iterator[str]:
    """Describe what a process holds although no call is under way."""
    runtime: Any = member.runtime
    name = member.host.name
    for endpoint in runtime.worker.server.endpoints:
        where = f"{name}, {endpoint.name.endpoint}"
        if endpoint.gate.running or endpoint.stats.inflight or len(endpoint.gate.queue):
            counts = (
                f"{len(endpoint.gate.running)} run, {endpoint.stats.inflight} counted, {len(endpoint.gate.queue)} wait"
            )
            yield f"{where}: requests are left: {counts}"
    pool = runtime.pool
    for session in (*runtime.worker.server.sessions, *pool.sessions):
        yield from (f"{name}: {each}" for each in _session(session))
    for session in pool.sessions:
        if session.phase != Phase.OPEN:
            yield f"{name}: {session!r} is left in the pool"
    now = runtime.statistics()
    for what, number in (("connections being made", now.dialling), ("tasks of calls", now.tasks)):
        if number:
            yield f"{name}: {number} {what} are left"
    if isinstance(member, Caller):
        for client in (member.answer, member.echo):
            yield from (f"{name}: {each}" for each in _client(client))


def _client(client: Client) -> Iterator[str]:
    if client.stats.inflight:
        yield f"the client counts {client.stats.inflight} calls under way"
    if len(client.load):
        yield f"load is left: {client.load!r}"


def _session(session: Session) -> Iterator[str]:
    """Describe what a session holds although it has no streams."""
    connection = session.connection
    left = {
        "streams": len(session.streams),
        "frames": len(connection.out),
        "streams with unsent items": sum(1 for each in connection.ready if each.outbox),
        "unsent requests": len(session.unsent),
        "waiters": len(session.waiters),
        "handlers that have not begun": len(session.acceptance),
        "bytes of messages": connection.incomplete_bytes,
        "bytes of window, promised to streams that are gone,": connection.budget.promised,
    }
    for what, number in left.items():
        if number:
            yield f"{session!r}: {what} are left: {number}"
    if session.paused:
        yield f"{session!r} is paused"


def found(caller: Caller, workers: list[Worker]) -> Iterator[str]:
    """Describe workers that serve, but that a client does not call."""
    for client in (caller.answer, caller.echo):
        ids = {each.id for each in client.candidates.instances}
        for worker in workers:
            if worker.runtime.instance_id not in ids:
                down = client.candidates.rotation.down.get(worker.runtime.instance_id)
                yield f"{caller.host.name} does not call {worker.host.name} ({client.name.endpoint}): {down}"
        if len(ids) > len(workers):
            yield f"{caller.host.name} knows {len(ids)} instances where {len(workers)} are"


def closed(loop: HostsLoop, switch: Switch, registry: Registry) -> Iterator[str]:
    """Describe what is left after all processes have ended."""
    own = asyncio.current_task(loop)
    # The texts contain no names or addresses of objects, so that a repeated run finds the same texts.
    yield from (f"a task is left at {place}" for name, place in waiting(loop) if own is None or name != own.get_name())
    if loop.timers():
        yield f"{loop.timers()} timers are left"
    if switch.links:
        yield f"connections are left: {', '.join(str(each.number) for each in switch.links)}"
    if registry.hub.entries or len(registry.hub.watchers):
        yield f"the registry holds {len(registry.hub.entries)} instances and {len(registry.hub.watchers)} watches"
