"""No secret of a setting is ever shown: in a `repr`, an error, a line of the log, the output of `trd`, or a record."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import until
from tests.timing import PATIENCE_S
from tests.warm import TRD, Forked, possible
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.external.etcd_endpoint import EtcdOptions
from triton_distributed.external.nats import NatsOptions
from triton_distributed.redaction import shown, without_secrets
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import NatsServer

# Two halves, because a character between them may cut a password where a URL is read. The second is told by itself.
FIRST, SECOND = "alpha9secret", "omega9secret"
NUMBER = "5436718"  # as a first half it could be taken for a port
SHORT_S = 0.1

SETTINGS: list[Field[Any]] = list(fields(Config))
TEXTS = [each for each in SETTINGS if each.type == "str"]
SECRETS = [each for each in SETTINGS if each.metadata.get("secret")]
NAMES = ("etcd_username", "nats_username", "etcd_prefix", "tls_server_name")  # names, which are shown


def name_of(setting: Field[Any]) -> str:
    return str(setting.name)


def urls(scheme: str) -> Iterator[str]:
    """URLs that hold a secret, as somebody may write them."""
    where = "127.0.0.1:1"
    yield f"{scheme}://user:{FIRST}@{where}"
    yield f"{scheme}://{FIRST}@{where}"
    yield f"user:{FIRST}@{where}"
    yield f"{scheme}://127.0.0.1:2,{scheme}://user:{FIRST}@{where}"
    yield f"{scheme}://user:{FIRST}@{where}, {scheme}://127.0.0.1:2"
    yield f"{scheme}://{where}?password={FIRST}"
    for between in "@,:/?#;%=[] ":
        yield f"{scheme}://user:{FIRST}{between}{SECOND}@{where}"
        yield f"{scheme}://user:{NUMBER}{between}{SECOND}@{where}"
        yield f"user:{FIRST}{between}{SECOND}@{where}"


PEM = f"-----BEGIN PRIVATE KEY-----\n{FIRST}\n-----END PRIVATE KEY-----\n"


def check(text: str, what: object) -> None:
    for secret in (FIRST, SECOND, NUMBER):
        assert secret not in text, f"{what}:\n{text}"


def told(error: BaseException) -> str:
    """All that an error shows of itself, and of its causes."""
    parts = [str(error), repr(error), repr(error.args), repr(vars(error)), *traceback.format_exception(error)]
    parts.append(repr(pickle.loads(pickle.dumps(error))) if isinstance(error, ConfigError) else "")
    return "\n".join(parts)


async def exercised(make: Callable[[], Config], directory: Path) -> str:
    """What a program with these settings gets to see: reprs, errors, and what is written into the folder."""
    seen: list[str] = []

    async def attempt(step: Any) -> Any:
        try:
            async with asyncio.timeout(2 * SHORT_S):
                return await step()
        except Exception as error:
            seen.append(told(error))
        return None

    try:
        config = make()
        seen.append(repr(config))
        runtime = DistributedRuntime(config=config)
    except Exception as error:
        seen.append(told(error))
        return "\n".join(seen)
    async with runtime:
        seen.append(f"{runtime!r} {runtime.discovery!r} {runtime.discovery.where}")
        endpoint = runtime.endpoint("t.c.e")

        async def handler(request: Any) -> Any:
            return request

        served = endpoint.serve_endpoint(handler)
        await asyncio.wait([served], timeout=SHORT_S)
        for path in directory.rglob("*"):
            seen.append(str(path) + (path.read_text(errors="replace") if path.is_file() else ""))
        if not served.done() and (client := await attempt(endpoint.client)) is not None:
            await attempt(client.wait_for_instances)
            seen.append(repr(client) + repr(client.candidates.table.instances))
            await attempt(lambda: client.call(1))
        if config.nats_server:
            component = runtime.namespace("t").component("c")
            await attempt(lambda: component.publish("news", 1))
            seen.append(repr(await attempt(lambda: component.subscribe("news"))))
            await attempt(lambda: component.queue("work").put(1))
        await asyncio.wait([served], timeout=SHORT_S)
        served.cancel()
        await asyncio.wait([served])
        if not served.cancelled() and (failure := served.exception()) is not None:
            seen.append(told(failure))
    return "\n".join(seen)


def settings_for(setting: Field[Any], value: Any, directory: Path) -> dict[str, Any]:
    """Settings with which something looks at `value`."""
    values: dict[str, Any] = {
        "directory": directory,
        "discovery": "etcd" if "etcd" in setting.name else "static" if setting.name == "static" else "file",
        "etcd_endpoints": "http://127.0.0.1:1",
        "nats_server": "nats://127.0.0.1:1" if "nats" in setting.name else "",
        "connect_timeout_s": SHORT_S,
        "handle_signals": False,
        "drain_timeout_s": SHORT_S,
    }
    return {**values, setting.name: value}


def scheme_of(setting: Field[Any]) -> str:
    return "http" if setting.name == "etcd_endpoints" else "nats" if setting.name == "nats_server" else "tcp"


@pytest.mark.parametrize("setting", [each for each in TEXTS if each.name not in NAMES], ids=name_of)
async def test_of_a_setting_of_text(setting: Field[Any], trd_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    values = [*urls(scheme_of(setting)), PEM, f"nats://user:{FIRST}@127.0.0.1:4222"]
    if setting in SECRETS:
        values = [FIRST, f"{FIRST}\udcff", values[0]]
    elif setting.name not in ("etcd_endpoints", "nats_server", "static", "listen", "advertise"):
        values = [values[0], PEM]
    for value in values:
        if setting.name == "static":
            value = f"t.c.e={value}"
        text = await exercised(functools.partial(Config, **settings_for(setting, value, trd_dir)), trd_dir)
        check(text, value)
        check(caplog.text, value)
        caplog.clear()
    if setting.name == "static":
        check(await exercised(lambda: Config(**settings_for(setting, values[0], trd_dir)), trd_dir), "no name")


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_of_a_variable(setting: Field[Any]) -> None:
    """A URL in any variable, whatever it is for; and the values that an error gives back."""
    if setting.name in NAMES:
        return
    for value in (f"tcp://user:{FIRST}@127.0.0.1:1", PEM):
        try:
            config = Config.from_env({setting.metadata["variable"]: value})
        except ConfigError as error:
            check(told(error), value)
        else:
            check(repr(config).replace(str(config.directory), ""), value)


def test_what_is_no_secret_is_shown() -> None:
    config = Config(nats_server=f"nats://user:{FIRST}@nats.example:4222,tls://other:4223", token=FIRST, retries=7)
    text = repr(config)
    for each in ("nats://***@nats.example:4222,tls://other:4223", "retries=7", "token='***'", "nats_token=''"):
        assert each in text
    check(text, "Config")
    check(repr(NatsOptions(servers=config.nats_server, password=FIRST, token=FIRST, nkey=FIRST)), "NatsOptions")
    check(repr(EtcdOptions(endpoints=f"http://u:{FIRST}@h:1", password=FIRST)), "EtcdOptions")
    assert "nats.example:4222" in str(ConfigError("NATS_SERVER", config.nats_server, "wrong"))
    for plain in ("nats://a:1,nats://b:2", "unix:///run/a@b", "a mail to me@example", "http://h:1/path@x"):
        assert shown("TRD_LISTEN", plain).endswith(plain.rpartition("@")[2])
    assert without_secrets("tell me@example of nats://a:1") == "tell me@example of nats://a:1"


@pytest.mark.parametrize("password", ["plain", "with:colon", "with@at", "with%2Cescape", "12345"])
async def test_a_password_in_the_url_of_a_server_that_takes_it(
    password: str, nats: NatsServer, trd_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used, and not shown when the server goes away."""
    caplog.set_level(logging.DEBUG)
    url = nats.url.replace("://", f"://user:{password}{FIRST}@")
    config = Config(directory=trd_dir, nats_server=url, handle_signals=False, connect_timeout_s=PATIENCE_S)
    async with DistributedRuntime(config=config) as runtime:
        component = runtime.namespace("t").component("c")
        subscription = await component.subscribe("news")
        await component.publish("news", 1)
        assert (await subscription.get(PATIENCE_S)).data == 1
        nats.kill()
        await until(lambda: "disconnected" in caplog.text)
        assert nats.url.partition("://")[2] in caplog.text
    check(caplog.text, url)


VARIABLES = {
    "NATS_SERVER": "nats://user:{}@127.0.0.1:1",
    "ETCD_ENDPOINTS": "http://user:{}@127.0.0.1:1",
    "TRD_STATIC": "t.c.e=tcp://user:{}@127.0.0.1:1",
    "TRD_LISTEN": "tcp://user:{}@127.0.0.1:1",
    "TRD_ADVERTISE": "tcp://user:{}@127.0.0.1:1",
    "TRD_TOKEN": "{}",
    "NATS_AUTH_PASSWORD": "{}",
    "TRD_TLS_KEY": "-----BEGIN PRIVATE KEY-----\n{}",
}
COMMANDS = {
    "ls": ("ls",),
    "call": ("call", "t.c.e", "1", "--wait", "0.2"),
    "serve": ("serve", "math:sqrt", "--endpoint", "t.c.e"),
}


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("command", COMMANDS)
def test_of_trd(command: str, variable: str, trd_dir: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TRD_", "NATS_", "ETCD_"))},
        "TRD_DIR": str(trd_dir),
        "TRD_LOG": "debug",
        "TRD_CONNECT_TIMEOUT_S": str(SHORT_S),
        variable: VARIABLES[variable].format(FIRST),
    }
    if variable.startswith("NATS"):
        environment.setdefault("NATS_SERVER", "nats://127.0.0.1:1")
        environment["TRD_REQUEST_PLANE"] = "nats"
    if variable == "TRD_STATIC":
        environment["TRD_DISCOVERY"] = "static"
    if variable == "TRD_ADVERTISE":
        environment["TRD_LISTEN"] = "tcp://127.0.0.1:0"
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "stdin": subprocess.DEVNULL,
        "text": True,
        "env": environment,
    }
    process: subprocess.Popen[str]
    if possible(environment):
        process = Forked(TRD, COMMANDS[command], **options)
    else:
        process = subprocess.Popen([sys.executable, "-m", "triton_distributed.cli.main", *COMMANDS[command]], **options)
    try:
        assert process.stdout is not None
        if command == "serve":  # one that can serve says so, and is told to end
            said = process.stdout.readline()
            process.terminate()
        else:
            said = ""
        said += process.communicate(timeout=PATIENCE_S)[0]
    finally:
        process.kill()
        process.wait()
    assert said or (command, variable) == ("call", "TRD_TOKEN")
    check(said, (command, variable))
