"""Cancellation tokens of the runtime."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from tests.runtime.cluster import Cluster, patiently, turns
from triton_distributed.runtime import CancellationToken


@pytest.mark.any_loop
async def test_a_child_is_cancelled_with_its_parent(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    parent, child, other = runtime.primary_token(), runtime.child_token(), runtime.child_token()
    grandchild = child.child_token()
    waiting = [asyncio.ensure_future(each.cancelled()) for each in (parent, child, other, grandchild)]
    child.cancel()
    await patiently(asyncio.gather(waiting[1], waiting[3]))
    await turns()
    assert not waiting[0].done()
    assert not waiting[2].done()
    parent.cancel()
    await patiently(asyncio.gather(*waiting))
    assert all(each.is_cancelled() for each in (parent, child, other, grandchild))


async def test_what_is_cancelled_stays_so(cluster: Cluster) -> None:
    token = cluster.runtime().child_token()
    token.cancel()
    token.cancel()
    await patiently(token.cancelled())
    assert token.child_token().is_cancelled()
    await patiently(token.child_token().cancelled())


async def test_shutdown_cancels_the_primary_token(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    child = runtime.child_token()
    waiting = child.cancelled()
    runtime.shutdown()
    await patiently(waiting)
    assert runtime.primary_token().is_cancelled()


async def test_a_waiter_that_gives_up_harms_nobody(cluster: Cluster) -> None:
    token = CancellationToken()
    task = asyncio.create_task(_waits(token))
    await turns()
    task.cancel()
    await asyncio.wait([task])
    other = token.cancelled()
    token.cancel()
    await patiently(other)


async def _waits(token: CancellationToken) -> None:
    await token.cancelled()


async def test_children_that_are_dropped_are_not_kept(cluster: Cluster) -> None:
    token = cluster.runtime().primary_token()
    children = [token.child_token() for _ in range(1000)]
    seen = [weakref.ref(each) for each in children]
    del children
    token.child_token()
    gc.collect()
    assert sum(each() is not None for each in seen) < 10
