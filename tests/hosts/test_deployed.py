"""What compose and Kubernetes would start, started: the very command lines and settings of `deploy/`, a host a container.

The images are not there: etcd and NATS are this machine's, the paths of their folders are replaced, and so is that of
the mounted certificates.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trustme

from tests.deploy.files import compose, container, environment, manifest
from tests.guards.tree import ROOT
from tests.hosts.network import Host, Network
from tests.hosts.running import HostEtcd, HostNats
from tests.servers import missing
from tests.timing import PATIENCE_S
from triton_distributed.testing import ServerMissing

WORKERS = ("worker-1", "worker-2")
TOKEN = "a long random text"
PROBE = "import sys, urllib.request as u; print(*(u.urlopen(each).status for each in sys.argv[1:]))"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("network", [{"names": ("etcd", "nats", *WORKERS, "client")}], indirect=True, ids=[""]),
]


def replaced(command: Sequence[str], program: str, folder: Path) -> list[str]:
    """A server's command line with this machine's program, and its folder instead of the container's."""
    options = [each for each in command if each.startswith("-")]
    roots = ("=/etcd-data", "=/data")
    for root in roots:
        options = [each.replace(root, f"={folder}") if root in each else each for each in options]
    return [program, *options]


class DeployedEtcd(HostEtcd):
    def __init__(self, host: Host, command: Sequence[str]) -> None:
        super().__init__(host)
        self._command = command

    def command(self) -> Sequence[str]:
        return self.host.command(*replaced(self._command, self._program, self.folder))


class DeployedNats(HostNats):
    def __init__(self, host: Host, command: Sequence[str]) -> None:
        super().__init__(host)
        self._command = command

    def command(self) -> Sequence[str]:
        return self.host.command(*replaced(self._command, self._program, self.folder))


def ours(command: Sequence[str]) -> list[str]:
    assert command[0] == "python"
    return [sys.executable, str(ROOT / command[1]), *command[2:]]


async def deployed(
    network: Network,
    etcd: Sequence[str],
    nats: Sequence[str],
    worker: Sequence[str],
    worker_settings: dict[str, dict[str, str]],
    client: Sequence[str],
    client_settings: dict[str, str],
    probe: Callable[[Network, str], object],
) -> None:
    """Start it all, run the job, and stop the workers as their keepers do."""
    try:
        servers = DeployedEtcd(network["etcd"], etcd), DeployedNats(network["nats"], nats)
    except ServerMissing as error:
        missing(error)
    async with asyncio.timeout(PATIENCE_S), servers[0], servers[1]:
        processes = []
        try:
            for name in WORKERS:
                host = network[name]
                command, settings = host.command(*ours(worker)), host.environment(**worker_settings[name])
                processes.append(await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=settings))
            ls = (sys.executable, "-m", "triton_distributed.cli.main", "ls", "--json")
            while (listed := network["client"].run(*ls, settings=client_settings)).count('"state":"serving"') < 2:
                pass
            assert all(f"tcp://{network[name].address}:7000" in listed for name in WORKERS), listed
            stranger = {key: value for key, value in client_settings.items() if not key.startswith("TRD_T")}
            assert network["client"].run(*ls, settings=stranger).count('"state":"unreachable"') == 2
            for name in WORKERS:
                probe(network, name)
            answer = network["client"].run(*ours(client), settings=client_settings)
            assert answer.split("\n")[:-1] == list("hello world") * 10
            for process in processes:
                process.terminate()
            outputs = [(await process.communicate())[0] for process in processes]
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    await process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert [output.count(b"Received request") for output in outputs] == [5, 5]


async def test_what_compose_starts(network: Network):
    services = compose()["services"]
    settings = {
        name: {key: value.replace("${TRD_TOKEN:-}", TOKEN) for key, value in services[name]["environment"].items()}
        for name in ("worker", "client")
    }
    await deployed(
        network,
        services["etcd"]["command"],
        services["nats"]["command"],
        services["worker"]["command"],
        dict.fromkeys(WORKERS, settings["worker"]),
        services["client"]["command"],
        settings["client"],
        lambda network, name: network[name].run(sys.executable, *services["worker"]["healthcheck"]["test"][2:]),
    )


async def test_what_kubernetes_starts(network: Network, tmp_path: Path):
    authority = trustme.CA()
    member = authority.issue_cert("member.example")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    member.private_key_pem.write_to_path(tmp_path / "tls.key")
    for each in member.cert_chain_pems:
        each.write_to_path(tmp_path / "tls.crt", append=True)

    def settings(kind: str, name: str, pod_ip: str) -> dict[str, str]:
        found = environment(manifest(kind, name), pod_ip, TOKEN)
        return {key: value.replace("/etc/member-tls", str(tmp_path)) for key, value in found.items()}

    def probe(network: Network, name: str) -> None:
        (port,) = [each["containerPort"] for each in worker["ports"] if each["name"] == "status"]
        paths = [worker[each]["httpGet"]["path"] for each in ("startupProbe", "readinessProbe", "livenessProbe")]
        urls = [f"http://{network[name].address}:{port}{path}" for path in (*paths, "/metrics")]
        assert network["client"].run(sys.executable, "-c", PROBE, *urls).split() == ["200"] * len(urls)
        forwarded = [f"http://127.0.0.1:{port}{path}" for path in ("/", "/stacks")]
        assert network[name].run(sys.executable, "-c", PROBE, *forwarded).split() == ["200", "200"]

    etcd, nats, worker, client = (
        container(manifest(*each))
        for each in (("StatefulSet", "etcd"), ("StatefulSet", "nats"), ("Deployment", "worker"), ("Job", "client"))
    )
    await deployed(
        network,
        etcd["command"],
        nats["args"],
        worker["command"],
        {name: settings("Deployment", "worker", network[name].address) for name in WORKERS},
        client["command"],
        settings("Job", "client", network["client"].address),
        probe,
    )
