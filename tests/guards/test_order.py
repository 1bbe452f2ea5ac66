"""The longest tests begin first, and those of a divided file run apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.guards.tree import ROOT
from tests.order import FIRST, LongestFirst, pytest_collection_modifyitems


def test_the_files_are_there() -> None:
    assert [name for name in FIRST if not (ROOT / name).exists()] == []


def test_the_longest_come_first_and_the_others_stay_in_order() -> None:
    first, second = [*FIRST][:2]
    others = ["tests/api/test_x.py::test_a[b::c]", "tests/wire/test_x.py::test_a", "tests/api/test_x.py::test_b"]
    names = [others[0], f"{second}::test_a", others[1], f"{first}::test_b", others[2], f"{first}::test_a"]
    items: list[Any] = [SimpleNamespace(nodeid=each) for each in names]
    pytest_collection_modifyitems(cast(pytest.Config, SimpleNamespace()), items)
    assert [each.nodeid for each in items] == names, "a run in one process keeps the order of the files"
    pytest_collection_modifyitems(cast(pytest.Config, SimpleNamespace(workerinput={})), items)
    assert [each.nodeid for each in items] == [f"{first}::test_b", f"{first}::test_a", f"{second}::test_a", *others]


def test_only_divided_files_are_handed_out_test_by_test() -> None:
    scheduling = object.__new__(LongestFirst)
    for file, apart in {**FIRST, "tests/api/test_x.py": False}.items():
        test = f"{file}::test_a[b::c]"
        assert scheduling._split_scope(test) == (test if apart else file)
