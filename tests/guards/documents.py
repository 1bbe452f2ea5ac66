"""Runs what a Markdown document says.

The blocks of one document are taken in order, in one new folder:

    ```python           first line `# file: NAME.py`: written to that file; else run as a program
    ```console          each `$ command` is run; the lines below it are its expected output
    ```sh               each line is run
    ```console no-run: REASON    (also sh) only for installing and for `make`; the commands are looked at, not run
    ```text, json, …    not programs; see INERT. Any other language is an error, so that nothing is left out unseen

A command that ends in `&` goes on in the background until the end of the document; lines expected below it are waited
for, so that what comes next finds it ready. At the end it gets SIGTERM and must exit with status 0. `kill %N`, `kill -9
%N` and `fg %N` mean the Nth of these commands, as in a shell.

Expected lines must appear in that order; others may stand between them. `…` in a line stands for anything, and blanks
for any blanks. A command must exit with status 0, unless its expected lines end with `exit status N`.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guards.tree import ROOT, SRC
from tests.timing import PATIENCE_S
from tests.warm import TRD, Forked, possible
from triton_distributed.testing.servers import free_port
from triton_distributed.testing.servers import program as server_program

INERT = {"text", "json", "toml", "yaml", "ini", "mermaid", "nginx", "markdown", "diff"}
RUNNABLE = {"python", "console", "sh"}
SERVERS = {"etcd", "nats-server"}  # that `make test` brings, beside Python or on PATH

# What a block marked `no-run` may hold: a test cannot install a machine, and `make test` is what runs this.
NOT_RUN = re.compile(
    r"^(?:pip|python3? -m (?:pip|venv)|uv|pipx|(?:sudo )?apt-get|brew|git clone|mkdir|cd|make|source|\.)(?: |$)"
)


class DocumentError(AssertionError):
    """A document says what is not so. The text begins with file:line."""


JOBS = re.compile(r"(kill(?: -9)?|fg)((?: %\d+)+)")

# What needs no shell: a program of Python or `trd`, after settings. It is forked, which takes a fifth of the CPU.
PLAIN = re.compile(
    r"(?P<settings>(?:[A-Z_]+=[\w.,:/-]* +)*)(?:python3? (?P<file>[\w/-]+\.py)|trd)"
    r"(?P<arguments>(?: (?:'[^'\n]*'|\"[^\"$`\\\n]*\"|[^|&;<>()$`*?~#\\\n\[\]{}!'\"])*)?)"
)

# For a program that ends itself by the very signal, which is as good as status 0.
ENDS_WELL = """#!/bin/sh
trap 'kill $!; wait; exit 0' TERM
{program} "$@" &
wait
"""


@dataclass
class Block:
    """A fenced block: where it starts, its language, what follows that, and its lines."""

    where: str
    language: str
    note: str
    lines: list[str] = field(default_factory=list)


@dataclass
class Command:
    """One command of a console block and the output that the document shows."""

    where: str
    text: str
    expected: list[str] = field(default_factory=list)
    status: int = 0

    @property
    def background(self) -> bool:
        return self.text.endswith("&") and not self.text.endswith("&&")


def blocks(text: str, name: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    block, fence, margin = None, "", ""
    for number, line in enumerate(text.splitlines(), 1):
        if block is None:
            if opened := re.match(r"^( *)(`{3,}|~{3,})(.*)$", line):
                margin, fence = opened[1], opened[2]
                language, _, note = opened[3].strip().partition(" ")
                block = Block(f"{name}:{number}", language, note.strip())
        elif line.strip() == fence:
            yield block
            block = None
        else:
            block.lines.append(line.removeprefix(margin))
    if block is not None:
        raise DocumentError(f"{block.where}: this block is never closed")


def commands(block: Block) -> list[Command]:
    """The commands of a console or sh block."""
    first = int(block.where.rpartition(":")[2])
    name = block.where.rpartition(":")[0]
    found: list[Command] = []
    continued = False
    for number, line in enumerate(block.lines, first + 1):
        where = f"{name}:{number}"
        starts = line.startswith("$ ") if block.language == "console" else bool(line.strip()) and line.strip()[0] != "#"
        if continued:
            found[-1].text += "\n" + line.removeprefix("> ")
        elif starts:
            found.append(Command(where, line.removeprefix("$ ") if block.language == "console" else line))
        elif block.language == "sh" or not line.strip():
            continue
        elif not found:
            raise DocumentError(f"{where}: a console block starts with `$ command`, not with {line!r}")
        elif status := re.fullmatch(r"exit status (\d+)", line.strip()):
            found[-1].status = int(status[1])
        else:
            found[-1].expected.append(line)
        continued = bool(found) and not found[-1].expected and found[-1].text.endswith("\\")
    for command in found:
        command.text = command.text.strip()
    return found


def check_not_run(block: Block) -> None:
    """Hold a block that is not run to what such a block is for."""
    reason = block.note.removeprefix("no-run:").strip()
    if len(reason.split()) < 2:
        raise DocumentError(f"{block.where}: say why this is not run: ```{block.language} no-run: REASON")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in commands(block):
        if not NOT_RUN.match(command.text):
            raise DocumentError(f"{command.where}: only installing and `make` may be left unrun, not: {command.text}")
        if (target := re.match(r"make ([a-z-]+)", command.text)) and target[1] not in targets:
            raise DocumentError(f"{command.where}: the Makefile has no target {target[1]!r}")


def programs_of(text: str) -> set[str]:
    """The first words of a document's commands."""
    return set(re.findall(r"^\$ ([\w-]+)", text, re.MULTILINE))


def missing_line(expected: list[str], output: str) -> str | None:
    """The first expected line that the output does not have after those before it."""
    rest = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in expected:
        pieces = [re.escape(" ".join(piece.split())) for piece in re.split("…|\\.\\.\\.", line)]
        pattern = re.compile(r"\s*.*?\s*".join(pieces))
        if not any(pattern.fullmatch(got) for got in rest):
            return line
    return None


class Run:
    """One document being run, in a folder of its own."""

    def __init__(self, folder: Path, running: Iterable[str] = ()) -> None:
        self.folder = folder
        self.background: list[tuple[Command, subprocess.Popen[bytes]]] = []
        self._ending: set[int] = set()  # The background commands to which the document has sent SIGTERM.
        programs = folder / ".programs"  # `python` and `trd` as a user of this environment has them, installed or not
        programs.mkdir()
        for name, module in {"python": "", "python3": "", "trd": "-m triton_distributed.cli.main"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            program.chmod(0o755)
        for name in sorted(SERVERS & set(running)):
            program = programs / name
            program.write_text(ENDS_WELL.format(program=f'"{server_program(name, os.environ)}"'))
            program.chmod(0o755)
        uvicorn = programs / "uvicorn"
        uvicorn.write_text(ENDS_WELL.format(program=f'"{sys.executable}" -m uvicorn'))
        uvicorn.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(SRC),
            "PYTHONUNBUFFERED": "1",
        }

    def block(self, block: Block) -> None:
        if block.language in INERT:
            return
        if block.language not in RUNNABLE:
            raise DocumentError(
                f"{block.where}: ```{block.language} is neither run ({', '.join(sorted(RUNNABLE))}) "
                f"nor known not to be a program ({', '.join(sorted(INERT))})"
            )
        if block.language != "python" and block.note.startswith("no-run"):
            check_not_run(block)
        elif block.note:
            raise DocumentError(f"{block.where}: ```{block.language} {block.note!r} is not understood")
        elif block.language != "python":
            for command in commands(block):
                self.command(command)
        elif block.lines and (named := re.fullmatch(r"# file: ([\w./-]+)", block.lines[0].strip())):
            path = self.folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(block.lines[1:]) + "\n", encoding="utf-8")
        else:
            path = self.folder / f"block_{block.where.rpartition(':')[2]}.py"
            path.write_text("\n".join(block.lines) + "\n", encoding="utf-8")
            self.command(Command(block.where, f"python {path.name}"))

    def command(self, command: Command) -> None:
        if jobs := JOBS.fullmatch(command.text):
            for number in re.findall(r"\d+", jobs[2]):
                self._job(command, jobs[1], int(number))
            return
        process = self._start(command)
        if command.background:
            self.background.append((command, process))
            output = self._until_seen(process, command.expected)
        else:
            output = self._until_ended(process, command)
        self._compare(command, output)

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {
            "cwd": self.folder,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,  # so that whatever it starts can be ended with it
        }
        text = command.text.rstrip("& ") if command.background else command.text
        if plain := PLAIN.fullmatch(text):
            environment = self.environment | dict(each.split("=", 1) for each in shlex.split(plain["settings"]))
            if possible(environment):
                program: str | Path = Path(plain["file"]) if plain["file"] else TRD
                return Forked(program, shlex.split(plain["arguments"]), env=environment, **options)
        shell = ["bash", "-c", f"exec env {text}" if command.background else text]
        return subprocess.Popen(shell, env=self.environment, **options)

    def _job(self, command: Command, verb: str, number: int) -> None:
        """Do what `kill` or `fg` does with a background command."""
        if not 0 < number <= len(self.background):
            raise DocumentError(f"{command.where}: $ {command.text}: there is no background command {number}")
        started, process = self.background[number - 1]
        if verb == "fg":
            self._compare(command, self._until_ended(process, started))
        elif verb == "kill":
            process.terminate()
            self._ending.add(process.pid)
        else:
            process.kill()
            started.status = -signal.SIGKILL

    @staticmethod
    def _compare(command: Command, output: str) -> None:
        if (line := missing_line(command.expected, output)) is not None:
            raise DocumentError(
                f"{command.where}: $ {command.text}\nthe document shows this line:\n    {line}\nthe output was:\n"
                f"{output or '(nothing)'}"
            )

    @staticmethod
    def _until_seen(process: subprocess.Popen[bytes], expected: list[str]) -> str:
        """What a background command says until the expected lines are there, it ends, or patience is over."""
        assert process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        output = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while missing_line(expected, output.decode(errors="replace")) is not None:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready or not (data := os.read(process.stdout.fileno(), 65536)):
                    break
                output += data
        return output.decode(errors="replace")

    @staticmethod
    def _until_ended(process: subprocess.Popen[bytes], command: Command) -> str:
        """All that a command says; it must end by itself, with the status that the document shows."""
        try:
            output = process.communicate(timeout=PATIENCE_S)[0].decode(errors="replace")
        except subprocess.TimeoutExpired as late:
            kill(process)
            said = (late.output or b"").decode(errors="replace")
            raise DocumentError(
                f"{command.where}: did not end within {PATIENCE_S:g} s (a server's command ends in `&`): "
                f"$ {command.text}\n{said}"
            ) from None
        if process.returncode != command.status:
            raise DocumentError(
                f"{command.where}: exit status {process.returncode}, not {command.status}: $ {command.text}\n{output}"
            )
        return output

    def close(self) -> None:
        """End the background commands, the last first; each must take SIGTERM well.

        Raises:
            DocumentError: one did not end, or not with status 0.
        """
        bad = []
        while self.background:
            command, process = self.background.pop()
            if process.stdout is None or process.stdout.closed:
                continue  # `fg` has waited for it.
            if process.pid not in self._ending:  # A second signal could hit a process that no longer handles it.
                process.terminate()
            try:
                self._until_ended(process, command)
            except DocumentError as error:
                bad.append(f"{error}\n(it was sent SIGTERM at the end of the document)")
        if bad:
            raise DocumentError("\n".join(bad))

    def abandon(self) -> None:
        """End everything at once, after something went wrong."""
        while self.background:
            process = self.background.pop()[1]
            if process.stdout is not None and not process.stdout.closed:
                kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()  # it has no session of its own yet; or all are gone: with only a zombie left, macOS answers EPERM
    process.communicate()


PORT = re.compile(r"(?<=127\.0\.0\.1:)\d{4,5}|(?<=localhost:)\d{4,5}|(?<=--port )\d{4,5}|(?<=STATUS_PORT=)\d{4,5}")


def with_free_ports(text: str) -> str:
    """Replace each port of this machine by a free one, because another run may check the same page at the same time."""
    free = {port: str(free_port()) for port in set(PORT.findall(text))}
    return PORT.sub(lambda found: free[found[0]], text)


def run(path: Path, folder: Path) -> int:
    """Run a document in a new folder.

    Returns:
        How many of its blocks are programs or commands.

    Raises:
        DocumentError: something in it is not so; the text names file and line.
        ServerMissing: it starts etcd or NATS, and this machine does not have it.
    """
    text = with_free_ports(path.read_text(encoding="utf-8"))
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    work = folder / path.stem
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    running = Run(work, programs_of(text))
    found = list(blocks(text, name))
    try:
        for block in found:
            running.block(block)
        running.close()
    finally:
        running.abandon()
    return sum(block.language in RUNNABLE for block in found)


def broken_links(path: Path) -> list[str]:
    """Links to files of the project that are not there."""
    outside_code = re.sub(
        r"^( *)(`{3,}).*?^\1\2\s*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [
        f"{path.name}: {target}"
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", outside_code))
        if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.partition("#")[0]).exists()
    ]
