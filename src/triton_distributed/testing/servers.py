"""Real etcd and NATS servers for tests, on free ports. A test can kill, freeze and empty them; they end with it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

START_S = 30.0  # Seconds for a start. etcd needs about 0.5 s, NATS 0.03 s; a busy machine needs many times that.


class ServerMissing(Exception):
    """The server's program is not on this machine. The text says how to get it."""


def program(name: str, environ: Mapping[str, str]) -> str:
    """Find `etcd` or `nats-server`: `ETCD_BIN` or `NATS_SERVER_BIN`, else in this Python's folder, else on PATH.

    Raises:
        ServerMissing: the program was not found.
    """
    named = environ.get({"etcd": "ETCD_BIN", "nats-server": "NATS_SERVER_BIN"}[name], "")
    found = named or shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise ServerMissing(
            f"{name} is not on this machine: `make test` installs it, or give its path in "
            f"{name.split('-')[0].upper()}{'_SERVER' if '-' in name else ''}_BIN"
        )
    return found


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Server:
    """A server process with its own folder and ports. `async with` starts and ends it.

    Args:
        arguments: further arguments of its command line.
        environ: the environment in which `ETCD_BIN` and the like are looked up.

    Attributes:
        folder: its data. The data survives `kill` and `start`, but not the end of the `async with` block.
        port: the port for clients, the same for its whole life.
        url: the address for clients.
    """

    name: ClassVar[str]

    def __init__(self, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self._program = program(self.name, environ or {})
        self.arguments = list(arguments)
        self.folder = Path(tempfile.mkdtemp(prefix=f"trd-{self.name}-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        raise NotImplementedError

    def command(self) -> Sequence[str]:
        """The command line that starts the server."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """The server's output so far."""
        return (self.folder / "log").read_text(errors="replace")

    def launch(self) -> None:
        """Start the process without waiting for an answer."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    async def start(self) -> None:
        """Start the server with its former data, and wait until it answers.

        Raises:
            RuntimeError: the server ended, or did not answer in time; the text contains the end of its log.
        """
        self.launch()
        end = time.monotonic() + START_S
        while not await self.answers():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} did not start: {self.log[-2000:]}")
            await asyncio.sleep(0.02)

    async def answers(self) -> bool:
        """Whether the server serves clients now."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the server with SIGKILL; its data stays."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server with SIGTERM, and wait for its end."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(number)
            process.wait()

    def freeze(self) -> None:
        """Pause the server with SIGSTOP: it answers nothing from now on, and its connections stay."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)  # Its threads run on for a moment after the signal was sent.

    def thaw(self) -> None:
        """Continue the server with SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def empty(self) -> None:
        """Remove the server's data. The server must not be running."""
        assert self._process is None, "stop it first"
        for each in self.folder.iterdir():
            if each.is_dir():
                shutil.rmtree(each)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class EtcdServer(Server):
    """One etcd member.

    Args:
        arguments: further arguments, e.g. `--client-cert-auth`.
        scheme: `http`, or `https` with arguments that name its certificate.
        members: the peer URL of every member by name, including this one; None for a single member.
        member: the name of this member.
    """

    name = "etcd"

    def __init__(
        self,
        *arguments: str,
        scheme: str = "http",
        member: str = "alone",
        members: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(*arguments, environ=environ)
        self._scheme = scheme
        self._member = member
        self._members = dict(members or {member: f"http://127.0.0.1:{free_port()}"})

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        peer = self._members[self._member]
        cluster = ",".join(f"{name}={url}" for name, url in self._members.items())
        return [
            self._program, "--name", self._member, "--data-dir", str(self.folder / "data"),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster,
            "--log-level", "warn", *self.arguments,
        ]  # fmt: skip

    async def answers(self) -> bool:
        """Whether etcd has a leader and serves; over https, where clients may need certificates, whether it accepts."""
        try:
            async with asyncio.timeout(2.0):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    if self._scheme == "https":
                        return True
                    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                    return b'"health":"true"' in await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False


class EtcdCluster:
    """One etcd of several members. `async with` starts and ends them.

    Args:
        count: the number of members; etcd serves while a majority of them lives.

    Attributes:
        members: the members; each may be killed, frozen and started alone.
        urls: their client URLs, separated by commas.
    """

    def __init__(self, *, count: int = 3, environ: Mapping[str, str] | None = None) -> None:
        peers = {f"member{number}": f"http://127.0.0.1:{free_port()}" for number in range(count)}
        self.members = [EtcdServer(member=name, members=peers, environ=environ) for name in peers]
        self.urls = ",".join(each.url for each in self.members)

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(each.start() for each in self.members))  # No member serves before most of them run.
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        for each in self.members:
            await each.__aexit__(*exception)


class NatsServer(Server):
    """One NATS server, with JetStream. Its data is in its folder."""

    name = "nats-server"

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        return [
            self._program, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder / "jetstream"),
            *self.arguments,
        ]  # fmt: skip

    async def answers(self) -> bool:
        """Whether the server sends its greeting."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            async with asyncio.timeout(1.0):
                greeting = await reader.readline()
        except (OSError, TimeoutError):
            return False
        writer.close()
        return greeting.startswith(b"INFO")
