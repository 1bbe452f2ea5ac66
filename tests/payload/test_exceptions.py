"""A handler's exception and what the caller catches."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import traceback
from abc import ABC
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.timing import PATIENCE_S
from triton_distributed import errors
from triton_distributed.errors import RemoteError
from triton_distributed.payload import exceptions
from triton_distributed.payload.exception_values import MAX_STATE
from triton_distributed.payload.exceptions import MAX_HOPS, MAX_MESSAGE, MAX_TRACEBACK, decode_error, encode_error


def caught(raised: BaseException) -> BaseException:
    try:
        raise raised
    except BaseException as error:
        return error


def travel(raised: BaseException, *, instance_id: int = 7, request_id: str = "r-1") -> Any:
    return decode_error(encode_error(caught(raised)), instance_id=instance_id, request_id=request_id)


class PlainError(Exception):
    pass


class WithInit(KeyError):
    ran = 0

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.hint = code, hint
        WithInit.ran += 1


class Nested:
    class Error(OSError):
        pass


class OwnText(Exception):
    def __str__(self) -> str:
        return "text of its own"


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Abstract(ABC, Exception):
    pass


class Final(LookupError):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


class OwnNew(Exception):
    def __new__(cls, *args: Any) -> OwnNew:
        raise AssertionError("a peer made this run")


class OwnSet(ImportError):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError("a peer made this run")


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("w is not allowed"),
        KeyError("name"),
        ZeroDivisionError("division by zero"),
        RuntimeError(),
        TypeError("a", 2),
        NotImplementedError("later"),
        TimeoutError("slow"),
        PlainError("plain"),
        Nested.Error("nested"),
        OwnText("x"),
        Abstract("x"),
        json.JSONDecodeError("Expecting value", "{", 1),
        UserWarning("w"),
        asyncio.QueueFull(),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_is_caught_as_what_was_raised(raised: Exception) -> None:
    error = travel(raised)
    assert isinstance(error, type(raised))
    assert isinstance(error, RemoteError)
    assert isinstance(error, ValueError)
    assert error.args == raised.args
    assert error.type_name == type(raised).__name__
    assert error.message == str(raised)
    assert str(error) == (f"{error.type_name}: {raised}" if str(raised) else error.type_name)
    assert (error.instance_id, error.request_id) == (7, "r-1")
    assert type(error).__name__ == "RemoteError"


def test_value_error_is_the_plain_class() -> None:
    assert type(travel(ValueError("x"))) is RemoteError


def test_attributes_arrive_without_init() -> None:
    before = WithInit.ran
    error = travel(WithInit(3, hint="try again"))
    assert WithInit.ran == before + 1
    assert isinstance(error, WithInit)
    assert (error.code, error.hint, error.args) == (3, "try again", ("code 3",))


def test_no_code_of_the_class_runs() -> None:
    data = encode_error(ImportError("m", name="n", path="p"))
    for kind in (OwnNew, OwnSet):
        fields = msgspec.msgpack.decode(data)
        fields[1] = [[kind.__module__, kind.__qualname__]]
        error = decode_error(msgspec.msgpack.encode(fields), instance_id=1, request_id="")
        assert isinstance(error, kind)
    assert isinstance(error, OwnSet)
    assert error.name == "n"


def test_os_error_keeps_its_fields() -> None:
    error = travel(FileNotFoundError(2, "No such file or directory", Path("/a/b"), None, "/c"))
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.strerror, error.filename, error.filename2) == (
        2,
        "No such file or directory",
        "/a/b",
        "/c",
    )
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, again.filename, again.filename2) == (2, "/a/b", "/c")


def test_unicode_error_keeps_its_fields() -> None:
    with pytest.raises(UnicodeDecodeError) as raised:
        b"a\xff".decode()
    error = travel(raised.value)
    assert isinstance(error, UnicodeDecodeError)
    assert (error.encoding, error.object, error.start, error.end) == ("utf-8", b"a\xff", 1, 2)


def test_import_error_keeps_its_name() -> None:
    error = travel(ModuleNotFoundError("No module named 'x'", name="x", path="p"))
    assert isinstance(error, ModuleNotFoundError)
    assert (error.name, error.path) == ("x", "p")
    assert pickle.loads(pickle.dumps(error)).name == "x"


def test_syntax_error_keeps_its_place() -> None:
    with pytest.raises(SyntaxError) as raised:
        compile("a b", "file.py", "exec")
    error = travel(raised.value)
    assert isinstance(error, SyntaxError)
    assert (error.filename, error.lineno) == ("file.py", 1)


def test_a_unicode_error_over_much_data_keeps_its_type_and_says_what_is_cut() -> None:
    data = bytes(MAX_STATE) + b"\xff"
    for raised in (
        UnicodeDecodeError("utf-8", data, len(data) - 1, len(data), "bad"),
        UnicodeEncodeError("ascii", "\xe9" * MAX_STATE, 5, 6, "bad"),
        UnicodeTranslateError("\xe9" * MAX_STATE, 5, 6, "bad"),
    ):
        error = travel(raised)
        assert isinstance(error, type(raised))
        assert (error.start, error.end, error.reason) == (raised.start, raised.end, "bad")
        assert raised.object.startswith(error.object)  # type: ignore[arg-type]
        assert f"{len(raised.object):,}" in error.__notes__[0]


def test_arguments_that_the_type_does_not_take_fall_back_to_the_base_that_needs_none() -> None:
    error = forged([("builtins", "UnicodeDecodeError"), ("builtins", "UnicodeError")], args=["utf-8"])
    assert not isinstance(error, UnicodeDecodeError)
    assert isinstance(error, UnicodeError)


@pytest.mark.parametrize(
    "raised",
    [
        errors.NoInstances("a/components/b/c", "file"),
        errors.TooFewInstances("a/components/b/c", "file", 3, 1, 5.0),
        errors.InstanceNotFound("a/components/b/c", 5, (1, 2)),
        errors.DeadlineExceeded("a.b.c", 1.5),
        errors.Overloaded("a/components/b/c", 3, "full"),
        errors.StreamIncomplete("a.b.c", 3, "unix:///x", "lost", 4),
        errors.ConnectionFailed("a.b.c", [("unix:///x", "refused")]),
        errors.MessageTooLarge("request", 10, 5),
        errors.DecodeError("bad"),
        errors.RemoteProtocolError("bad"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_our_own_errors_are_caught_as_themselves(raised: errors.TritonError) -> None:
    error = travel(raised)
    assert isinstance(error, type(raised))
    assert isinstance(error, RemoteError)
    assert str(error) == f"{type(raised).__name__}: {raised}"
    assert error.remote.instance_id == 7
    for name, value in vars(raised).items():
        arrived = getattr(error, name)
        assert json.dumps(arrived) == json.dumps(value), f"{name} is the type's own field"


@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        GeneratorExit(),
        BaseExceptionGroup("g", [KeyboardInterrupt()]),
    ],
)
def test_what_is_no_exception_becomes_a_plain_remote_error(raised: BaseException) -> None:
    error = travel(raised)
    assert type(error) is RemoteError
    assert error.type_name == type(raised).__name__


@pytest.mark.parametrize("raised", [StopIteration(3), StopAsyncIteration()])
def test_what_would_end_the_callers_loop_does_not(raised: Exception) -> None:
    error = travel(raised)
    assert type(error) is RemoteError
    assert error.type_name == type(raised).__name__


@pytest.mark.parametrize("error", [asyncio.CancelledError("mine"), KeyboardInterrupt("mine"), GeneratorExit("mine")])
def test_what_is_no_exception_tells_its_message_and_traceback(error: BaseException) -> None:
    got = travel(error)
    assert (got.type_name, got.message, got.args) == (type(error).__name__, "mine", ("mine",))
    assert not isinstance(got, type(error))
    assert "in caught" in got.remote_traceback


class BothCancelled(asyncio.CancelledError, LookupError):
    pass


def test_a_type_that_is_a_cancellation_too_does_not_cancel_the_caller() -> None:
    error = travel(BothCancelled("x"))
    assert not isinstance(error, asyncio.CancelledError)
    assert isinstance(error, LookupError)
    assert isinstance(error, RemoteError)
    assert error.type_name == "BothCancelled"


def test_exception_group_is_told_in_the_traceback() -> None:
    inner = caught(KeyError("inner"))
    assert isinstance(inner, KeyError)
    error = travel(ExceptionGroup("several", [inner, ValueError("other")]))
    assert isinstance(error, RemoteError)
    assert error.type_name == "ExceptionGroup"
    assert "KeyError: 'inner'" in error.remote_traceback
    assert "ValueError: other" in error.remote_traceback
    shown = "".join(traceback.format_exception(error))
    assert shown.count("raise raised") == 2, "the group's own place and the part's, each once"


def test_class_that_refuses_subclasses_falls_back_to_its_base() -> None:
    data = encode_error(caught(Final("x")))
    error = decode_error(data, instance_id=1, request_id="")
    assert not isinstance(error, Final)
    assert isinstance(error, LookupError)
    assert error.type_name == "Final"


def test_class_that_is_not_known_here_falls_back_to_its_base() -> None:
    module = ModuleType("a_module_of_the_worker")

    class Here(ZeroDivisionError):
        pass

    Here.__module__, Here.__qualname__ = module.__name__, "Here"
    error = travel(Here("x"))
    assert isinstance(error, ZeroDivisionError)
    assert not isinstance(error, Here)
    assert isinstance(error, RemoteError)
    assert error.type_name == "Here"
    sys.modules[module.__name__] = module
    try:
        module.Here = Here  # type: ignore[attr-defined]
        assert isinstance(travel(Here("x")), Here), "imported since"
    finally:
        del sys.modules[module.__name__]


def forged(types: list[tuple[str, str]], args: Any = None, state: Any = None) -> RemoteError:
    data = msgspec.msgpack.encode(["T", types, "m", "tb\n", [], args, state or {}])
    return decode_error(data, instance_id=1, request_id="")


def test_nothing_is_imported_or_run_because_a_peer_named_it() -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a peer made this run")

    sys.modules["a_lazy_module"] = Lazy("a_lazy_module")
    try:
        assert type(forged([("a_lazy_module", "Thing")])) is RemoteError
    finally:
        del sys.modules["a_lazy_module"]
    assert "antigravity" not in sys.modules
    for module, name in [
        ("antigravity", "Error"),
        ("builtins", "int"),
        ("builtins", "eval"),
        ("builtins", "SystemExit"),
        ("builtins", "StopAsyncIteration"),
        ("builtins", ""),
        ("sys", "modules"),
        ("", ""),
        (__name__, "Nested"),
        (__name__, "travel.x"),
        (__name__, "Nested.Error.args"),
    ]:
        assert type(forged([(module, name)])) is RemoteError
    assert "antigravity" not in sys.modules


def test_attributes_cannot_replace_what_the_error_is() -> None:
    error = forged(
        [("builtins", "KeyError")],
        state={"__class__": 1, "__notes__": 3, "instance_id": 99, "message": "forged", "_origin": 4, "fine": 5},
    )
    assert isinstance(error, KeyError)
    assert (error.remote.instance_id, error.remote.message, error.fine) == (1, "m", 5)  # type: ignore[attr-defined]
    assert error.__notes__ == ["\nIn instance 1:\ntb\n"]
    assert str(error) == "T: m"
    assert isinstance(travel(error), KeyError)


def test_traceback_is_a_note() -> None:
    def handler() -> None:
        raise PlainError("deep in the worker")

    with pytest.raises(PlainError) as raised:
        handler()
    error = travel(raised.value, instance_id=12, request_id="q")
    assert "in handler" in error.remote_traceback
    assert "raise PlainError" in error.remote_traceback
    shown = "".join(traceback.format_exception(error))
    assert "triton_distributed.errors.RemoteError: PlainError: deep in the worker" in shown
    assert "In instance 12, request q:" in shown
    assert "in handler" in shown


def test_cause_and_notes_arrive() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            second = RuntimeError("second")
            second.add_note("a note")
            raise second from first
    except RuntimeError as raised:
        error = travel(raised)
    assert "KeyError: 'first'" in error.remote_traceback
    assert error.__notes__[0] == "a note"


def passed_on(error: Any, instance_id: int, request_id: str) -> Any:
    """What arrives where a handler lets an error through."""

    def handler_in_between() -> None:
        raise error

    try:
        handler_in_between()
    except Exception as raised:
        return decode_error(encode_error(raised), instance_id=instance_id, request_id=request_id)


def test_error_passed_on_by_a_stage_in_between() -> None:
    first = travel(WithInit(3, hint="h"), instance_id=1, request_id="inner")
    second = passed_on(first, 2, "outer")
    third = passed_on(second, 3, "outermost")
    assert isinstance(third, WithInit)
    assert isinstance(third, RemoteError)
    assert (third.type_name, third.message) == (first.type_name, first.message)
    assert (third.instance_id, third.request_id, third.code) == (3, "outermost", 3)
    assert third.remote.hops == ((1, "inner"), (2, "outer"), (3, "outermost"))
    assert type(third) is type(first)
    assert third.remote_traceback == first.remote_traceback
    assert third.__notes__ == [
        f"\nIn instance 1, request inner:\n{first.remote_traceback}"
        "Passed on by instance 2, request outer.\n"
        "Passed on by instance 3, request outermost.\n"
    ]


def test_a_way_of_many_hops_is_bounded() -> None:
    error = travel(PlainError("x"), instance_id=1, request_id="first")
    for hop in range(2, 100):
        error = passed_on(error, hop, "r")
    assert len(error.remote.hops) == MAX_HOPS
    assert (error.remote.hops[0], error.remote.hops[-1]) == ((1, "first"), (99, "r"))
    assert len(error.__notes__[0].splitlines()) < 50


def test_stage_in_between_need_not_know_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_error(caught(PlainError("x")))
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[__name__], "PlainError")
        between = decode_error(data, instance_id=1, request_id="")
        assert type(between) is RemoteError
        data = encode_error(caught(between))
    assert isinstance(decode_error(data, instance_id=2, request_id=""), PlainError)


def test_remote_error_that_a_handler_makes_itself() -> None:
    error = travel(RemoteError("made here"))
    assert type(error) is RemoteError
    assert str(error) == "RemoteError: made here"


def test_pickle_and_copy_keep_everything() -> None:
    for raised in (WithInit(3, hint="h"), ValueError("x"), PlainError("p")):
        error = travel(raised)
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error)
            assert isinstance(again, type(raised))
            assert again.__dict__ == error.__dict__
            assert (str(again), again.args) == (str(error), error.args)


def test_exception_whose_text_cannot_be_had() -> None:
    error = travel(Broken("x"))
    assert isinstance(error, Broken)
    assert isinstance(error, RemoteError)
    assert "RuntimeError" in error.message


def test_sizes_are_bounded() -> None:
    raised = PlainError("x" * 10 * MAX_MESSAGE)
    raised.small, raised.big, raised.odd = 1, "y" * MAX_STATE, object()  # type: ignore[attr-defined]
    for _ in range(100):
        raised.add_note("n" * MAX_MESSAGE * 2)
    data = encode_error(caught(raised))
    assert len(data) < MAX_TRACEBACK + 40 * MAX_MESSAGE
    error: Any = decode_error(data, instance_id=1, request_id="")
    assert error.small == 1
    assert error.big.startswith("yyy")
    assert "characters left out" in error.big
    assert error.odd.startswith("<object object at")
    assert "characters left out" in error.args[0]
    assert len(error.remote_traceback) <= MAX_TRACEBACK
    assert "characters left out" in error.message


def test_cache_of_classes_is_bounded() -> None:
    for index in range(exceptions.MAX_CLASSES + 10):
        exceptions._combined(type(f"E{index}", (KeyError,), {}))
    assert exceptions._combined.cache_info().currsize <= exceptions.MAX_CLASSES


@given(st.binary(max_size=200))
def test_any_bytes_become_an_error(data: bytes) -> None:
    error = decode_error(data, instance_id=1, request_id="r")
    assert isinstance(error, RemoteError)
    str(error)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(sorted(name for name, each in vars(__import__("builtins")).items() if isinstance(each, type)))


@given(st.lists(names.map(lambda name: ("builtins", name)), max_size=4), st.none() | st.lists(plain), plain)
def test_any_well_formed_error_can_be_read(types: list[tuple[str, str]], args: Any, state: Any) -> None:
    error = forged(types, args, state if isinstance(state, dict) else {})
    assert isinstance(error, RemoteError)
    assert str(error) == "T: m"
    pickle.loads(pickle.dumps(error))
    travel(error)


@given(st.data())
def test_a_changed_byte_is_survived(data: st.DataObject) -> None:
    raw = bytearray(encode_error(FileNotFoundError(2, "gone", "/x")))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert isinstance(decode_error(raw, instance_id=1, request_id="r"), RemoteError)


def test_class_of_the_callers_program_is_found_in_a_fresh_process() -> None:
    data = encode_error(caught(subprocess.CalledProcessError(3, ["a", "b"], output="o")))
    code = (
        "import sys; from triton_distributed.payload.exceptions import decode_error\n"
        "assert 'subprocess' not in sys.modules\n"
        "data = bytes.fromhex(sys.argv[1])\n"
        "error = decode_error(data, instance_id=1, request_id='')\n"
        "assert 'subprocess' not in sys.modules\n"
        "print(type(error).__mro__[1].__name__, error.type_name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, data.hex()],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stderr == ""
    assert done.stdout.split()[1] == "CalledProcessError"


class OwnGroup(ExceptionGroup[Exception]):
    pass


@pytest.mark.parametrize("kind", [ExceptionGroup, OwnGroup])
def test_a_group_arrives_as_one_and_except_star_finds_its_parts(kind: Any) -> None:
    inner = ExceptionGroup("inner", [ValueError(3), PlainError("mine")])
    got = travel(kind("several", [KeyError("a"), OSError(2, "gone"), inner]))
    assert isinstance(got, kind)
    assert isinstance(got, RemoteError)
    assert str(got) == f"{kind.__name__}: several (3 sub-exceptions)"
    found: list[Any] = []
    try:
        raise got
    except* KeyError as group:
        found += [type(each).__mro__[1:3] and each.args for each in group.exceptions]
    except* OSError as group:
        found += [each.errno for each in group.exceptions if isinstance(each, OSError)]
    except* PlainError as group:
        found += [each.exceptions[0].args for each in group.exceptions if isinstance(each, ExceptionGroup)]
    except* ValueError as group:
        found += [each.exceptions[0].args for each in group.exceptions if isinstance(each, ExceptionGroup)]
    assert found == [("a",), 2, ("mine",), (3,)] or found == [("a",), 2, ("mine",)]
    again = decode_error(encode_error(got), instance_id=8, request_id="r-2")
    assert isinstance(again, kind)
    assert [type(each).__name__ for each in again.exceptions] == ["RemoteError"] * 3
    assert isinstance(again.exceptions[1], FileNotFoundError)


def test_a_group_of_too_many_is_bounded() -> None:
    got = travel(ExceptionGroup("many", [ExceptionGroup("m", [KeyError(n)] * 10) for n in range(1000)]))
    assert isinstance(got, ExceptionGroup)
    assert len(got.exceptions) <= exceptions.MAX_PARTS


@pytest.mark.parametrize("text", ["x" * 200_000, "\N{PILE OF POO}" * 40_000, "\udc80" * 40_000])
def test_an_error_that_is_too_large_keeps_its_type(text: str) -> None:
    raised = KeyError(text)
    for _ in range(8):
        raised.add_note(text)
    group = ExceptionGroup(text, [raised] * 30)
    for each, kind in ((raised, KeyError), (group, ExceptionGroup)):
        data = encode_error(caught(each))
        assert len(data) <= exceptions.MAX_ERROR
        assert isinstance(decode_error(data, instance_id=1, request_id=""), kind)
