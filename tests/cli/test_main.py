"""The command itself: help, exit status, what it imports."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.guards.tree import SRC
from triton_distributed import __version__, is_compiled
from triton_distributed.cli.failure import dotted
from triton_distributed.cli.main import COMMANDS, main

ANYTHING_BUT_LIGHT = [
    "asyncio",
    "msgspec",
    "uvloop",
    "numpy",
    "triton_distributed.config",
    "triton_distributed.runtime",
]


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_what_does_nothing_imports_nothing(argument):
    program = (
        "import sys\nfrom triton_distributed.cli.main import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit:\n    pass\n"
        f"print('found', *(set({ANYTHING_BUT_LIGHT}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["found"]


@pytest.mark.parametrize(("argument", "most"), [("--help", 120), ("ls", 440)])
def test_little_is_imported(argument, most, tmp_path):
    """Imports are nearly all of the time that a command takes to start: about a third of a millisecond each."""
    program = (
        "import sys\nfrom triton_distributed.cli.main import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit:\n    pass\n"
        "print('found', len(sys.modules))"
    )
    environment = {"PYTHONPATH": str(SRC), "TRD_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout.split()[-1]) <= most


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert re.findall("^    ([a-z]+)(?: |$)", out, re.MULTILINE) == list(COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"trd {__version__} ({'compiled' if is_compiled() else 'pure Python'})\n"


def test_an_error_that_nothing_expects_is_one_object_in_a_log_of_json(monkeypatch, caplog):
    def fails(arguments):
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("triton_distributed.cli.serve.run", fails)
    monkeypatch.setenv("TRD_LOG_FORMAT", "json")
    assert main(["serve", "worker"]) == 1
    [record] = caplog.records
    assert (record.getMessage(), record.exc_info[0]) == ("unforeseen", ZeroDivisionError)
    monkeypatch.delenv("TRD_LOG_FORMAT")
    with pytest.raises(ZeroDivisionError):
        main(["serve", "worker"])


def test_without_a_command_it_helps_and_fails(capsys):
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("usage: trd")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"usage: trd {command} ")
    assert max(map(len, out.splitlines())) <= 82


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sevre x", "invalid choice: 'sevre'"),
        ("--what", "trd: error: unrecognized arguments: --what"),
        (
            "model run m --role prefill",
            "trd model run: error: unrecognized arguments: --role prefill; see trd model run --",
        ),
        ("replay t --policy kv a:b", "trd replay: error: unrecognized arguments: a:b; see trd replay --help"),
        ("serve --endpoint a.b.c", "required: MODULE[:OBJECT]"),
        ("serve worker:echo --endpoint a.b", "'a.b' cannot name an endpoint: write namespace.component.endpoint"),
        ("serve worker:echo --endpoint a..c", "'' cannot name a component: a name must not be empty"),
        ("serve worker:echo --end a.b.c", "unrecognized arguments: --end a.b.c"),
        ("serve worker:echo --endpoint a.b.c --max-inflight 0", "'0' is not a whole number of at least 1"),
        ("serve worker:echo --endpoint a.b.c --max-queue x", "'x' is not a whole number of at least 0"),
        ("serve worker:echo --endpoint a.b.c --listen nowhere", "an address is unix:///path, tcp://host:port"),
        ("serve worker:echo --endpoint a.b.c --listen memory://x", "no other process could call it"),
        ("serve worker:echo --endpoint a.b.c --metadata model", "'model' is not KEY=VALUE"),
        ("ls --timeout nan", "'nan' is not a number of seconds"),
        ("ls one two", "unrecognized arguments: two"),
        ("call a.b.c", "required: REQUEST"),
        ("call a/b/c 1", "'a/b/c' cannot name an endpoint"),
        ("call a.b.c 1 --instance -5", "'-5' is not a whole number of at least 1"),
        ("call a.b.c 1 --timeout inf", "'inf' is not a number of seconds"),
        ("call a.b.c 1 --wait 0", "'0' is not a number of seconds of at least 0.01"),
        ("call a.b.c 1 --metadata =x", "'=x' is not KEY=VALUE"),
    ],
)
def test_a_wrong_argument_is_one_line(line, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert says in told.err
    assert told.err.rstrip().endswith("--help")


@pytest.mark.parametrize(
    ("line", "environment", "says"),
    [
        (["ls"], {"TRD_LOG": "loud"}, "trd ls: error: TRD_LOG='loud': one of debug, info, warning, error\n"),
        (["ls"], {"TRD_DISCOVERY": "memory"}, "TRD_DISCOVERY='memory': processes do not share memory"),
        (["call", "a.b.c", "1"], {"TRD_RETRIES": "x"}, "trd call: error: TRD_RETRIES='x': not a whole number\n"),
        (["call", "a.b.c", '{"a"'], {}, "trd call: error: the request is not JSON: "),
        (["call", "a.b.c", "[" * 5000], {}, "trd call: error: the request is not JSON: "),
        (["serve", "worker", "--endpoint", "a.b.c"], {}, "names the endpoint of one handler: write worker:OBJECT\n"),
        (["serve", "worker.py"], {}, "'worker.py' is neither module nor module:object, e.g. worker\n"),
        (["serve", "w.py:run"], {}, "'w.py:run' is neither module nor module:object, e.g. w:run\n"),
        (["serve", "./w:run"], {}, "'./w:run' is neither module nor module:object, e.g. w:run\n"),
        (["serve", "worker"], {}, "worker has no handler that @trd.serve has declared: decorate one, or pass --endp"),
        (["serve", "methods"], {}, "the declared handlers of methods are methods: trd serve methods:Adder\n"),
        (["serve", "worker:echo"], {}, "worker:echo is not a handler that @trd.serve has declared: decorate one, or"),
        (["serve", "worker:echo", "--endpoint", "a.b.c"], {"TRD_LISTEN": "x"}, "TRD_LISTEN='x': an address is"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_a_wrong_setting_or_request_is_one_line(trd, line, environment, says):
    said = trd.run(*line, env=environment)
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('endpoint "a/components/b/c": full', 'endpoint "a.b.c": full'),
        ("no endpoint a/components/b-1/c_2, or x/components/y/z.", "no endpoint a.b-1.c_2, or x.y.z."),
        ("(a/components/b/c)", "(a.b.c)"),
        ("a/components/b/c-3.1 is full", "a/components/b/c-3.1 is full"),
        ("a/components/llama-3.1/c", "a/components/llama-3.1/c"),
        ("/srv/components/b/c/d.py", "/srv/components/b/c/d.py"),
    ],
)
def test_names_are_shown_as_users_type_them(text: str, shown: str) -> None:
    assert dotted(text) == shown
