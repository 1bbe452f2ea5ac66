"""The output of replicas: whole lines with the replica's number."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from triton_distributed.supervisor.output import LONGEST_LINE, Output


@contextmanager
def copied(target: IO[str] | None, name: str = "0", as_json: bool = False, log: bool = False) -> Iterator[IO[bytes]]:
    """What is written into the yielded pipe goes to the target; after the block all of it has arrived."""
    output = Output(as_json)
    here, there = os.pipe()
    output.add(os.fdopen(here, "rb", 0), name, target, log)
    with open(there, "wb", 0) as pipe:
        yield pipe
    output.close()


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ([b"one\ntwo\n"], ["[0] one", "[0] two"]),
        ([b"o", b"ne\nt", b"wo\n"], ["[0] one", "[0] two"]),
        ([b"no end"], ["[0] no end"]),
        ([b"\n\n"], ["[0] ", "[0] "]),
        (["é\n".encode()[:1], "é\n".encode()[1:]], ["[0] é"]),
        ([b""], []),
    ],
)
def test_each_line_has_the_number(tmp_path: Path, parts: list[bytes], lines: list[str]) -> None:
    with open(tmp_path / "out", "w+") as target:
        with copied(target) as pipe:
            for each in parts:
                pipe.write(each)
        assert (tmp_path / "out").read_text().splitlines() == lines


def test_in_a_log_of_json_an_object_names_the_replica_itself(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as target, copied(target, "3", as_json=True) as pipe:
        pipe.write(b'{"level":"info"}\n{not json\nready: 1\n')
    lines = (tmp_path / "out").read_text().splitlines()
    assert json.loads(lines[0]) == {"replica": 3, "level": "info"}
    assert lines[1:] == ["[3] {not json", "[3] ready: 1"]


def test_in_a_log_of_json_all_lines_of_standard_error_are_objects(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as target, copied(target, "3", as_json=True, log=True) as pipe:
        pipe.write(b'{"level":"info"}\nTraceback "here"\n\xff\n')
    lines = list(map(json.loads, (tmp_path / "out").read_text().splitlines()))
    messages = [{"replica": 3, "message": text} for text in ('Traceback "here"', "\\xff")]
    assert lines == [{"replica": 3, "level": "info"}, *messages]


def test_a_line_without_end_is_written_in_parts(tmp_path: Path) -> None:
    size = 3 * LONGEST_LINE + 5
    with open(tmp_path / "out", "w+") as target, copied(target) as pipe:
        left = memoryview(b"x" * size)
        while left:
            left = left[pipe.write(left) :]
    lines = (tmp_path / "out").read_text().splitlines()
    assert sum(line.count("x") for line in lines) == size
    assert max(map(len, lines)) <= 2 * LONGEST_LINE


def test_bytes_that_are_no_text_arrive_as_they_are(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+") as target, copied(target) as pipe:
        pipe.write(b"\xff\xfe\n")
    assert (tmp_path / "out").read_bytes() == b"[0] \xff\xfe\n"


def test_a_stream_of_the_program_itself_gets_text() -> None:
    target = io.StringIO()
    with copied(target) as pipe:
        pipe.write(b"\xff text\n")
    assert target.getvalue() == "[0] \\xff text\n"


def test_without_a_target_the_output_is_read_and_dropped() -> None:
    with copied(None) as pipe:
        left = memoryview(b"x" * 200_000)  # more than a pipe holds
        while left:
            left = left[pipe.write(left) :]


def test_a_reader_that_left_does_not_stop_the_replicas() -> None:
    here, there = os.pipe()
    os.close(here)
    with open(there, "w") as target, copied(target) as pipe:
        left = memoryview(b"line\n" * 50_000)
        while left:
            left = left[pipe.write(left) :]


def test_what_is_written_before_the_end_arrives_although_the_pipe_stays_open(tmp_path: Path) -> None:
    output = Output()
    here, there = os.pipe()
    with open(tmp_path / "out", "w") as target, open(there, "wb", 0) as pipe:
        output.add(os.fdopen(here, "rb", 0), "7", target)
        pipe.write(b"last words")
        output.close()
    assert (tmp_path / "out").read_text() == "[7] last words\n"
