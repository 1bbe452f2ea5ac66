"""The `openai` package of npm against a front end, a worker and the mock engine. `make test-node` installs the package."""

from __future__ import annotations

import asyncio
import json
import shutil
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.llm.test_openai_server import serving
from tests.timing import PATIENCE_S
from triton_distributed.llm import Engine, Model, ModelCard, Models, Output, Request, serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.worker.metrics import collector_of
from triton_distributed.testing.network import LocalNetwork

FOLDER = Path(__file__).parent / "node"
LOCKED = json.loads((FOLDER / "package-lock.json").read_text(encoding="utf-8"))["packages"]
CHECKS = ("models", "aChat", "aCompletion", "parameters", "embeddings", "errors", "overload")


class Broken(Engine):
    """Fails after two tokens, or at once if it may only make one."""

    slots = 4

    def __init__(self) -> None:
        self.model = Model(card=ModelCard(name="broken", context_tokens=100), tokenizer="bytes")

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if request.max_tokens > 1:
            yield Output(token_ids=[97])
            yield Output(token_ids=[98])
        raise RuntimeError("the engine broke")


def node() -> str:
    """Return node's program, or skip the test."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no node here: the client of npm is not tested")
    installed = FOLDER / "node_modules" / "openai" / "package.json"
    version = LOCKED["node_modules/openai"]["version"]
    if not installed.exists() or json.loads(installed.read_text(encoding="utf-8"))["version"] != version:
        pytest.skip(f"openai {version} of npm is not installed: `make test-node` installs it and runs this")
    return program


def test_the_lock_names_contents_and_no_host() -> None:
    packages = [each for name, each in LOCKED.items() if name]
    assert all(each["integrity"].startswith("sha512-") and "resolved" not in each for each in packages)
    wanted = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert wanted == {"openai": LOCKED["node_modules/openai"]["version"]}


async def test_the_client_of_npm() -> None:
    program = node()
    async with LocalNetwork() as here:
        worker = await here.worker()
        await serve_model(worker, MockEngine(), aliases=("alias/of",))
        await serve_model(worker, MockEngine(name="busy", slots=1, ttft_ms="1", itl_ms="200"), max_queue=0)
        await serve_model(worker, Broken())
        here.metrics.add(collector_of(worker))  # On the page of the front end, the client reads when the slot is free.
        async with Models(here) as models:
            for name in ("mock", "busy", "broken"):
                await models.wait_for(name, PATIENCE_S)
            openai = openai_app(models, max_body_bytes=1 << 20)
            app = await front_end(here, openai=openai, models=models, keys=["secret"], max_body_bytes=1 << 20)
            async with serving(app) as url:
                command = (program, str(FOLDER / "client.mjs"), f"{url}/v1", "secret")
                process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        output = (await process.communicate())[0].decode()
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
    assert process.returncode == 0, output
    done = output.splitlines()
    assert len(done) == len(CHECKS), output
    assert all(line.startswith(name) for line, name in zip(done, CHECKS, strict=True)), output
