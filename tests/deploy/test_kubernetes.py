"""The Kubernetes manifests: the published schemas, and what no schema knows: names, ports, labels and settings agree."""

from __future__ import annotations

import base64
import binascii
import shlex
import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import (
    DEPLOY,
    KUBERNETES,
    OURS,
    PINNED,
    SETTINGS,
    container,
    environment,
    manifest,
    manifests,
    template,
)
from tests.deploy.programs import check, settings
from triton_distributed.transport.address import Address

VERSIONS = ("1.28", "1.31", "1.34")
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
NAMESPACE = "triton-distributed"
WORKLOADS = [each for _, each in manifests() if each["kind"] in ("Deployment", "StatefulSet", "Job")]
MEMBERS = [
    each for each in WORKLOADS if each["metadata"]["name"] in ("worker", "model", "gateway", "front-end", "client")
]
PROBED = [each for each in MEMBERS if each["kind"] == "Deployment"]
# Their schemas come with the Prometheus operator and with KEDA: what they may contain here.
CUSTOM = {
    "PodMonitor": ("monitoring.coreos.com/v1", {"selector", "podMetricsEndpoints"}),
    "ServiceMonitor": ("monitoring.coreos.com/v1", {"selector", "endpoints"}),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "fallback", "advanced", "triggers"},
    ),
}
MODELS = {"model.yaml", "front-end.yaml"}
OPTIONAL = {"secret.yaml", "client.yaml", "gateway.yaml", "hpa.yaml", "keda.yaml", "monitors.yaml", *MODELS}
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="no kubectl here: only our own reading is tested")


def called(each: dict[str, Any]) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("each", [each for _, each in manifests() if each["kind"] not in CUSTOM], ids=called)
def test_the_schema_of_kubernetes_holds(each, version):
    kubernetes_validate.validate(each, version, strict=True)


def test_everything_is_there_once():
    names = [called(each) for _, each in manifests()]
    assert sorted(names) == [
        "Deployment front-end",
        "Deployment gateway",
        "Deployment model",
        "Deployment worker",
        "HorizontalPodAutoscaler worker",
        "Ingress front-end",
        "Ingress gateway",
        "Job client",
        f"Namespace {NAMESPACE}",
        "NetworkPolicy front-end",
        "NetworkPolicy gateway",
        "NetworkPolicy members-only",
        "NetworkPolicy monitoring",
        "PodDisruptionBudget front-end",
        "PodDisruptionBudget gateway",
        "PodDisruptionBudget model",
        "PodDisruptionBudget worker",
        "PodMonitor worker",
        "ScaledObject worker",
        "Secret api-keys",
        "Secret member-tls",
        "Secret member-token",
        "Service etcd",
        "Service front-end",
        "Service gateway",
        "Service nats",
        "ServiceMonitor gateway",
        "StatefulSet etcd",
        "StatefulSet nats",
    ]
    assert all(each["kind"] == "Namespace" or each["metadata"]["namespace"] == NAMESPACE for _, each in manifests())


def test_kustomization_lists_what_every_cluster_needs():
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert listed[0] == "namespace.yaml"
    assert {*listed, *OPTIONAL} == {name for name, _ in manifests()}
    assert not OPTIONAL.intersection(listed)


def kubectl(*arguments: str) -> str:
    assert KUBECTL
    done = subprocess.run([KUBECTL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_kubectl
def test_kustomize_takes_it():
    built = list(yaml.safe_load_all(kubectl("kustomize", str(KUBERNETES))))
    assert {called(each) for each in built} == {called(each) for name, each in manifests() if name not in OPTIONAL}


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_selectors_match_labels(workload):
    labels = template(workload)["metadata"]["labels"]
    assert labels == workload["metadata"]["labels"]
    if "selector" in workload["spec"]:
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_services_and_the_budget_select_pods_that_exist():
    kinds = {"etcd": "StatefulSet", "nats": "StatefulSet", "gateway": "Deployment", "front-end": "Deployment"}
    for name, kind in kinds.items():
        service, workload = manifest("Service", name), manifest(kind, name)
        assert service["spec"]["selector"].items() <= template(workload)["metadata"]["labels"].items()
        assert workload["spec"].get("serviceName", name) == name
        ports = {each["name"]: each["containerPort"] for each in container(workload)["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"] or port["name"] == "http"
    for name in ("worker", "model", "gateway", "front-end"):
        budget, workload = manifest("PodDisruptionBudget", name), manifest("Deployment", name)
        assert budget["spec"]["selector"] == workload["spec"]["selector"]
        assert budget["spec"]["minAvailable"] < workload["spec"]["replicas"]


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
    (mount,) = [each for each in container(workload)["volumeMounts"] if each["name"] == "member-tls"]
    for path in (config.tls_cert, config.tls_key, config.tls_ca):
        folder, _, name = path.rpartition("/")
        assert (folder, name in secret) == (mount["mountPath"], True)
    check(container(workload)["command"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_mounted_secrets_are_those_of_their_names(workload):
    for volume in template(workload)["spec"].get("volumes", ()):
        if "secret" in volume:
            assert volume["secret"] == {"secretName": volume["name"], "defaultMode": 0o440}
            assert manifest("Secret", volume["name"])["data"]


@pytest.mark.parametrize("name", ["worker", "model"])
def test_a_worker_advertises_its_pod(name):
    worker = manifest("Deployment", name)
    port = next(each for each in container(worker)["ports"] if each["name"] == "sessions")
    for pod_ip in ("10.1.2.3", "fd00::7"):
        config = settings(environment(worker, pod_ip))
        assert config.advertise == pod_ip  # a host alone: with the port that is listened on
        assert Address.parse(config.listen).port == port["containerPort"]


@pytest.mark.parametrize("name", ["worker", "model"])
def test_a_worker_may_drain(name):
    worker = manifest("Deployment", name)
    config = settings(environment(worker, "10.1.2.3"))
    assert template(worker)["spec"]["terminationGracePeriodSeconds"] > config.drain_timeout_s
    assert "lifecycle" not in container(worker), "SIGTERM alone withdraws it from etcd: waiting would only delay that"


def test_the_gateway_ends_after_the_service_and_its_own_streams():
    gateway = manifest("Deployment", "gateway")
    inner = container(gateway)
    program, pause_s = inner["lifecycle"]["preStop"]["exec"]["command"]
    streams_s = int(next(each for each in inner["command"] if "graceful" in each).partition("=")[2])
    assert (program, int(pause_s)) == ("sleep", 10)
    assert template(gateway)["spec"]["terminationGracePeriodSeconds"] > int(pause_s) + streams_s
    port = int(next(each for each in inner["command"] if each.startswith("--port")).partition("=")[2])
    assert {"name": "http", "containerPort": port} in inner["ports"]


def test_the_front_end_ends_after_the_service_and_its_answers():
    front_end = manifest("Deployment", "front-end")
    inner = container(front_end)
    program, pause_s = inner["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = settings(environment(front_end, "10.1.2.3")).drain_timeout_s
    assert (program, int(pause_s)) == ("sleep", 10)
    assert template(front_end)["spec"]["terminationGracePeriodSeconds"] > int(pause_s) + drain_s
    assert drain_s == settings(environment(manifest("Deployment", "model"), "10.1.2.3")).drain_timeout_s
    options = dict(each.removeprefix("--").split("=") for each in inner["command"] if each.startswith("--"))
    assert {"name": "http", "containerPort": int(options["port"])} in inner["ports"]
    folder, _, name = options["api-key-file"].rpartition("/")
    assert name in manifest("Secret", "api-keys")["data"]
    assert {"name": "api-keys", "mountPath": folder, "readOnly": True} in inner["volumeMounts"]


@pytest.mark.parametrize("workload", PROBED, ids=called)
def test_probes_ask_what_answers(workload):
    inner = container(workload)
    config = settings(environment(workload, "10.1.2.3"))
    assert {"name": "status", "containerPort": config.status_port} in inner["ports"]
    assert config.status_host == "0.0.0.0", "kubectl port-forward asks the pod's loopback, all others its address"
    status, gateway = ("status", "/ready", "/ready", "/live"), ("http", *["/openapi.json"] * 3)
    asked = {"worker": status, "model": status, "gateway": gateway, "front-end": ("http", "/live", "/health", "/live")}
    port, *paths = asked[workload["metadata"]["name"]]
    for probe, path in zip(("startupProbe", "readinessProbe", "livenessProbe"), paths, strict=True):
        assert inner[probe]["httpGet"] == {"path": path, "port": port}
    startup, liveness = inner["startupProbe"], inner["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120, "a program may load a model"
    patience_s = liveness["periodSeconds"] * liveness["failureThreshold"]
    assert patience_s + (config.live_timeout_s if port == "status" else 0) >= 120, "a handler may compute"


@pytest.mark.parametrize(("name", "memory", "mib"), [("worker", "512Mi", 512), ("model", "2Gi", 2048)])
def test_a_worker_holds_no_more_than_its_container_may_have(name, memory, mib):
    worker = manifest("Deployment", name)
    config = settings(environment(worker, "10.1.2.3"))
    assert container(worker)["resources"]["limits"]["memory"] == memory
    assert config.max_message_bytes < config.max_held_bytes <= mib * 2**20 / 2


def test_prometheus_reaches_what_it_scrapes():
    monitor, service = manifest("PodMonitor", "worker"), manifest("ServiceMonitor", "gateway")
    scraped = [
        (monitor, monitor["spec"]["podMetricsEndpoints"], "Deployment", ["worker", "model"]),
        (service, service["spec"]["endpoints"], "Service", ["gateway", "front-end"]),
    ]
    for each, (endpoint,), kind, names in scraped:
        (wanted,) = each["spec"]["selector"]["matchExpressions"]
        assert wanted == {"key": "app.kubernetes.io/name", "operator": "In", "values": names}
        for name in names:
            target = manifest(kind, name)
            labelled = target if kind == "Service" else template(target)
            assert labelled["metadata"]["labels"][wanted["key"]] == name
        assert (endpoint["port"], endpoint["path"], endpoint["honorLabels"]) == ("status", "/metrics", True)
    (rule,) = manifest("NetworkPolicy", "monitoring")["spec"]["ingress"]
    assert rule["ports"] == [{"port": "status"}]


@pytest.mark.parametrize("each", [each for _, each in manifests() if each["kind"] in CUSTOM], ids=called)
def test_custom_resources_have_the_fields_of_their_kind(each):
    version, fields = CUSTOM[each["kind"]]
    assert (each["apiVersion"], set(each["spec"])) == (version, fields)


def test_workers_are_scaled_by_one_measure():
    hpa, keda = manifest("HorizontalPodAutoscaler", "worker")["spec"], manifest("ScaledObject", "worker")["spec"]
    worker = manifest("Deployment", "worker")
    assert hpa["scaleTargetRef"] == {"apiVersion": worker["apiVersion"], "kind": "Deployment", "name": "worker"}
    assert keda["scaleTargetRef"]["name"] == "worker"
    (metric,), (trigger,) = hpa["metrics"], keda["triggers"]
    assert metric["pods"]["target"]["averageValue"] == trigger["metadata"]["threshold"]
    (rule,) = yaml.safe_load((KUBERNETES / "adapter-values.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (keda["minReplicaCount"], keda["maxReplicaCount"])
    down = hpa["behavior"]["scaleDown"]
    assert down == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert hpa["minReplicas"] > manifest("PodDisruptionBudget", "worker")["spec"]["minAvailable"]


@pytest.mark.parametrize(("name", "shown"), [("gateway", "/"), ("front-end", "/v1")])
def test_the_ingress_leads_to_its_service_and_lets_streams_pass(name, shown):
    ingress, service = manifest("Ingress", name), manifest("Service", name)
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["path"] == shown
    assert path["backend"]["service"]["name"] == name
    assert path["backend"]["service"]["port"]["name"] in [each["name"] for each in service["spec"]["ports"]]
    assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"


@needs_kubectl
def test_the_command_that_lets_the_workers_answer_the_gateway(tmp_path):
    (line,) = [each for each in README.splitlines() if " patch deployment worker" in each]
    _, *arguments = shlex.split(line)
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(manifest("Deployment", "worker")))
    arguments = [each for each in arguments if each not in ("deployment", "worker")]
    patched = yaml.safe_load(kubectl(*arguments, "--local", "--output=yaml", f"--filename={file}"))
    assert container(patched)["command"] == ["python", "examples/gateway/worker.py"]
    check(container(patched)["command"])


def test_the_job_ends():
    job = manifest("Job", "client")["spec"]
    assert template(manifest("Job", "client"))["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"]
    assert job["ttlSecondsAfterFinished"]


def test_secrets_are_refused_until_they_are_filled_in():
    for name in ("member-token", "member-tls", "api-keys"):
        for text in manifest("Secret", name)["data"].values():
            with pytest.raises(binascii.Error):
                base64.b64decode(text, validate=True)
