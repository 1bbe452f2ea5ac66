"""The compose file: services that fit each other, settings that exist, images that are pinned."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.deploy.files import DEPLOY, OURS, PINNED, SETTINGS, compose, seconds
from tests.deploy.programs import check, settings
from triton_distributed.transport.address import Address

SERVICES = compose()["services"]
MEMBERS = ("worker", "model", "front-end", "client")
PORTS = {"etcd": 2379, "nats": 4222}


def test_it_has_etcd_nats_two_workers_of_each_kind_a_front_end_and_a_client_job():
    assert set(SERVICES) == {"etcd", "nats", *MEMBERS}
    assert SERVICES["worker"]["deploy"]["replicas"] == SERVICES["model"]["deploy"]["replicas"] == 2
    assert SERVICES["client"]["profiles"] == ["job"]
    assert SERVICES["client"]["restart"] == "no"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name):
    assert PINNED.fullmatch(SERVICES[name]["image"])


def test_our_image_is_built_from_the_dockerfile_beside_it():
    for name in MEMBERS:
        build = SERVICES[name]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")


@pytest.mark.parametrize("name", MEMBERS)
def test_settings_exist_and_lead_to_the_services(name):
    environment = SERVICES[name]["environment"]
    assert {each for each in environment if OURS.match(each)} <= SETTINGS
    assert environment["TRD_TOKEN"] == "${TRD_TOKEN:-}"
    config = settings({**environment, "TRD_TOKEN": ""})
    assert (config.discovery, config.event_plane) == ("etcd", "nats")
    for url, service in ((config.etcd_endpoints, "etcd"), (config.nats_server, "nats")):
        assert (urlsplit(url).hostname, urlsplit(url).port) == (service, PORTS[service])
    check(SERVICES[name]["command"])


def test_ports_agree():
    command = SERVICES["etcd"]["command"]
    assert "--listen-client-urls=http://0.0.0.0:2379" in command
    assert "--advertise-client-urls=http://etcd:2379" in command
    assert "--port=4222" in SERVICES["nats"]["command"]
    for name in ("worker", "model"):
        listen = Address.parse(SERVICES[name]["environment"]["TRD_LISTEN"])
        assert SERVICES[name]["expose"] == [str(listen.port)]
    assert "--port=8000" in SERVICES["front-end"]["command"]


@pytest.mark.parametrize(
    ("name", "asked"), [("worker", "9400/ready"), ("model", "9400/ready"), ("front-end", "8000/health")]
)
def test_a_service_is_healthy_when_it_says_so(name, asked):
    service = SERVICES[name]
    how, program, option, code = service["healthcheck"]["test"]
    assert (how, program, option) == ("CMD", "python", "-c")
    assert f"'http://127.0.0.1:{asked}'" in code
    assert service["environment"].get("TRD_STATUS_PORT", "8000") == asked.partition("/")[0]
    compile(code, "healthcheck", "exec")


def test_only_the_front_end_is_published_on_this_machine_and_volumes_exist():
    for name, service in SERVICES.items():
        published = ["127.0.0.1:8000:8000"] if name == "front-end" else None
        assert service.get("ports") == published, f"{name} would be open to the network"
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in compose()["volumes"]


@pytest.mark.parametrize("name", ["worker", "model", "front-end"])
def test_it_may_drain(name):
    service = SERVICES[name]
    assert service["stop_signal"] == "SIGTERM"
    config = settings({**service["environment"], "TRD_TOKEN": ""})
    assert seconds(service["stop_grace_period"]) > config.drain_timeout_s


def test_members_have_no_rights_and_nothing_to_write_to():
    for name in MEMBERS:
        service = SERVICES[name]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert service["security_opt"] == ["no-new-privileges:true"]
