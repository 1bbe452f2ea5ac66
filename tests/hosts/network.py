"""Several hosts on one machine: a network namespace each, joined by a switch that can be made to lose what it is given.

Each host has its own address, host name, boot id and private folder, and knows the others by name; nothing of it is seen
outside. All names begin with `trd-` and the process id of the test, and all of it goes with `Network.close()`; what a killed test left is removed by
the next one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.guards.tree import ROOT, SRC

NAMESPACES = Path("/run/netns")
# Enters a host for good: its name, its boot id, its own folder at the place where every host has one.
ENTER = (
    'hostname "$1" && mount --bind "$2/boot_id" /proc/sys/kernel/random/boot_id && mount --bind "$2/private" "$3" '
    '&& mount --bind "$3.hosts" /etc/hosts && shift 3 && exec "$@"'
)


def unable() -> str:
    """Why this machine can have no such network, or an empty text."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if missing := [each for each in ("ip", "bridge", "unshare", "mount") if shutil.which(each) is None]:
        return f"no {' and no '.join(missing)} here: install iproute2 and util-linux"
    name = f"trd-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"no privilege to make a network namespace: {done.stderr.strip()}"
    try:
        entered = subprocess.run(
            [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "--mount",
                "ip",
                "link",
                "add",
                "name",
                "switch",
                "type",
                "bridge",
            ],
            capture_output=True,
            text=True,
        )
        return f"no bridge in a network namespace: {entered.stderr.strip()}" if entered.returncode else ""
    finally:
        ip("netns", "del", name)


def ip(*arguments: str, lines: Iterable[str] = ()) -> None:
    """Run `ip`, with its commands as arguments or as lines."""
    command = ["ip", *arguments, *(["-batch", "-"] if lines else [])]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


def sweep() -> None:
    """Remove what tests left whose process is gone."""
    for each in NAMESPACES.glob("trd-*"):
        owner = re.match(r"trd-(\d+)-", each.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            ip("netns", "del", each.name)


class Host:
    """One host.

    Attributes:
        name: short, unique in its network; its host name and where its cable goes into the switch.
        address: its IPv4 address.
        address6: its IPv6 address.
        namespace: its network namespace.
    """

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.namespace = name, f"{network.prefix}-{name}"
        self.address, self.address6 = f"10.77.0.{number}", f"fd77::{number}"
        self._place = network.place
        self.folder = network.folder / name
        (self.folder / "private").mkdir(parents=True, mode=0o700)
        (self.folder / "boot_id").write_text(f"{network.kernel or uuid.uuid4()}\n")

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` there; the process that it makes becomes `command` itself."""
        inside = ["sh", "-c", ENTER, "sh", self.name, str(self.folder), str(self._place), *command]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", *inside]

    def environment(self, **settings: str) -> dict[str, str]:
        """The environment of our programs there."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRD_DIR")}
        own = {"PYTHONPATH": os.pathsep.join([str(SRC), str(SRC.parent)]), "TRD_DIR": str(self._place / "trd")}
        return {**inherited, **own, **settings}

    def run(self, *command: str, settings: Mapping[str, str] | None = None) -> str:
        """Run a command there to its good end; returns what it printed."""
        environment = self.environment(**(settings or {}))
        done = subprocess.run(self.command(*command), capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout

    def sockets_to(self, other: Host) -> int:
        """How many TCP connections this host has to the workers of the other."""
        found = self.run("ss", "-Htn", "state", "established", "dst", other.address).splitlines()
        found += self.run("ss", "-Htn", "state", "established", "dst", f"[::ffff:{other.address}]").splitlines()
        return len(found)


class Network:
    """Hosts and the switch between them.

    Args:
        names: of the hosts.
        one_kernel: they have the same boot id, as containers of one machine do.
    """

    def __init__(self, names: Sequence[str], *, one_kernel: bool = False) -> None:
        self.kernel = str(uuid.uuid4()) if one_kernel else ""
        self.prefix = f"trd-{os.getpid()}-{secrets.token_hex(2)}"
        self.folder = Path(tempfile.mkdtemp(prefix="trd-net-"))
        self.place = self.folder / "here"  # on every host its own folder lies there
        self.place.mkdir(mode=0o700)
        self._switch = f"{self.prefix}-sw"
        self._made: list[str] = []
        self.hosts = {name: Host(self, name, number) for number, name in enumerate(names, 1)}
        lines = [f"{host.address} {name}" for name, host in self.hosts.items()]
        (self.folder / "here.hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def open(self) -> None:
        """Make it."""
        for name in (self._switch, *(host.namespace for host in self.hosts.values())):
            ip("netns", "add", name)
            self._made.append(name)
        ends = [
            f"link add {name} netns {self._switch} type veth peer name eth0 netns {host.namespace}"
            for name, host in self.hosts.items()
        ]
        ip(lines=ends)
        ports = [f"link set {name} master switch up" for name in self.hosts]
        ip("-n", self._switch, lines=["link add name switch type bridge forward_delay 0", "link set switch up", *ports])
        for host in self.hosts.values():
            addresses = [f"addr add {host.address}/24 dev eth0", f"addr add {host.address6}/64 dev eth0 nodad"]
            ip("-n", host.namespace, lines=["link set lo up", *addresses, "link set eth0 up"])

    def close(self) -> None:
        """Remove it, with everything that still runs in it."""
        for name in self._made:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), 9)
            ip("netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def unplug(self, name: str) -> None:
        """Lose every packet from and to a host; nobody is told."""
        self._port(name, "state", "0")

    def plug(self, name: str) -> None:
        """End `unplug`."""
        self._port(name, "state", "3")

    def part(self, *names: str) -> None:
        """Lose every packet between these hosts, and none between one of them and any other."""
        for name in names:
            self._port(name, "isolated", "on")

    def join(self, *names: str) -> None:
        """End `part`."""
        for name in names:
            self._port(name, "isolated", "off")

    def deafen(self, name: str, other: str) -> None:
        """Lose every packet that `other` sends to `name`, and none that `name` sends; nobody is told."""
        # The rule for local addresses is the first and none can stand before it, so it is moved behind this one.
        rules = [f"rule add from {self[other].address} pref 1 blackhole", "rule add pref 2 lookup local"]
        ip("-n", self[name].namespace, lines=[*rules, "rule del pref 0"])

    def _port(self, name: str, *setting: str) -> None:
        command = ["ip", "netns", "exec", self._switch, "bridge", "link", "set", "dev", name, *setting]
        subprocess.run(command, check=True)
