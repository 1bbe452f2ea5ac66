"""Checks of what a program talks to: discovery with its instances, and NATS."""

from __future__ import annotations

import asyncio
import email.utils
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import msgspec

from triton_distributed import __version__
from triton_distributed.cli.checks.finding import Finding, error, ok, warning
from triton_distributed.cli.cluster import Cluster, cluster
from triton_distributed.cli.health import Answer, answer_of
from triton_distributed.cli.instances import listed, silences
from triton_distributed.config import Config
from triton_distributed.errors import BrokerError, ConfigError, DiscoveryError
from triton_distributed.names import Instance
from triton_distributed.runtime.backends import make_nats
from triton_distributed.runtime.reports import WorkerReport

SLOW_S = 0.5
"""Seconds for a first answer of discovery above which it is reported."""

SKEW_S = 5.0
"""Seconds by which two clocks may differ: certificates become valid late, and log lines cannot be put in order."""

MOST_NAMED = 5
"""Instances that cannot be reached and are named one by one."""

JETSTREAM_S = 2.0
"""Seconds to wait for JetStream's answer; a server without it answers at once or not at all."""


async def discovery(config: Config) -> tuple[list[Finding], list[Instance]]:
    """Check that discovery can be read, how fast, and whether the listed instances can be reached.

    Returns:
        what was found, and the listed instances.
    """
    try:
        async with cluster(replace(config, status_port=-1), config.connect_timeout_s) as system:
            began = time.monotonic()
            found_instances = await listed(system.runtime.discovery)
            took_s = time.monotonic() - began
            where = system.runtime.discovery.where
            found = [ok("discovery", f"{where}: {len(found_instances)} instance(s) listed, in {1000 * took_s:.0f} ms")]
            if took_s > SLOW_S:
                advice = "is it overloaded, or far away? To register and to find a worker takes as long"
                found = [warning("discovery", f"{where} took {took_s:.2g} s to answer", advice)]
            return [*found, *await _unreachable(system, found_instances)], found_instances
    except DiscoveryError as failed:
        return [error("discovery", str(failed), discovery_advice(config, str(failed)))], []
    except ConfigError as failed:
        return [error("discovery", str(failed), "docs/settings.md describes the setting")], []


def discovery_advice(config: Config, words: str) -> str:
    """What to do about an error of discovery with this text."""
    if "pip install" in words:
        return "pip install 'triton-distributed[etcd]'"
    if config.discovery != "etcd":
        return "set TRD_DIR to a folder of this user on a local file system"
    if "authentication failed" in words or "invalid user" in words or "user name is empty" in words:
        return "set TRD_ETCD_USERNAME and TRD_ETCD_PASSWORD"
    if "permission denied" in words:
        return f"grant the user access to keys that begin with {config.etcd_prefix}/"
    return "is etcd running at ETCD_ENDPOINTS, and is its port open? `curl URL/health` asks it"


async def _unreachable(system: Cluster, instances: Iterable[Instance]) -> list[Finding]:
    workers = {(each.id, each.addresses): each for each in instances}.values()
    reasons = await silences(system.runtime, workers)
    silent = [(each, reason) for each, reason in zip(workers, reasons, strict=True) if reason]
    advice = "is the worker stopped, or the port closed by a firewall? Its TRD_ADVERTISE must name its host"
    found = [
        warning("instances", f"{each.endpoint}, instance {each.id}: {reason}", advice)
        for each, reason in silent[:MOST_NAMED]
    ]
    if len(silent) > MOST_NAMED:
        found.append(warning("instances", f"{len(silent) - MOST_NAMED} more cannot be reached", "see `trd ls`"))
    for each in workers:
        if each.busy:
            words = f"{each.endpoint}, instance {each.id}: its event loop is stuck"
            found.append(warning("instances", words, "its log has the stack of the code that blocks the loop"))
    answering = {each.id for each, reason in zip(workers, reasons, strict=True) if not reason and not each.busy}
    answers = await system.ask(answering, "worker")
    return [*found, *versions(answers), *unhealthy(answers)]


def versions(answers: Iterable[Answer]) -> Iterator[Finding]:
    """Check that workers run the version of this command, up to its last part; each answers about itself."""
    found: Counter[str] = Counter()
    for each in answers:
        try:
            found[msgspec.convert(each.items[0], WorkerReport).version] += 1
        except (IndexError, msgspec.ValidationError):  # It has left meanwhile, or its version reports otherwise.
            found["an unknown version"] += bool(each.items)
    others = [f"{count} run {version}" for version, count in found.items() if count and _minor(version) != _minor()]
    if others:
        words = f"workers run another version than this command, {__version__}: {', '.join(others)}"
        yield warning("versions", words, "let all processes of one deployment run the same minor version")


def unhealthy(answers: Iterable[Answer]) -> Iterator[Finding]:
    """Check that no health check and no canary of a worker has failed."""
    for each in answers:
        if (report := answer_of(each)) is not None and report.problems:
            words = f"instance {each.instance_id} is not healthy: {'; '.join(report.problems)}"
            yield warning("instances", words, "clients still call it: drain it with SIGTERM if they should not")


def _minor(version: str = __version__) -> str:
    return version.rpartition(".")[0]


async def clock(config: Config) -> list[Finding]:
    """Compare this machine's clock with that of etcd's machine."""
    if config.discovery != "etcd":
        return []
    url = config.etcd_endpoints.split(",")[0].strip().rstrip("/")
    if not url.startswith("http://"):
        return []  # The handshake of TLS compares the clocks.
    before = time.time()
    date = await asyncio.get_running_loop().run_in_executor(None, _date, f"{url}/version", config.connect_timeout_s)
    if date is None:
        return []
    skew_s = date - (before + time.time()) / 2
    if abs(skew_s) > SKEW_S:
        words = f"this machine's clock and etcd's differ by {abs(skew_s):.0f} s"
        return [warning("clock", words, "let both follow a time server: chronyd or systemd-timesyncd")]
    return [ok("clock", "this machine's clock agrees with etcd's")]


def _date(url: str, timeout_s: float) -> float | None:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            text = answer.headers.get("Date")
    except (OSError, ValueError):
        return None
    return None if text is None else email.utils.parsedate_to_datetime(text).timestamp()


async def nats(config: Config) -> list[Finding]:
    """Check that NATS answers, and whether it has JetStream."""
    if not config.nats_urls:
        return []
    try:
        connection = make_nats(config)
    except ConfigError as failed:
        return [error("nats", str(failed), "docs/settings.md describes the setting")]
    try:
        client = await connection.client()
        version = client.connected_server_version
        found = [ok("nats", f"{connection.where}: version {version}, messages up to {client.max_payload:,} bytes")]
        try:
            await client.jetstream(timeout=JETSTREAM_S).account_info()
        except Exception as failed:  # The library raises many kinds, and each of them means that it cannot be used.
            words = f"JetStream cannot be used: {str(failed) or type(failed).__name__}"
            found.append(warning("nats", words, "work queues need it: start nats-server with -js"))
        return found
    except BrokerError as failed:
        return [error("nats", str(failed), _nats_advice(str(failed)))]
    except ConfigError as failed:
        return [error("nats", str(failed), "name PEM files that belong together")]
    finally:
        await connection.close()


def _nats_advice(words: str) -> str:
    if "not installed" in words:
        return "pip install 'triton-distributed[nats]'"
    if "uthorization" in words or "uthentication" in words:
        return "set the credentials: NATS_AUTH_TOKEN, NATS_AUTH_USERNAME and _PASSWORD, or another NATS_AUTH_*"
    return "is nats-server running at NATS_SERVER, and is its port open?"
