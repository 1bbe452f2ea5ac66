"""Runtimes with TLS and a token: by settings alone, and without the right ones not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from tests.certificates import Member
from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.transport.sessions import needs_ipv6
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError, ConnectionFailed
from triton_distributed.runtime import DistributedRuntime

TOKEN = "correct horse battery staple"


async def echo(request: Any) -> Any:
    return request


async def count(request: int) -> AsyncIterator[int]:
    for number in range(request):
        yield number


@pytest.fixture
def member(tmp_path: Path) -> Member:
    return Member(tmp_path / "member", trustme.CA(), name="workers.example")


@pytest.fixture(params=["tls", "token", "tls and token"])
def settings(request: pytest.FixtureRequest, member: Member) -> dict[str, Any]:
    """Of every member."""
    return {
        **(member.config() if "tls" in request.param else {}),
        **({"token": TOKEN} if "token" in request.param else {}),
    }


@pytest.fixture
async def closed(trd_dir: Path, settings: dict[str, Any]) -> AsyncIterator[Cluster]:
    """Runtimes on TCP that take members only."""
    made = Cluster(discovery="file", directory=trd_dir, listen="tcp://127.0.0.1:0", **settings)
    yield made
    await made.close()


@pytest.mark.any_loop
async def test_everything_works_between_members(closed: Cluster) -> None:
    await closed.worker(echo)
    client = await closed.client()
    assert await patiently(client.call({"a": [1, None]})) == {"a": [1, None]}
    array = np.arange(1 << 20, dtype=np.float32)
    assert (await patiently(client.call(array)) == array).all()
    answers = await patiently(asyncio.gather(*[client.call(number) for number in range(200)]))
    assert answers == [*range(200)]
    await closed.worker(count, "t.c.count")
    stream = await (await closed.client("t.c.count")).generate(5000, annotated=False)
    assert await patiently(drained(stream)) == [*range(5000)]


@pytest.mark.any_loop
async def test_a_stranger_is_told_which_setting_and_the_worker_says_so_once(
    closed: Cluster, trd_dir: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await closed.worker(echo)
    stranger = closed.runtime(**dict.fromkeys(settings, ""))
    client = await stranger.endpoint("t.c.e").client()
    await patiently(client.wait_for_instances())
    setting = "TRD_TLS_CERT" if "tls_cert" in settings else "TRD_TOKEN"
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        for _ in range(5):
            with pytest.raises(ConnectionFailed, match=setting):
                await patiently(client.call(1))
    lines = [each.getMessage() for each in caplog.records if each.name == "triton_distributed.transport"]
    assert len(lines) == 1
    assert lines[0].startswith("turned tcp://127.0.0.1:")
    assert TOKEN not in caplog.text
    member = await closed.client()
    assert await patiently(member.call(1)) == 1


async def test_a_worker_with_another_token_is_passed_by(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, token=TOKEN)
    try:
        other = cluster.runtime(token="wrong")
        other.endpoint("t.c.e").serve_endpoint(echo)
        await cluster.worker(echo)
        client = await cluster.client()
        await until(lambda: len(client.instance_ids()) == 2)
        for number in range(10):
            assert await patiently(client.call(number)) == number
        with pytest.raises(ConnectionFailed, match="refused: .*TRD_TOKEN"):
            await patiently(client.direct(1, other.instance_id))
    finally:
        await cluster.close()


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://[::1]:0"], ids=["IPv4", "IPv6"])
async def test_the_name_of_workers(trd_dir: Path, member: Member, listen: str) -> None:
    if "::1" in listen:
        needs_ipv6()
    cluster = Cluster(discovery="file", directory=trd_dir, listen=listen, **member.config())
    try:
        await cluster.worker(echo)
        for name, works in (("workers.example", True), ("other.example", False)):
            client = await cluster.runtime(tls_server_name=name).endpoint("t.c.e").client()
            if works:
                assert await patiently(client.call(1)) == 1
            else:
                with pytest.raises(ConnectionFailed, match="TRD_TLS_SERVER_NAME"):
                    await patiently(client.call(1))
    finally:
        await cluster.close()


async def test_certificates_are_renewed_without_a_restart(trd_dir: Path, member: Member) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, listen="tcp://127.0.0.1:0", **member.config())
    try:
        await cluster.worker(echo)
        client = await cluster.client()
        assert await patiently(client.call(1)) == 1
        (instance,) = client.candidates.table.instances

        def serial() -> object:
            session = cluster.caller.pool.get(instance.addresses)
            assert session is not None
            return session._transport.get_extra_info("ssl_object").getpeercert()["serialNumber"]  # type: ignore[union-attr]

        before = serial()
        member.write(trustme.CA())
        assert await patiently(client.call(2)) == 2
        assert serial() == before  # the session that there is goes on
        session = cluster.caller.pool.get(instance.addresses)
        assert session is not None
        session._transport.abort()  # type: ignore[union-attr]
        await until(lambda: cluster.caller.pool.get(instance.addresses) is None)
        assert await patiently(client.call(3)) == 3
        assert serial() != before
    finally:
        await cluster.close()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tls_cert": "cert"}, "TRD_TLS_CA"),
        ({"tls_key": "key"}, "TRD_TLS_CERT"),
        ({"tls_ca": "ca"}, "TRD_TLS_CERT"),
        ({"tls_server_name": "workers.example"}, "TRD_TLS_CERT"),
        ({"tls_cert": "none", "tls_ca": "ca"}, "TRD_TLS_CERT='none'"),
        ({"tls_cert": "cert", "tls_key": "none", "tls_ca": "ca"}, "TRD_TLS_KEY='none'"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_ca": "none"}, "TRD_TLS_CA='none'"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_ca": "key"}, "TRD_TLS_CA="),
        ({"tls_cert": "ca", "tls_key": "key", "tls_ca": "ca"}, "TRD_TLS_CERT="),
    ],
)
async def test_what_is_wrong_with_the_files_is_said_at_the_start(
    member: Member, settings: dict[str, Any], names: str
) -> None:
    files: dict[str, Any] = {"cert": member.cert, "key": member.key, "ca": member.ca}
    with pytest.raises(ConfigError, match=f"^{names}"):
        DistributedRuntime(config=Config(**{name: files.get(each, each) for name, each in settings.items()}))


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(Config(token=TOKEN))
