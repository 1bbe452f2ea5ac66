"""Where a name of `RemoteError`'s is a name of the user's type too, it means the user's."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest

from tests.payload.test_exceptions import PlainError, caught, travel
from triton_distributed.errors import RemoteCause, RemoteError
from triton_distributed.payload.exceptions import decode_error, encode_error

NAMES = ("type_name", "message", "remote_traceback", "instance_id", "request_id", "remote")


class OwnFields(Exception):
    """Has each of the names in its instances."""

    def __init__(self) -> None:
        super().__init__("all of them")
        for name in NAMES:
            setattr(self, name, f"my {name}")


class OwnSlots(Exception):
    __slots__ = NAMES

    def __init__(self) -> None:
        super().__init__("all of them")
        for name in NAMES:
            setattr(self, name, f"my {name}")


class OwnDefaults(Exception):
    type_name, message, remote_traceback = "my type_name", "my message", "my remote_traceback"
    instance_id, request_id, remote = "my instance_id", "my request_id", "my remote"


class OwnProperties(Exception):
    """Computes each of the names."""


def computed(name: str) -> property:
    return property(lambda self: f"my {name}")


for each in NAMES:
    setattr(OwnProperties, each, computed(each))


@pytest.mark.parametrize("kind", [OwnFields, OwnSlots, OwnDefaults, OwnProperties])
@pytest.mark.parametrize("known", [True, False])
def test_a_field_of_the_type_is_not_overwritten_by_ours(
    kind: Any, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode_error(caught(kind() if kind in (OwnFields, OwnSlots) else kind("all of them")))
    if not known:
        monkeypatch.delattr(sys.modules[__name__], kind.__name__)
    error: Any = decode_error(data, instance_id=7, request_id="r-1")
    for again in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), travel(error)):
        assert isinstance(again, kind) == known
        remote = RemoteError.cause_of(again)
        assert remote is not None
        assert (remote.type_name, remote.message) == (kind.__name__, "all of them")
        assert (remote.instance_id, remote.request_id) == (7, "r-1")
        assert "in caught" in remote.remote_traceback
        assert str(again) == f"{kind.__name__}: all of them"
        if known or kind.__name__ in ("OwnFields", "OwnSlots"):
            for name in NAMES:
                assert getattr(again, name) == f"my {name}"
        else:  # a default and a property are the class's, and the class is not here
            assert again.remote is remote
            assert again.message == "all of them"


def test_fields_are_there_for_an_error_that_has_none_of_those_names() -> None:
    error = travel(PlainError("x"))
    remote = error.remote
    assert isinstance(remote, RemoteCause)
    assert RemoteError.cause_of(error) is remote
    assert [getattr(error, name) for name in NAMES[:-1]] == [getattr(remote, name) for name in NAMES[:-1]]
    assert remote.hops == ((7, "r-1"),)
    assert RemoteError.cause_of(RemoteError("made here")) is None
    assert str(RemoteError("made here")) == "made here"
