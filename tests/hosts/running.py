"""What runs on the hosts of a test: workers, clients that are told what to do, etcd and NATS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hosts.network import Host, Network
from tests.timing import PATIENCE_S
from triton_distributed.testing import EtcdServer, NatsServer

PROGRAMS = Path(__file__).with_name("programs")


class Program:
    """A program on a host.

    Attributes:
        first: what its first line said.
    """

    first: Any

    def __init__(self, host: Host, process: Process, errors: Path) -> None:
        self.host, self.process, self.errors = host, process, errors

    @classmethod
    async def start(cls, host: Host, *command: str, **settings: str) -> Program:
        """Start it, and wait for its first line."""
        errors = host.folder / f"errors-{len(list(host.folder.iterdir()))}"
        with errors.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *host.command(*command), stdin=PIPE, stdout=PIPE, stderr=sink, env=host.environment(**settings)
            )
        program = cls(host, process, errors)
        program.first = await program.answer()
        return program

    async def answer(self) -> Any:
        """The next line of its output, which is JSON."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await self.process.stdout.readline()
        assert line, f"a program on {self.host.name} ended: {self.errors.read_text()}"
        return json.loads(line)

    async def ask(self, *words: object) -> Any:
        """Give a client a command; returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        return await self.answer()

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode

    async def kill(self) -> None:
        """End it whatever it does."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


class Cluster:
    """Everything that a test runs on a network."""

    def __init__(self, network: Network, **settings: str) -> None:
        self.network, self.settings = network, settings
        self._programs: list[Program] = []

    async def worker(self, host: str, *arguments: str, **settings: str) -> Program:
        """A worker that can be called."""
        return await self._start(host, "worker.py", arguments, settings)

    async def client(self, host: str, *arguments: str, **settings: str) -> Program:
        """A client that waits for commands."""
        return await self._start(host, "client.py", arguments, settings)

    async def _start(self, host: str, name: str, arguments: Sequence[str], settings: dict[str, str]) -> Program:
        command = [sys.executable, str(PROGRAMS / name), *arguments]
        program = await Program.start(self.network[host], *command, **{**self.settings, **settings})
        self._programs.append(program)
        return program

    async def close(self) -> None:
        for each in reversed(self._programs):
            await each.kill()


class _OnHost:
    """A server that runs on a host, and is known by that host's address."""

    host: Host
    port: int

    async def answers(self) -> bool:
        """Whether somebody listens there; asked from the host itself."""
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{self.host.address}/{self.port}"]
        return subprocess.run(self.host.command(*probe), stderr=subprocess.DEVNULL).returncode == 0


class HostEtcd(_OnHost, EtcdServer):
    """An etcd of one member on a host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        super().__init__(environ=os.environ)
        self.port = 2379

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{self.port}"

    def command(self) -> Sequence[str]:
        return self.host.command(*super().command())


class HostNats(_OnHost, NatsServer):
    """A NATS server on a host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        super().__init__(environ=os.environ)
        self.port = 4222

    @property
    def url(self) -> str:
        return f"nats://{self.host.address}:{self.port}"

    def command(self) -> Sequence[str]:
        command = list(super().command())
        command[command.index("-a") + 1] = self.host.address
        return self.host.command(*command)
