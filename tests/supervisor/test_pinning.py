"""Which cores each replica gets."""

from __future__ import annotations

import os
import sys

import pytest

from triton_distributed.config import Config
from triton_distributed.supervisor import pinning
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.supervisor import StartFailed, supervise


@pytest.mark.parametrize(
    ("count", "cores", "expected"),
    [
        (2, [0, 1, 2, 3], [(0, 1), (2, 3)]),
        (3, [0, 1, 2, 3], [(0,), (1,), (2, 3)]),
        (1, [4, 7], [(4, 7)]),
        (3, [4, 7], [(4,), (7,), (4,)]),
    ],
)
def test_each_replica_gets_neighbours_and_each_core_is_used(
    count: int, cores: list[int], expected: list[pinning.Cores]
) -> None:
    assert pinning.shares(count, cores) == expected


@pytest.mark.parametrize(("cores", "text"), [((0,), "0"), ((0, 1, 2, 3), "0-3"), ((0, 2, 3, 9), "0,2-3,9")])
def test_cores_in_words(cores: pinning.Cores, text: str) -> None:
    assert pinning.described(cores) == text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to cores")
def test_this_thread_is_bound_for_the_start_of_a_process_only() -> None:
    before = pinning.allowed_cores()
    with pinning.bound(before[:1]):
        assert os.sched_getaffinity(0) == {before[0]}
    assert pinning.allowed_cores() == before


def test_a_system_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_distributed.supervisor.pinning.sys.platform", "darwin")
    monkeypatch.setattr("triton_distributed.supervisor.supervisor.own_command", list)
    with pytest.raises(StartFailed, match="darwin cannot bind processes to cores"):
        supervise(Replicas(2, pin=True), Config())
