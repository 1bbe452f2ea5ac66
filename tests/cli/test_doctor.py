"""`trd doctor`: each misconfiguration gets a finding that names it, and the advice that helps."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trustme

from tests.certificates import LONG_AGO, Member
from tests.servers import etcd, nats  # noqa: F401
from triton_distributed.cli.checks import certificates, host, services
from triton_distributed.cli.checks.finding import Finding
from triton_distributed.cli.checks.host import Limits
from triton_distributed.cli.doctor import diagnose
from triton_distributed.cli.health import Answer
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime, reports
from triton_distributed.system import shared_memory
from triton_distributed.testing import EtcdServer, NatsServer
from triton_distributed.testing.servers import free_port

TLS = ("TRD_TLS_CERT", "TRD_TLS_KEY", "TRD_TLS_CA")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    short = Path(f"/tmp/trd-doctor-{os.getpid()}")
    short.mkdir(mode=0o700)
    yield short
    for each in sorted(short.rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() else each.unlink()
    short.rmdir()


async def look(folder: Path, **environ: str) -> list[Finding]:
    return await diagnose({"TRD_DIR": str(folder), "TRD_CONNECT_TIMEOUT_S": "2", **environ})


def problems(found: list[Finding]) -> list[Finding]:
    return [each for each in found if each.level != "ok"]


def check(found: list[Finding], level: str, part: str, text: str, advice: str) -> None:
    """There is a finding that says this."""
    for each in found:
        if (each.level, each.part) == (level, part) and text in each.text and advice in each.advice:
            return
    pytest.fail(f"no {level} of {part} with {text!r} and {advice!r} in:\n" + "\n".join(map(str, problems(found))))


def tls(member: Member) -> dict[str, str]:
    return dict(zip(TLS, (member.cert, member.key, member.ca), strict=True))


async def test_a_healthy_machine_has_no_problem(folder: Path) -> None:
    found = await look(folder)
    assert [each for each in problems(found) if each.part != "limits"] == []
    assert {each.part for each in found} >= {"versions", "limits", "folder", "addresses", "discovery"}


@pytest.mark.parametrize(
    ("environ", "level", "part", "text", "advice"),
    [
        ({"TRD_LISTN": "tcp://0.0.0.0:0"}, "warning", "settings", "TRD_LISTN is set", "did you mean TRD_LISTEN?"),
        ({"TRD_RETRIES": "many"}, "error", "settings", "TRD_RETRIES", "docs/settings.md"),
        ({"TRD_LOG": "infos"}, "error", "settings", "one of debug, info", "refuse to start"),
        ({"TRD_DISCOVERY": "zookeeper"}, "error", "settings", "one of file, etcd", "docs/settings.md"),
        ({"TRD_MAX_HELD_BYTES": "1000000"}, "warning", "settings", "below TRD_MAX_MESSAGE_BYTES", "or more"),
        ({"TRD_DISCOVERY": "memory"}, "warning", "settings", "other processes see no instance", "unset TRD_DISCOVERY"),
        ({"TRD_DISCOVERY": "static"}, "error", "settings", "lists no instance", "TRD_STATIC="),
        ({"TRD_DISCOVERY": "static", "TRD_STATIC": "a.b=x"}, "error", "discovery", "TRD_STATIC", "docs/settings.md"),
        ({"TRD_LISTEN": "0.0.0.0:7000"}, "error", "addresses", "an address is", "TRD_LISTEN=tcp://"),
        ({"TRD_LISTEN": "tcp://192.0.2.77:7000"}, "error", "addresses", "Cannot assign", "`ip addr`"),
        ({"TRD_LISTEN": "tcp://127.0.0.1:0", "TRD_ADVERTISE": "no.such.invalid"}, "error", "addresses", "does not resolve", "can resolve"),
        ({"TRD_LISTEN": "tcp://127.0.0.1:0", "TRD_ADVERTISE": "0.0.0.0"}, "error", "addresses", "cannot be dialled", "TRD_ADVERTISE="),
        ({"TRD_LISTEN": "tcp://0.0.0.0:0"}, "warning", "security", "neither TLS nor a token", "TRD_TOKEN"),
        ({"TRD_TOKEN": "secret"}, "warning", "security", "short enough", "openssl rand"),
        ({"TRD_TLS_CERT": "/nowhere/cert.pem", "TRD_TLS_CA": "/nowhere/ca.pem"}, "error", "tls", "No such file", "PEM files"),
        ({"TRD_TLS_CERT": "/nowhere/cert.pem"}, "error", "tls", "TRD_TLS_CA", "PEM files"),
        ({"NATS_SERVER": "nats://:x"}, "error", "nats", "NATS URLs", "docs/settings.md"),
    ],
)  # fmt: skip
async def test_settings(folder: Path, environ: dict[str, str], level: str, part: str, text: str, advice: str) -> None:
    check(await look(folder, **environ), level, part, text, advice)


async def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = await look(folder, TRD_LISTEN=f"tcp://127.0.0.1:{port}")
    check(found, "error", "addresses", "Address already in use", f"sport = :{port}")


async def test_beside_the_worker_that_has_its_settings(folder: Path) -> None:
    """The runbooks ask for it. A port that another program has taken is an error all the same."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = free_port()
        environ = {
            "TRD_DIR": str(folder),
            "TRD_LISTEN": f"tcp://127.0.0.1:{free_port()}",
            "TRD_STATUS_PORT": str(status),
        }
        async with DistributedRuntime(config=Config.from_env(environ)) as runtime:
            task = runtime.endpoint("a.b.c").serve_endpoint(print)
            await task.registered
            found = await look(folder, **environ)
            others = await look(folder, **{**environ, "TRD_LISTEN": f"tcp://127.0.0.1:{port}"})
            task.cancel()
    check(found, "ok", "addresses", f"taken by the worker that runs here: instance {runtime.instance_id}", "")
    check(found, "ok", "status port", f"tcp://127.0.0.1:{status} is taken by the status port", "")
    assert [each for each in problems(found) if each.part in ("addresses", "status port")] == []
    check(others, "error", "addresses", "Address already in use", "port 0")


async def test_a_status_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = await look(folder, TRD_STATUS_PORT=str(port))
    check(found, "warning", "status port", "would serve without its status pages", f"sport = :{port}")


async def test_status_ports_that_everyone_reaches_or_that_a_worker_takes(folder: Path) -> None:
    found = await look(folder, TRD_STATUS_PORT="0", TRD_STATUS_HOST="0.0.0.0")
    check(found, "warning", "status port", "it asks for no password", "network policy")
    port = str(free_port())
    found = await look(folder, TRD_STATUS_PORT=port, TRD_LISTEN=f"tcp://127.0.0.1:{port}")
    check(found, "warning", "status port", "name the same port", "change one")
    assert [each.level for each in await look(folder, TRD_STATUS_PORT="0") if each.part == "status port"] == ["ok"]


async def test_servers_that_are_not_there(folder: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    found = await look(folder, ETCD_ENDPOINTS=f"http://{nobody}", NATS_SERVER=f"nats://{nobody}")
    check(found, "error", "discovery", "connection refused", "is etcd running")
    check(found, "error", "nats", "Connect call failed", "is nats-server running")


async def test_loopback_is_no_address_for_other_machines(folder: Path) -> None:
    environ = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{free_port()}", "TRD_LISTEN": "tcp://127.0.0.1:0"}
    found = await look(folder, **environ, TRD_ADVERTISE="127.0.0.1:7000")
    check(found, "warning", "addresses", "no other machine can reach it", "TRD_ADVERTISE")


async def test_an_instance_that_is_not_there(folder: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    found = await look(folder, TRD_DISCOVERY="static", TRD_STATIC=f"a.b.c={address}")
    check(found, "warning", "instances", "a.b.c, instance ", "is the worker stopped")
    check(found, "warning", "instances", f"{address}: ", "firewall")


@pytest.mark.parametrize(
    ("make", "text", "advice"),
    [
        (lambda at, ca: Member(at, ca, not_after=LONG_AGO), "expired", "renew the certificate"),
        (lambda at, ca: Member(at, ca, trustme.CA()), "unable to get local issuer", "TRD_TLS_CA"),
    ],
)
async def test_certificates_that_peers_refuse(
    folder: Path, make: Callable[[Path, trustme.CA], Member], text: str, advice: str
) -> None:
    member = make(folder / "tls", trustme.CA())
    check(await look(folder, **tls(member)), "error", "tls", text, advice)


async def test_a_key_of_another_certificate(folder: Path) -> None:
    member, other = Member(folder / "tls", trustme.CA()), Member(folder / "other", trustme.CA())
    found = await look(folder, **{**tls(member), "TRD_TLS_KEY": other.key})
    check(found, "error", "tls", "", "PEM files that belong together")


async def test_a_certificate_for_another_name(folder: Path) -> None:
    member = Member(folder / "tls", trustme.CA(), name="b.example")
    found = await look(folder, **tls(member), TRD_TLS_SERVER_NAME="a.example")
    check(found, "error", "tls", "Hostname mismatch", "TRD_TLS_SERVER_NAME")


async def test_a_certificate_near_its_end_and_a_key_that_others_can_read(folder: Path) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    member = Member(folder / "tls", trustme.CA(), not_after=soon)
    Path(member.key).chmod(0o644)
    found = await look(folder, **tls(member))
    check(found, "warning", "tls", "ends in", "renew it")
    check(found, "warning", "tls", "other users can read the key", "chmod 600")
    Path(member.key).chmod(0o600)
    assert "can read the key" not in str(await look(folder, **tls(member)))


@pytest.mark.parametrize("part", ["etcd", "nats"])
async def test_the_files_for_etcd_and_nats(folder: Path, part: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    names = {"etcd": {"ETCD_ENDPOINTS": "https://127.0.0.1:1"}, "nats": {"NATS_SERVER": "tls://127.0.0.1:1"}}
    settings = Config.from_env(names[part])

    def found(member: Member, **changes: str) -> list[Finding]:
        files = {f"{part}_{name}": getattr(member, name) for name in ("cert", "key", "ca")} | changes
        return list(certificates.servers(dataclasses.replace(settings, **files)))

    good = Member(folder / "good", trustme.CA())
    Path(good.key).chmod(0o600)
    assert found(good) == []
    ending = Member(folder / "ending", trustme.CA(), not_after=now + datetime.timedelta(days=2))
    check(found(ending), "warning", part, f"{ending.cert} ends in 2.0 days", "renew it")
    check(found(ending), "warning", part, "other users can read the key", "chmod 600")
    ended = Member(folder / "ended", trustme.CA(), not_after=LONG_AGO)
    check(found(ended), "error", part, "expired", "renew the certificate")
    check(found(good, **{f"{part}_key": ended.key}), "error", part, "cannot be used", "belong together")
    check(found(good, **{f"{part}_cert": "/nowhere.pem"}), "error", part, "No such file", "PEM files")


def test_an_authority_near_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = Member(folder / "tls", trustme.CA())
    assert list(certificates.authorities("tls", member.ca)) == []
    monkeypatch.setattr(certificates, "SOON_DAYS", 1e6)
    found = list(certificates.authorities("tls", member.ca))
    check(found, "warning", "tls", f"an authority in {member.ca} ends in", "give every member a file with both")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
async def test_a_folder_of_another_user(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    check(await look(theirs), "error", "folder", str(theirs), "set TRD_DIR")


def test_a_file_system_of_the_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(host, "file_system", lambda path: "nfs4")
    check(host.folder(Config(directory=folder)), "warning", "folder", "is on nfs4", "local file system")


@pytest.mark.parametrize(
    ("limits", "text", "advice"),
    [
        (Limits((256, 8192), None, (1, None)), "at most 256 open files", "ulimit -n 4096"),
        (Limits((256, 1024), None, (1, None)), "at most 256 open files", "ulimit -n 1024"),
        (Limits((9999, 9999), (127, 128)[::-1], (1, None)), "127 of 128 inotify instances", "max_user_instances=512"),
        (Limits((9999, 9999), None, (64, 2.0)), "2 of 64 cores", "TRD_THREADS=6"),
    ],
)
def test_limits(limits: Limits, text: str, advice: str) -> None:
    check(list(host.limits(limits, Config(threads=32))), "warning", "limits", text, advice)


def test_a_container_with_less_memory_than_clients_may_take() -> None:
    small = Limits((9999, 9999), None, (1, None), 512 * 2**20)
    found = list(host.limits(small, Config(max_held_bytes=2**31)))
    check(found, "warning", "limits", "the kernel would kill it", f"TRD_MAX_HELD_BYTES={256 * 2**20}, ")
    settings = Config(max_held_bytes=256 * 2**20, max_message_bytes=64 * 2**20)
    assert problems(list(host.limits(small, settings))) == []


@pytest.mark.skipif(not shared_memory.SUPPORTED, reason="this system has no shared memory to refuse")
def test_a_system_that_gives_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(host.shared_memory(Config())) == []

    def refuse(name: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)
    found = list(host.shared_memory(Config()))
    check(found, "warning", "limits", "large arrays are copied instead", "vm.memfd_noexec")
    assert list(host.shared_memory(Config(shared_memory_bytes=0))) == []


def test_no_limit_is_no_problem() -> None:
    assert problems(list(host.limits(Limits((-1, -1), (128, 3), (2, None)), Config()))) == []


async def test_etcd(folder: Path, etcd: EtcdServer) -> None:  # noqa: F811
    found = await look(folder, ETCD_ENDPOINTS=etcd.url, TRD_TOKEN="x" * 32)
    assert [each for each in problems(found) if each.part != "limits"] == []


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("etcdserver: user name is empty", "TRD_ETCD_USERNAME"),
        ("etcdserver: permission denied", "grant the user access to keys that begin with triton-distributed/"),
        ("it needs the extra: pip install 'triton-distributed[etcd]'", "pip install 'triton-distributed[etcd]'"),
        ("connection refused", "is etcd running"),
    ],
)
def test_what_helps_with_etcd(words: str, advice: str) -> None:
    assert advice in services.discovery_advice(Config(discovery="etcd"), words)


@pytest.mark.parametrize("ahead_s", [-3600, 0, 3600])
async def test_a_clock_that_differs(folder: Path, ahead_s: float) -> None:
    date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        (found,) = await services.clock(Config(discovery="etcd", etcd_endpoints=f"http://127.0.0.1:{port}"))
    if ahead_s:
        check([found], "warning", "clock", "this machine's clock and etcd's differ by 3", "chronyd")
    else:
        assert found.level == "ok"


async def test_nats(folder: Path, nats: NatsServer) -> None:  # noqa: F811
    found = await look(folder, NATS_SERVER=nats.url)
    assert [each for each in problems(found) if each.part != "limits"] == []
    assert any(each.part == "nats" and "version" in each.text for each in found)


class GuardedNats(NatsServer):
    """A NATS server with a token."""

    def command(self) -> Sequence[str]:
        return [*super().command(), "--auth", "secret"]


async def test_nats_that_asks_for_credentials(folder: Path) -> None:
    async with GuardedNats(environ=os.environ) as server:
        found = await look(folder, NATS_SERVER=server.url)
    check(found, "error", "nats", "uthorization", "NATS_AUTH_TOKEN")


class PlainNats(NatsServer):
    """A NATS server without JetStream."""

    def command(self) -> Sequence[str]:
        return [each for each in super().command() if each not in ("-js", "-sd", str(self.folder / "jetstream"))]


async def test_nats_without_jetstream(folder: Path) -> None:
    async with PlainNats(environ=os.environ) as server:
        found = await look(folder, NATS_SERVER=server.url)
    check(found, "warning", "nats", "JetStream cannot be used", "-js")


async def test_workers_of_another_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_env({"TRD_DIR": str(folder)}, handle_signals=False)
    async with DistributedRuntime(config=config) as runtime:
        task = runtime.endpoint("a.b.c").serve_endpoint(print)
        await task.registered
        assert [each for each in problems(await look(folder)) if each.part == "versions"] == []
        monkeypatch.setattr(reports, "__version__", "9.9.1")
        found = await look(folder)
        task.cancel()
    check(found, "warning", "versions", "1 run 9.9.1", "the same minor version")


def test_a_worker_whose_report_cannot_be_read() -> None:
    found = list(services.versions([Answer(1, [{"version": 5}], ""), Answer(2, [], "it has left")]))
    check(found, "warning", "versions", "1 run an unknown version", "the same minor version")


async def test_a_busy_worker(folder: Path) -> None:
    environ = {"TRD_DIR": str(folder)}
    async with DistributedRuntime(config=Config.from_env(environ)) as runtime:
        task = runtime.endpoint("a.b.c").serve_endpoint(print)
        await task.registered
        runtime.worker.registrations.mark(True)
        found = await look(folder)
        task.cancel()
    check(found, "warning", "instances", "its event loop is stuck", "its log has the stack")


def test_the_command(trd, trd_dir):
    said = trd.run("doctor")
    assert (said.status, said.err) == (0, "")
    assert "ok       folder: " in said.out
    said = trd.run("doctor", "--json", env={"TRD_RETRIES": "many"})
    assert said.status == 1
    last = json.loads(said.lines[-1])
    assert (last["level"], last["part"]) == ("error", "settings")
