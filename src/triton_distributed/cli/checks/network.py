"""Checks of addresses: where a worker would listen, what it would publish, and who could reach it."""

from __future__ import annotations

import asyncio
import errno
import http.client
import ipaddress
import json
import socket
from collections.abc import Sequence

from triton_distributed.cli.checks.finding import Finding, error, ok, warning
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.names import Instance
from triton_distributed.serving.addresses import WILDCARDS, published
from triton_distributed.system.identity import host_name
from triton_distributed.transport.address import Address, parse_list

SHORT_TOKEN = 16
"""Characters below which a token can be guessed."""

ASK_S, MOST_BYTES = 1.0, 100_000
"""Seconds to wait for each part of the answer of what has taken the status port, and the most bytes of it to read."""


async def addresses(config: Config, listed: Sequence[Instance] = ()) -> list[Finding]:
    """Check `TRD_LISTEN` and `TRD_ADVERTISE`.

    Args:
        listed: what discovery lists. A worker that runs here with these settings has taken the address already.
    """
    try:
        listened = [each for each in _listed(config) if each.scheme == "tcp"]
    except ConfigError as failed:
        return [error("addresses", str(failed), "for example TRD_LISTEN=tcp://0.0.0.0:7000")]
    bound = [_bind(address) for address in listened]
    found = [await _unless_own(config, finding, address, listed) for finding, address in bound]
    wide = config.backend.reach == "network"
    try:
        texts = (
            await published(asyncio.get_running_loop(), config, [each for _, each in bound])
            if listened or config.advertise
            else ()
        )
    except ConfigError as failed:
        return [*found, error("addresses", str(failed), "for example TRD_ADVERTISE=10.0.0.5, the host's address")]
    for text in texts:
        address = Address.parse(text)
        if address.scheme != "tcp":
            continue
        found += await _reachable(address, wide)
    found += _guarded(config, wide)
    return found or [ok("addresses", "a private Unix socket: only this user on this machine can call")]


async def _unless_own(config: Config, finding: Finding, address: Address, listed: Sequence[Instance]) -> Finding:
    """A finding about an address, or a better one if a worker on this machine publishes what these settings publish."""
    if finding.level == "ok":
        return finding
    try:
        texts = await published(asyncio.get_running_loop(), config, [address])
    except ConfigError:  # `addresses` reports it.
        return finding
    for each in listed:
        if each.host == host_name() and not set(texts).isdisjoint(each.addresses):
            process = f", process {each.pid}" if each.pid else ""
            return ok("addresses", f"{address} is taken by the worker that runs here: instance {each.id}{process}")
    return finding


async def status_port(config: Config) -> list[Finding]:
    """Check `TRD_STATUS_PORT`: whether it is free, and that not everyone reaches it."""
    if config.status_port < 0:
        return []
    address = Address("tcp", config.status_host, config.status_port)
    listened = {each.port for each in _parsed(config) if each.scheme == "tcp"}
    if config.status_port and config.status_port in listened:
        words = f"TRD_STATUS_PORT and TRD_LISTEN name the same port, {config.status_port}"
        return [warning("status port", f"{words}: the process would serve without its status pages", "change one")]
    found, _ = _bind(address)
    if found.level == "error" and await asyncio.get_running_loop().run_in_executor(None, _is_status_port, address):
        found = ok("status port", f"{address} is taken by the status port of a worker that runs here")
    if found.level == "error":
        words = f"{found.text}: the process would serve without its status pages"
        return [warning("status port", words, found.advice)]
    if not _is_loopback(config.status_host):
        words = f"everyone who reaches {address} sees the process's state: it asks for no password"
        return [warning("status port", words, "let a firewall or a network policy admit only Prometheus and probes")]
    return [ok("status port", found.text)]


def _is_status_port(address: Address) -> bool:
    """Whether a status port of this package listens at an address: of a worker, or of the supervisor of replicas."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    connection = http.client.HTTPConnection(host, address.port, timeout=ASK_S)
    try:
        connection.request("GET", "/", headers={"Accept": "application/json"})
        with connection.getresponse() as response:
            pages = json.loads(response.read(MOST_BYTES))["pages"]
        return {"/live", "/ready", "/statistics"} <= set(pages)
    except (OSError, http.client.HTTPException, ValueError, TypeError, LookupError):
        return False
    finally:
        connection.close()


def _parsed(config: Config) -> tuple[Address, ...]:
    try:
        return _listed(config)
    except ConfigError:  # `addresses` reports it.
        return ()


def _listed(config: Config) -> tuple[Address, ...]:
    return parse_list(config.listen, "TRD_LISTEN") if config.listen else ()


def _bind(address: Address) -> tuple[Finding, Address]:
    """Try to listen. Returns the address with the port that the system chose for port 0."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            return ok("addresses", f"{address} is free"), Address("tcp", address.host, sock.getsockname()[1])
    except OSError as failed:
        advice = "name an address of this machine: `ip addr` lists them; 0.0.0.0 is all of them"
        if failed.errno == errno.EADDRINUSE:
            advice = f"`ss -ltnp 'sport = :{address.port}'` names the program; port 0 takes any free one"
        elif failed.errno == errno.EACCES:
            advice = "ports below 1024 need root: take a larger one"
        return error("addresses", f"cannot listen on {address}: {failed.strerror or failed}", advice), address


async def _reachable(address: Address, wide: bool) -> list[Finding]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as failed:
        advice = "name an address, or a host that every member can resolve"
        return [error("addresses", f"workers would publish {address}, which does not resolve: {failed}", advice)]
    if wide and all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        advice = "set TRD_ADVERTISE to this host's address, and let TRD_LISTEN include it"
        return [warning("addresses", f"workers would publish {address}: no other machine can reach it", advice)]
    return [ok("addresses", f"workers would publish {address}")]


def _guarded(config: Config, wide: bool) -> list[Finding]:
    """Check that not everyone who reaches a port may call."""
    open_to = [
        each
        for each in _listed(config)
        if each.scheme == "tcp" and (each.host in WILDCARDS or not _is_loopback(each.host))
    ]
    exposed = bool(open_to) or (wide and not config.listen and config.request_plane == "direct")
    if config.token and len(config.token) < SHORT_TOKEN:
        return [warning("security", "TRD_TOKEN is short enough to be guessed", "openssl rand -hex 32 makes a token")]
    if exposed and not config.token and not config.tls_cert:
        words = "neither TLS nor a token is set: every machine that reaches the port may call, and serve"
        return [warning("security", words, "set TRD_TLS_CERT, _KEY and _CA, or TRD_TOKEN, see docs/security.md")]
    return []


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
