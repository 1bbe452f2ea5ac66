"""The Kubernetes manifests: the published schemas, and what no schema knows: names, ports, labels and settings agree."""

from __future__ import annotations

import base64
import binascii
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import KUBERNETES, OURS, PINNED, SETTINGS, container, environment, manifest, manifests, template
from tests.deploy.programs import check, settings
from triton_distributed.transport.address import Address

VERSIONS = ("1.28", "1.31", "1.34")
NAMESPACE = "triton-distributed"
WORKLOADS = [each for _, each in manifests() if each["kind"] in ("Deployment", "StatefulSet", "Job")]
MEMBERS = [each for each in WORKLOADS if each["metadata"]["name"] in ("worker", "client")]


def called(each: dict[str, Any]) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("each", [each for _, each in manifests()], ids=called)
def test_the_schema_of_kubernetes_holds(each, version):
    kubernetes_validate.validate(each, version, strict=True)


def test_everything_is_there_once():
    names = [called(each) for _, each in manifests()]
    assert sorted(names) == [
        "Deployment worker",
        "Job client",
        f"Namespace {NAMESPACE}",
        "NetworkPolicy members-only",
        "PodDisruptionBudget worker",
        "Secret member-tls",
        "Secret member-token",
        "Service etcd",
        "Service nats",
        "StatefulSet etcd",
        "StatefulSet nats",
    ]
    assert all(each["kind"] == "Namespace" or each["metadata"]["namespace"] == NAMESPACE for _, each in manifests())


def test_kustomization_lists_every_file_but_secrets_and_job():
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert listed[0] == "namespace.yaml"
    assert {*listed, "secret.yaml", "client.yaml"} == {name for name, _ in manifests()}


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_selectors_match_labels(workload):
    labels = template(workload)["metadata"]["labels"]
    assert labels == workload["metadata"]["labels"]
    if "selector" in workload["spec"]:
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_services_and_the_budget_select_pods_that_exist():
    for name in ("etcd", "nats"):
        service, workload = manifest("Service", name), manifest("StatefulSet", name)
        assert service["spec"]["selector"].items() <= template(workload)["metadata"]["labels"].items()
        assert workload["spec"]["serviceName"] == name
        ports = {each["name"]: each["containerPort"] for each in container(workload)["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    budget, worker = manifest("PodDisruptionBudget", "worker"), manifest("Deployment", "worker")
    assert budget["spec"]["selector"] == worker["spec"]["selector"]
    assert budget["spec"]["minAvailable"] < worker["spec"]["replicas"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_pods_are_restricted(workload):
    pod, inner = template(workload)["spec"], container(workload)
    assert PINNED.fullmatch(inner["image"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert inner["securityContext"] == context
    assert "memory" in inner["resources"]["limits"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_mounts_and_probed_ports_exist(workload):
    pod, inner = template(workload)["spec"], container(workload)
    volumes = {each["name"] for each in pod.get("volumes", ())}
    volumes |= {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
    assert {each["name"] for each in inner["volumeMounts"]} == volumes
    ports = {each["name"] for each in inner.get("ports", ())}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("tcpSocket", "httpGet"):
            if how in inner.get(probe, {}):
                assert inner[probe][how]["port"] in ports


@pytest.mark.parametrize("workload", MEMBERS, ids=called)
def test_settings_exist_and_lead_to_the_services(workload):
    variables = environment(workload, "10.1.2.3")
    assert {each for each in variables if OURS.match(each)} <= SETTINGS
    config = settings(variables)
    assert (config.discovery, config.event_plane) == ("etcd", "nats")
    for url, name in ((config.etcd_endpoints, "etcd"), (config.nats_server, "nats")):
        (port,) = manifest("Service", name)["spec"]["ports"]
        assert (urlsplit(url).hostname, urlsplit(url).port) == (name, port["port"])
    secret = manifest("Secret", "member-tls")["data"]
    (volume,) = [each for each in template(workload)["spec"]["volumes"] if "secret" in each]
    (mount,) = [each for each in container(workload)["volumeMounts"] if each["name"] == volume["name"]]
    assert volume["secret"]["secretName"] == "member-tls"
    for path in (config.tls_cert, config.tls_key, config.tls_ca):
        folder, _, name = path.rpartition("/")
        assert (folder, name in secret) == (mount["mountPath"], True)
    check(container(workload)["command"])


def test_a_worker_advertises_its_pod():
    worker = manifest("Deployment", "worker")
    (port,) = container(worker)["ports"]
    for pod_ip in ("10.1.2.3", "fd00::7"):
        config = settings(environment(worker, pod_ip))
        assert config.advertise == pod_ip  # a host alone: with the port that is listened on
        assert Address.parse(config.listen).port == port["containerPort"]


def test_a_worker_may_drain():
    worker = manifest("Deployment", "worker")
    config = settings(environment(worker, "10.1.2.3"))
    assert template(worker)["spec"]["terminationGracePeriodSeconds"] > config.drain_timeout_s


def test_the_job_ends():
    job = manifest("Job", "client")["spec"]
    assert template(manifest("Job", "client"))["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"]
    assert job["ttlSecondsAfterFinished"]


def test_secrets_are_refused_until_they_are_filled_in():
    for name in ("member-token", "member-tls"):
        for text in manifest("Secret", name)["data"].values():
            with pytest.raises(binascii.Error):
                base64.b64decode(text, validate=True)
