"""The model and the front end of `deploy/kubernetes`, started: their very command lines and settings, a host a container."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
import trustme

from tests.deploy.files import container, environment, manifest
from tests.hosts.network import Network
from tests.hosts.test_deployed import PROBE, TOKEN, DeployedEtcd, DeployedNats
from tests.servers import missing
from tests.timing import PATIENCE_S
from triton_distributed.testing import ServerMissing

KEY = "a-key"
# Waits until the front end is ready, and asks it with a key and without one.
ASK = """
import sys, time, urllib.error, urllib.request as u
url, key = sys.argv[1:]
while True:
    try:
        print(u.urlopen(url + "/health").status)
        break
    except OSError:  # It does not listen yet, or has no model: 503.
        time.sleep(0.05)
body = b'{"model":"smollm2","messages":[{"role":"user","content":"hello"}],"max_tokens":3}'
request = u.Request(url + "/v1/chat/completions", body, {"authorization": "Bearer " + key})
print(u.urlopen(request).read().decode())
try:
    u.urlopen(url + "/v1/models")
except urllib.error.HTTPError as error:
    print(error.code)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        "network", [{"names": ("etcd", "nats", "model", "front-end", "client")}], indirect=True, ids=[""]
    ),
]


async def test_what_kubernetes_starts(network: Network, tmp_path: Path) -> None:
    authority = trustme.CA()
    member = authority.issue_cert("member.example")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    member.private_key_pem.write_to_path(tmp_path / "tls.key")
    for each in member.cert_chain_pems:
        each.write_to_path(tmp_path / "tls.crt", append=True)
    (tmp_path / "keys").write_text(f"{KEY}\n")

    def mounted(text: str) -> str:
        return text.replace("/etc/member-tls", str(tmp_path)).replace("/etc/api-keys", str(tmp_path))

    etcd, nats = (container(manifest("StatefulSet", name)) for name in ("etcd", "nats"))
    try:
        servers = DeployedEtcd(network["etcd"], etcd["command"]), DeployedNats(network["nats"], nats["args"])
    except ServerMissing as error:
        missing(error)
    processes = {}
    async with asyncio.timeout(PATIENCE_S), servers[0], servers[1]:
        try:
            for name in ("model", "front-end"):
                host, workload = network[name], manifest("Deployment", name)
                program, *arguments = map(mounted, container(workload)["command"])
                assert program == "trd"
                command = host.command(sys.executable, "-m", "triton_distributed.cli.main", *arguments)
                settings = {key: mounted(value) for key, value in environment(workload, host.address, TOKEN).items()}
                inside = host.environment(**settings, HOME="/nonexistent")  # The image has no home for its user.
                processes[name] = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=inside)
            url = f"http://{network['front-end'].address}:8000"
            said = await asyncio.to_thread(network["client"].run, sys.executable, "-c", ASK, url, KEY)
            for name, path in (("model", "/ready"), ("front-end", "/metrics")):
                network["client"].run(sys.executable, "-c", PROBE, f"http://{network[name].address}:9400{path}")
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                await process.communicate()
        finally:
            for process in processes.values():
                if process.returncode is None:
                    process.kill()
                    await process.communicate()
    assert {name: process.returncode for name, process in processes.items()} == {"model": 0, "front-end": 0}
    status, chat, without_key = said.splitlines()
    assert (status, without_key) == ("200", "401")
    assert '"completion_tokens":3' in chat
