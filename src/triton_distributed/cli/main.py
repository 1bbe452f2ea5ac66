"""The command `trd`.

Each subcommand is a module of this package with `configure(parser)` and `run(arguments) -> exit status`. Only the
requested module is imported, so `trd --help` costs no more than argparse.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from triton_distributed import __version__
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.failure import FAILED, INTERRUPTED, USAGE, Failure, dotted, one_line
from triton_distributed.compiled import is_compiled
from triton_distributed.errors import ConfigError, InvalidName, TritonError
from triton_distributed.system import first_process

COMMANDS = {
    "serve": "serve a function, method or class of a module as an endpoint",
    "http": "answer HTTP requests with models and other endpoints",
    "ls": "list the served endpoints and their instances",
    "describe": "show all that is known of an endpoint or an instance",
    "watch": "follow the instances: one line for each change",
    "call": "call an endpoint and print the items of its answer",
    "bench": "call an endpoint under load, and show the distribution of the times",
    "record": "record the requests of a live endpoint and its answers into a file",
    "replay": "send recorded requests to a handler and compare, or run a trace of requests",
    "requests": "list the requests that are served now, and what each one waits for",
    "doctor": "check the settings, the machine and the services, and say what to do",
    "top": "show rates, queues and times of all workers, live",
    "why": "show the way of one request through the workers, and where it waits",
    "model": "serve language models, and list them",
    "route": "show how the worker of a model's request is chosen",
    "completion": "print the script that lets bash, zsh or fish complete commands",
}

EPILOG = """\
exit status: 0 success, 1 failure, 2 invalid command line or TRD_* setting,
130 interrupted. An error is one line on standard error, and more if commands or
a list belong to it; with --json it is an object with the fields error, type and
status.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command's arguments, by default those of the process.

    Returns:
        the exit status.

    Raises:
        SystemExit: after help, a version or an error in the arguments; in process 1 also after SIGTERM.
    """
    first_process.take()
    build = "compiled" if is_compiled() else "pure Python"
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="trd", description="A distributed runtime for Python: serve, find and call.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"trd {__version__} ({build})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    # No option before the command takes a value, so the first word that is not an option is the command.
    name = next((each for each in argv if not each.startswith("-")), None)
    if not argv:
        _complete(parser, parsers)
    if name not in parsers:
        parser.parse_args(argv)
        parser.print_help(sys.stderr)
        return USAGE
    module = _configured(name, parsers)
    arguments = parser.parse_args(argv)
    if sys.stdout is None:  # The caller closed standard output, so the output is discarded.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        status: int = module.run(arguments)
        sys.stdout.flush()
    except Failure as failure:
        return _fail(arguments, failure, failure.status)
    except TritonError as error:
        return _fail(arguments, error, USAGE if isinstance(error, (ConfigError, InvalidName)) else FAILED)
    except BrokenPipeError:  # The reader of the output needs no more of it, e.g. `| head -1`.
        _drop_output()
        return 0
    except OSError as error:  # Writing to standard output failed, e.g. because the disk is full.
        _drop_output()
        return _fail(arguments, error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not _logs_json(arguments):
            raise
        importlib.import_module("logging").getLogger("triton_distributed").critical(
            "%s", one_line(error), exc_info=True
        )
        return FAILED
    return status


def _logs_json(arguments: Namespace) -> bool:
    """Whether standard error is a log of JSON, one object a line."""
    variable = importlib.import_module("triton_distributed.config").variable
    return arguments.command in ("serve", "model serve") and bool(variable("TRD_LOG_FORMAT") == "json")


def _configured(name: str, parsers: Mapping[str, Parser]) -> Any:
    """The module of a command, after it has added the command's arguments."""
    module = importlib.import_module(f"triton_distributed.cli.{name}")
    module.configure(parsers[name])
    return module


def _complete(parser: Parser, parsers: Mapping[str, Parser]) -> None:
    """If a shell asks how a command line can go on, answer and end the process; see `cli.completion`."""
    variable = importlib.import_module("triton_distributed.config").variable
    line = variable("COMP_LINE")
    if not (line and variable("_ARGCOMPLETE")) or importlib.util.find_spec("argcomplete") is None:
        return
    name = next((each for each in line.split() if each in parsers), None)
    if name is not None:
        _configured(name, parsers)
    importlib.import_module("argcomplete").autocomplete(parser, always_complete_options=False)


def _drop_output() -> None:
    """Discard unwritten output: otherwise writing it would fail again when the interpreter flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(arguments: Namespace, error: Exception, status: int) -> int:
    text = one_line(dotted(str(error)))
    if getattr(arguments, "json", False):
        import json

        cause = error.__cause__ if isinstance(error, Failure) and error.__cause__ else error
        print(json.dumps({"error": text, "type": type(cause).__name__, "status": status}), file=sys.stderr)
        return status
    if isinstance(error, Failure) and error.lines and not _logs_json(arguments):
        text = dotted(str(error)).rstrip()
    text = f"trd {arguments.command}: error: {text}"
    if _logs_json(arguments):
        text = importlib.import_module("triton_distributed.observe.log_format").line_of("json", text, 40)
    print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
