"""Settings that nobody knows, and values that nobody asks for, do not go unnoticed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.runtime.programs import program
from triton_distributed import config
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.runtime import DistributedRuntime


@pytest.fixture(autouse=True)
def fresh() -> None:
    config._warn_of.cache_clear()


def test_a_slip_is_named_with_what_was_meant(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"TRD_DRAIN_TIMEOUT": "5", "TRD_QUITE_SOMETHING_ELSE": "1", "TRD_EMPTY": "", "TRD_RETRIES": "1"}
    for _ in range(2):  # said once
        assert Config.from_env(environ).drain_timeout_s == 30.0
    assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
        (logging.WARNING, "TRD_DRAIN_TIMEOUT is set, but there is no such setting: did you mean TRD_DRAIN_TIMEOUT_S?"),
        (
            logging.WARNING,
            "TRD_QUITE_SOMETHING_ELSE is set, but there is no such setting: docs/settings.md lists all settings",
        ),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "TRD_TEST_LOOP",
        "TRD_PYTHON_VERSION",
        "TRD_WORKER_SERVICE_HOST",  # Kubernetes has these of a service named trd-worker
        "TRD_WORKER_SERVICE_PORT_HTTP",
        "TRD_WORKER_PORT",
        "TRD_WORKER_PORT_7000_TCP_ADDR",
        "ETCD_BIN",
        "NATS_SERVER_BIN",
        "HOME",
    ],
)
def test_what_others_read_is_no_slip(name: str) -> None:
    assert config.unknown_settings({name: "1"}) == []


async def test_a_program_says_it_on_its_standard_error(trd_dir: Path, tmp_path: Path) -> None:
    code = """
import asyncio
from triton_distributed.runtime import DistributedRuntime

async def main():
    for _ in range(2):
        await DistributedRuntime(asyncio.get_running_loop()).close()

asyncio.run(main())
"""
    async with program(tmp_path, code, environment={"TRD_MAX_INFLIGHTS": "5", "TRD_RETRYS": "5"}) as made:
        _, errors = await made.output()
    assert [line.split(" ")[0] for line in errors.splitlines()] == ["TRD_MAX_INFLIGHTS", "TRD_RETRYS"]
    assert "did you mean TRD_RETRIES?" in errors
    assert await made.ended() == 0


@pytest.mark.parametrize("discovery", ["file", "memory", "etcd", "static"])
async def test_garbage_in_the_fixed_list_is_an_error_whoever_asks_for_it(discovery: str, trd_dir: Path) -> None:
    settings = Config.from_env({**os.environ, "TRD_DISCOVERY": discovery, "TRD_STATIC": "ns.comp.ep=h:1"})
    with pytest.raises(ConfigError, match="is not an address") as caught:
        DistributedRuntime(config=settings)
    assert caught.value.setting == "TRD_STATIC"
