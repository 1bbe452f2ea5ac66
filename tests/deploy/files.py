"""The files under `deploy/`, as their readers take them."""

from __future__ import annotations

import configparser
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.guards.tree import ROOT
from triton_distributed.config import environment_reference

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNIT = DEPLOY / "systemd" / "worker@.service"
ENVIRONMENT = DEPLOY / "systemd" / "worker.env.example"

SETTINGS = {variable for variable, _, _ in environment_reference()}
OURS = re.compile(r"TRD_|ETCD_|NATS_")
# How a version is pinned: a tag that names a release, or our own image, which is built here.
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.-]+)?|triton-distributed:dev")


def compose() -> dict[str, Any]:
    """The compose file, its anchors resolved."""
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return read


NO_MANIFESTS = {"kustomization.yaml", "adapter-values.yaml"}


@cache
def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every object of the Kubernetes manifests with the name of its file."""
    return [
        (path.name, each)
        for path in sorted(KUBERNETES.glob("*.yaml"))
        if path.name not in NO_MANIFESTS
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def manifest(kind: str, name: str) -> dict[str, Any]:
    """One object of the Kubernetes manifests."""
    (found,) = [each for _, each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def template(workload: dict[str, Any]) -> dict[str, Any]:
    """The pod template of a Deployment, StatefulSet or Job."""
    found: dict[str, Any] = workload["spec"]["template"]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    """The one container of a workload."""
    (found,) = template(workload)["spec"]["containers"]
    return dict(found)


def environment(workload: dict[str, Any], pod_ip: str, token: str = "secret") -> dict[str, str]:
    """What a container is started with; `$(NAME)` is replaced by what stands before it."""
    found: dict[str, str] = {}
    for each in container(workload)["env"]:
        if "value" in each:
            text = each["value"]
            for name, value in found.items():
                text = text.replace(f"$({name})", value)
            assert "$(" not in text, f"{each['name']} refers to what is not there yet"
            found[each["name"]] = text
        elif "fieldRef" in each["valueFrom"]:
            assert each["valueFrom"]["fieldRef"] == {"fieldPath": "status.podIP"}
            found[each["name"]] = pod_ip
        else:
            reference = each["valueFrom"]["secretKeyRef"]
            assert reference["key"] in manifest("Secret", reference["name"])["data"]
            found[each["name"]] = token
    return found


def unit() -> configparser.RawConfigParser:
    """The systemd unit; what stands there several times is joined by blanks."""
    lines: dict[str, dict[str, str]] = {}
    section = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, mark, value = line.partition("=")
            assert mark, f"{UNIT.name}: neither a section nor KEY=VALUE: {line!r}"
            entries = lines.setdefault(section, {})
            entries[key] = f"{entries[key]} {value}" if key in entries else value
    parser = configparser.RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_dict(lines)
    return parser


def seconds(text: str) -> float:
    """A time as compose and systemd write it."""
    number = re.fullmatch(r"(\d+)s?", text)
    assert number, f"{text!r} is not a number of seconds"
    return float(number[1])


def environment_file(path: Path) -> dict[str, str]:
    """The variables of an environment file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
