"""Users, tokens that expire, TLS and certificates for clients."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.discovery.conftest import NAME, instance
from tests.servers import missing
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.errors import ConfigError, DiscoveryError
from triton_distributed.external.etcd_endpoint import EtcdRefused
from triton_distributed.runtime.backends import make_discovery
from triton_distributed.testing import ChangeLog, EtcdServer, ServerMissing

INVALID_ARGUMENT, PERMISSION_DENIED = 3, 7  # codes of gRPC
TOKEN_TTL_S = 1  # of a token that nobody uses

Opens = Callable[..., Discovery]


@pytest.fixture
async def opens() -> AsyncIterator[Opens]:
    """Makes discoveries as a runtime does, from settings; closes them."""
    made: list[Discovery] = []

    def make(server: EtcdServer, **settings: Any) -> Discovery:
        made.append(make_discovery(Config(discovery="etcd", etcd_endpoints=server.url, **settings)))
        return made[-1]

    yield make
    await asyncio.gather(*(each.close() for each in made))


@asynccontextmanager
async def etcd_with(*arguments: str, scheme: str = "http") -> AsyncIterator[EtcdServer]:
    try:
        server = EtcdServer(*arguments, scheme=scheme, environ=os.environ)
    except ServerMissing as error:
        missing(error)
    async with server:
        yield server


async def works(one: Discovery, other: Discovery) -> ChangeLog:
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    await log.until_ids([1], PATIENCE_S)
    return log


async def lets_in(server: EtcdServer, prefix: str) -> None:
    """Turn authentication on: `root`, and `worker` who may use what lies under the prefix and nothing else.

    Without our client, which asks again if a busy etcd is slow, and then hears that the user exists already.
    """

    async def ask(path: str, **body: Any) -> None:
        request = urllib.request.Request(f"{server.url}/v3/auth/{path}", json.dumps(body).encode())
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=PATIENCE_S) as reply:
            reply.read()

    def encoded(key: str) -> str:
        return base64.b64encode(key.encode()).decode()

    for name in ("root", "worker"):
        await ask("user/add", name=name, password=f"{name}'s")
        await ask("role/add", name=name)
        await ask("user/grant", user=name, role=name)
    await ask(
        "role/grant",
        name="worker",
        perm={"permType": "READWRITE", "key": encoded(f"{prefix}/"), "range_end": encoded(f"{prefix}0")},
    )
    await ask("enable")


@pytest.mark.slow
async def test_a_user_whose_tokens_expire(opens: Opens):
    """Twice: because nobody used it for its time, and because etcd, started again, knows no tokens."""
    async with etcd_with("--auth-token-ttl", str(TOKEN_TTL_S)) as server:
        await lets_in(server, "ours")
        settings = {
            "etcd_username": "worker",
            "etcd_password": "worker's",
            "etcd_prefix": "ours",
            "etcd_lease_ttl_s": 9,  # beats further apart than a token lives
        }
        one, other = (opens(server, **settings) for _ in range(2))
        log = await works(one, other)
        await asyncio.sleep(TOKEN_TTL_S + 1)  # etcd looks for expired ones once a second
        await one.register(instance(2))
        await log.until_ids([1, 2], PATIENCE_S)
        server.kill()
        await server.start()
        await one.register(instance(3))
        await log.until_ids([1, 2, 3], PATIENCE_S)


async def test_who_may_not(opens: Opens):
    async with etcd_with() as server:
        await lets_in(server, "ours")
        for username, password, prefix, code in (
            ("worker", "wrong", "ours", INVALID_ARGUMENT),
            ("worker", "worker's", "theirs", PERMISSION_DENIED),
            ("", "", "ours", INVALID_ARGUMENT),
        ):
            discovery = opens(server, etcd_username=username, etcd_password=password, etcd_prefix=prefix)
            for attempt in (discovery.register(instance(1)), discovery.watch(NAME, ChangeLog())):
                with pytest.raises(DiscoveryError) as caught:
                    await attempt
                refused = caught.value.__cause__
                assert isinstance(refused, EtcdRefused)
                assert refused.code == code
                assert server.url in str(caught.value)
                assert refused.message in str(caught.value)
                assert not password or password not in str(caught.value)


async def test_a_user_where_nobody_asks(lasting_etcd: EtcdServer, opens: Opens):
    """As after a restart with an empty folder: its users are gone too."""
    settings = {"etcd_username": "worker", "etcd_password": "x", "etcd_prefix": "nobody-asks"}
    await works(opens(lasting_etcd, **settings), opens(lasting_etcd, **settings))


class Certificates:
    """An authority, a server's certificate and a client's, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        for name, subject in (("server", "127.0.0.1"), ("client", "a-worker"), ("elsewhere", "192.0.2.1")):
            certificate = authority.issue_cert(subject)
            certificate.private_key_pem.write_to_path(folder / f"{name}.key")
            certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        self.folder = folder

    def cert(self, name: str) -> str:
        return str(self.folder / f"{name}.pem")

    def key(self, name: str) -> str:
        return str(self.folder / f"{name}.key")

    def arguments(self, name: str = "server") -> list[str]:
        return ["--cert-file", self.cert(name), "--key-file", self.key(name)]


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def test_tls(certificates: Certificates, opens: Opens):
    async with etcd_with(*certificates.arguments(), scheme="https") as server:
        one, other = (opens(server, etcd_ca=certificates.ca) for _ in range(2))
        log = await works(one, other)
        server.kill()
        await server.start()
        await one.register(instance(2))
        await log.until_ids([1, 2], PATIENCE_S)


async def test_certificates_for_clients(certificates: Certificates, opens: Opens):
    arguments = [*certificates.arguments(), "--client-cert-auth", "--trusted-ca-file", certificates.ca]
    async with etcd_with(*arguments, scheme="https") as server:
        settings = {
            "etcd_ca": certificates.ca,
            "etcd_cert": certificates.cert("client"),
            "etcd_key": certificates.key("client"),
        }
        await works(*(opens(server, **settings) for _ in range(2)))
        without = opens(server, etcd_ca=certificates.ca, connect_timeout_s=1.0)
        with pytest.raises(DiscoveryError, match="certificate"):
            await without.register(instance(2))


async def test_a_server_that_is_not_trusted(certificates: Certificates, tmp_path: Path, opens: Opens):
    other = tmp_path / "other"
    other.mkdir()
    strangers = Certificates(other)
    async with etcd_with(*certificates.arguments(), scheme="https") as server:
        settings: list[dict[str, Any]] = [{"etcd_ca": strangers.ca}, {}]
        attempts = [opens(server, connect_timeout_s=4.0, **each).watch(NAME, ChangeLog()) for each in settings]
        for error in await asyncio.gather(*attempts, return_exceptions=True):
            assert isinstance(error, DiscoveryError)
            assert f"{server.url}: its certificate is not trusted" in str(error)
        unreadable = opens(server, etcd_ca=str(tmp_path / "missing.pem"))
        with pytest.raises(ConfigError, match="TRD_ETCD_CA"):
            await unreadable.register(instance(1))


async def test_a_certificate_of_somewhere_else(certificates: Certificates, opens: Opens):
    async with etcd_with(*certificates.arguments("elsewhere"), scheme="https") as server:
        discovery = opens(server, connect_timeout_s=3.0, etcd_ca=certificates.ca)
        with pytest.raises(DiscoveryError, match="certificate is not valid for '127.0.0.1'"):
            await discovery.register(instance(1))
