"""`trd record` and `trd replay`: from live requests to a file, and from the file to a handler and a difference."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.cli.command import Trd
from tests.timing import PATIENCE_S
from triton_distributed import __version__
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.differences import Rule
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.record import Recorder
from triton_distributed.cli.recordings import Recorded, Recordings, Value, Writer, of
from triton_distributed.cli.replay import Answer, compare, configure, run
from triton_distributed.names import EndpointName
from triton_distributed.payload.codec import encode
from triton_distributed.runtime.recording import Exchange, Payload

NAME = EndpointName.parse("demo.b.g")


def payload(value: Any, **options: Any) -> Payload:
    data = encode(value)
    if isinstance(data, bytes):
        return Payload(data, **options)
    return Payload(data.body, [bytes(each) for each in data.buffers], **options)


def exchange(request: Any, *items: Any, **options: Any) -> Exchange:
    answered = [payload(each, after_s=0.5) for each in items]
    return Exchange("r1", 1e9, requests=[payload(request)], items=answered, outcome="ok", took_s=1.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recorded.jsonl"


def write(file: Path, *exchanges: Exchange) -> list[dict[str, Any]]:
    writer = Writer(file, NAME, 1e9)
    for each in exchanges:
        writer.add(each)
    writer.close()
    assert writer.size == file.stat().st_size
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# the file

VALUES = [
    {"text": "é", "list": [1, 2.0, None, True]},
    "plain",
    2**63,
    b"\x00bytes",
    {"array": np.arange(3, dtype="int16"), "large": np.arange(50_000)},
    {5: "a key that JSON has as text"},
    float("inf"),
    {"$json": 1, "json": 2, "body": "x"},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda each: str(each)[:20])
def test_a_value_is_exact_in_the_file_and_readable_where_json_holds_it(file: Path, value: Any) -> None:
    header, line = write(file, exchange(value, value))
    assert header == {
        "format": "trd-record",
        "version": 1,
        "endpoint": "demo.b.g",
        "began": 1e9,
        "runtime": __version__,
    }
    (recorded,) = Recordings(file)
    np.testing.assert_equal(recorded.requests[0].value(), value)
    np.testing.assert_equal(recorded.items[0].value(), value)
    exact = value in VALUES[:3] + VALUES[-1:] if not isinstance(value, dict) or "array" not in value else False
    assert (line["items"][0].get("json") == value) is exact
    assert exact or line["items"][0]["shown"] is not None or value == float("inf")
    assert line["items"][0]["after_s"] == 0.5


def test_only_its_user_can_read_it_and_no_file_is_written_over(file: Path) -> None:
    write(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(Failure, match=r"recorded\.jsonl exists"):
        Writer(file, NAME, 0.0)
    with pytest.raises(Failure, match="cannot write"):
        Writer(file / "below", NAME, 0.0)


def test_a_file_that_was_cut_gives_what_is_whole_and_says_so(file: Path) -> None:
    write(file, exchange(1, 2), exchange(3, 4))
    file.write_bytes(file.read_bytes()[:-5])
    recordings = Recordings(file)
    assert [each.requests[0].value() for each in recordings] == [1]
    assert recordings.cut


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "was not written by `trd record`"),
        (b"{}\n", "was not written by `trd record`"),
        (b"\x89PNG\r\n", "was not written by `trd record`"),
        (b'{"format":"other","version":1}\n', "was not written by `trd record`"),
        (
            b'{"format":"trd-record","version":2,"runtime":"9.9"}\n',
            r"version 2 .*triton-distributed 9\.9.*reads version 1",
        ),
    ],
)
def test_a_file_of_another_kind_or_version(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(Failure, match=words):
        Recordings(file)


def test_a_damaged_line_is_named(file: Path) -> None:
    write(file, exchange(1, 2), exchange(3, 4))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b'{"id": 5}\n' + lines[2])
    with pytest.raises(Failure, match="line 2 is damaged"):
        list(Recordings(file))
    with pytest.raises(Failure, match="cannot read"):
        Recordings(file / "below")


# differences


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y"}]}, ['a.1.b: "x" → "y"']),
        ({"a": 1}, {"b": 1}, ["a: 1 → missing", "b: missing → 1"]),
        ([1, 2], [1], ["value: 2 entries → 1"]),
        (1, True, ["value: 1 → true"]),
        (1.0, 1.0 + 1e-9, ["value: 1.0 → 1.000000001"]),
        (1, 1.0, []),
        (float("nan"), float("nan"), []),
        (np.arange(3), np.arange(3), []),
        (np.arange(3), np.arange(3).astype("int8"), ['value: {"ndarray":…']),
        (np.array([1.0, float("nan")]), np.array([1.0, float("nan")]), []),
        (np.array([1.0]), np.array([1.0 + 1e-9]), ['value: {"ndarray":…']),
        ("x" * 100, "", ['value: "' + "x" * 58 + '… → ""']),
    ],
)  # fmt: skip
def test_what_differs(before: Any, now: Any, found: list[str]) -> None:
    differences = list(Rule().differences(before, now))
    assert len(differences) == len(found)
    for one, expected in zip(differences, found, strict=True):
        beginning, mark, rest = expected.partition("…")
        assert one.startswith(beginning)
        assert one == expected or (mark and not rest)


def test_what_may_differ() -> None:
    before = {"id": 1, "usage": {"total_s": 1.0, "tokens": 5}, "x": [1.0], "array": np.array([1.0])}
    now = {"id": 2, "usage": {"total_s": 2.0, "tokens": 6}, "x": [1.0 + 1e-9], "array": np.array([1.0 + 1e-9])}
    rule = Rule(["id", "usage.*_s"], 1e-6)
    assert list(rule.differences(before, now)) == ["usage.tokens: 5 → 6"]
    assert list(rule.differences({"id": 1}, {})) == []
    assert list(Rule(["s"]).differences({"usage": {"total_s": 1}}, {"usage": {"total_s": 2}})) != []


def recorded(*items: Any, outcome: str = "ok", error: tuple[str, str] = ("", "")) -> Recorded:
    made = of(exchange(None, *items))
    return msgspec.structs.replace(made, outcome=outcome, error=error)


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (recorded(1, 2), Answer([1, 2], ("", ""), 0.0, 0.0), []),
        (recorded(1, 2), Answer([1], ("", ""), 0.0, 0.0), ["2 item(s) → 1"]),
        (recorded({"a": 1}), Answer([{"a": 2}], ("", ""), 0.0, 0.0), ["item 0.a: 1 → 2"]),
        (recorded(1), Answer([], ("KeyError", "'x'"), None, 0.0), ["1 item(s) → 0", "no error → KeyError: 'x'"]),
        (recorded(error=("KeyError", "'x'")), Answer([], ("KeyError", "'x'"), None, 0.0), []),
        (recorded(error=("KeyError", "'x'")), Answer([], ("KeyError", "'y'"), None, 0.0), ["KeyError: 'x' → KeyError: 'y'"]),
        (recorded(1, outcome="left"), Answer([1], ("", ""), 0.0, 0.0), []),
        (recorded(1, outcome="left"), Answer([1], ("ValueError", ""), 0.0, 0.0), ["no error → ValueError"]),
    ],
)  # fmt: skip
def test_an_answer_is_compared_item_by_item(before: Recorded, now: Answer, found: list[str]) -> None:
    assert list(compare(before, now, Rule())) == found


def test_a_value_that_cannot_be_read_here() -> None:
    damaged = msgspec.structs.replace(recorded(1), items=[Value(body=b"\xc1")])
    with pytest.raises(Failure, match="the answer to request r1 cannot be read"):
        list(compare(damaged, Answer([1], ("", ""), 0.0, 0.0), Rule()))


@pytest.mark.parametrize("damaged", [1, [1, "event"]])
def test_a_damaged_annotated_item_is_named(damaged: Any) -> None:
    before = msgspec.structs.replace(recorded(1), items=[Value(body=msgspec.msgpack.encode(damaged), annotated=True)])
    with pytest.raises(Failure, match="the answer to request r1 cannot be read: .*an annotated item is damaged"):
        list(compare(before, Answer([1], ("", ""), 0.0, 0.0), Rule()))


class Stream:
    """The answer of a worker that cannot be recorded."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __anext__(self) -> Any:
        raise self._error

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no descriptor is free"), "OSError: no descriptor is free"),
        (StopAsyncIteration(), "it ended the recording"),
    ],
)
async def test_why_no_worker_can_be_recorded(file: Path, error: Exception, words: str) -> None:
    found: Any = SimpleNamespace(follow=lambda *_, **__: Stream(error))
    with pytest.raises(Failure, match=f"no worker of demo.b.g can be recorded: {words}"):
        await Recorder(NAME, file, 1, 1).record(found, [1], PATIENCE_S, False)
    assert not file.exists()


# the commands


def test_live_requests_are_recorded_and_replayed(trd: Trd, file: Path) -> None:
    worker = trd.serve("worker:echo", "demo.b.g")
    recording = trd.start("record", "demo.b.g", "--to", str(file), "--requests", "3", "--duration", str(PATIENCE_S))
    assert worker.err is not None
    assert "demo.b.g: requests and answers are recorded from now on" in worker.err.readline()
    for request in ('{"a": 1}', '"two"', "3"):
        assert trd.run("call", "demo.b.g", request, "--metadata", "key=secret").status == 0
    said = recording.end()
    assert (said.status, said.err) == (0, "")
    assert said.out == f"3 request(s) of demo.b.g in {file}\n"
    assert "3 were, 0 were left out" in worker.stop().err
    _, *lines = map(json.loads, file.read_text().splitlines())
    assert [each["requests"][0]["json"] for each in lines] == [{"a": 1}, "two", 3]
    assert [each["items"][0]["json"]["request"] for each in lines] == [{"a": 1}, "two", 3]
    assert "secret" not in json.dumps([each["requests"] for each in lines])

    ignored = ("--ignore", "metadata")  # It was not recorded, so the handler gets none now.
    said = trd.run("replay", str(file), "worker:echo", *ignored)
    assert (said.status, said.err) == (0, "")
    assert said.lines[0].split() == ["recorded", "→", "now", "p50", "p99"]
    assert said.lines[-1] == "3 request(s): 3 answered as recorded, 0 differ"

    said = trd.run("replay", str(file), "worker:echo", "--json")
    assert said.status == 1
    *different, tally = map(json.loads, said.lines)
    assert different[0]["differences"] == ['item 0.metadata.key: "secret" → missing']
    assert (tally["requests"], tally["different"]) == (3, 3)
    assert set(tally["times"]) == {"first item", "whole answer"}


def test_a_recording_ends_with_ctrl_c_and_its_worker_goes_on(trd: Trd, file: Path) -> None:
    worker = trd.serve("worker:fail", "demo.b.g")
    assert worker.err is not None
    empty = trd.start("record", "demo.b.g", "--to", str(file))
    assert "recorded from now on" in worker.err.readline()
    empty.signal(signal.SIGINT)
    assert empty.end().status == 1
    assert "recorded no longer" in worker.err.readline()
    assert not file.exists()  # It would be in the way of the next attempt.
    recording = trd.start("record", "demo.b.g", "--to", str(file))
    assert "recorded from now on" in worker.err.readline()
    assert trd.run("call", "demo.b.g", "1").status == 1
    while "KeyError: 'no such" not in worker.err.readline():
        pass
    recording.signal(signal.SIGINT)
    said = recording.end()
    assert (said.status, said.out) == (0, f"1 request(s) of demo.b.g in {file}\n")
    assert "recorded no longer" in worker.err.readline()
    said = trd.run("replay", str(file), "--endpoint", "demo.b.g")  # The same error is the same answer.
    assert (said.status, said.lines[-1]) == (0, "1 request(s): 1 answered as recorded, 0 differ")
    worker.stop()


def test_commands_that_cannot_be_carried_out(trd: Trd, file: Path) -> None:
    said = trd.run("record", "demo.b.nothing", "--to", str(file))
    assert (said.status, len(said.complaint.splitlines())) == (1, 1)
    assert "trd record: error: no instance serves demo.b.nothing (" in said.complaint
    assert not file.exists()
    parser = Parser(prog="trd replay")
    configure(parser)
    with pytest.raises(Failure, match="name the handler"):
        run(parser.parse_args([str(file)]))
    with pytest.raises(Failure, match="cannot read"):
        run(parser.parse_args([str(file), "worker:echo"]))
    with pytest.raises(SystemExit):
        parser.parse_args([str(file), "worker:echo", "--tolerance", "2"])
