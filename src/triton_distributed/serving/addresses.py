"""Where a worker listens, and which addresses it tells the others."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from triton_distributed.config import Config
from triton_distributed.errors import ConfigError, DiscoveryError
from triton_distributed.names import EndpointName, request_subject
from triton_distributed.system.private_folder import keep_private, private_folder
from triton_distributed.system.unix_sockets import SUPPORTED as UNIX_SOCKETS
from triton_distributed.transport.address import Address, entries_of, parse_list
from triton_distributed.transport.listener import Listener
from triton_distributed.transport.pool import MOST_ADDRESSES
from triton_distributed.transport.tcp import dual_stack, wildcard

logger = logging.getLogger("triton_distributed.runtime")

WILDCARDS = ("0.0.0.0", "::")
# Unused addresses, reserved for documentation (RFC 5737, RFC 3849). The kernel routes them by the default route.
# Connecting a UDP socket sends nothing.
ANYWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
ETCD_PORT = 2379

SOCKETS = "sockets"
"""The folder of Unix sockets, in the private folder."""


async def begin_to_listen(
    loop: asyncio.AbstractEventLoop,
    listener: Listener,
    config: Config,
    name: EndpointName,
    instance_id: int,
    where: str,
) -> tuple[str, ...]:
    """Listen on all addresses that the settings name, or on none.

    Args:
        name: the endpoint that is served first.
        where: the place of discovery, for error texts.

    Returns:
        the addresses to publish, best first.

    Raises:
        ConfigError: the settings name no valid address.
        DiscoveryError: the private folder is not private.
        OSError: an address cannot be bound; its text names the address.
    """
    try:
        found = listen_addresses(config, name, instance_id, where)
        listened = [await listener.listen(each, _make_folder(config, each, where)) for each in found]
        return await published(loop, config, listened)
    except BaseException:
        listener.close_listening()
        raise


def listen_addresses(config: Config, name: EndpointName, instance_id: int, where: str) -> tuple[Address, ...]:
    """Where a worker listens, best first.

    Raises:
        ConfigError: the settings name no valid address.
        DiscoveryError: the private folder is not private.
    """
    if config.listen:
        addresses = parse_list(config.listen, "TRD_LISTEN")
        if any((each.scheme == "nats") != (config.request_plane == "nats") for each in addresses):
            plane = f"TRD_REQUEST_PLANE is {config.request_plane}"
            raise ConfigError("TRD_LISTEN", config.listen, f"{plane}, which does not listen on such an address")
        return addresses
    if config.backend.fixed:
        raise ConfigError("TRD_LISTEN", "", "static discovery needs the address that TRD_STATIC names for this worker")
    if config.request_plane == "nats":
        return (Address("nats", request_subject(name, instance_id)),)
    if config.backend.reach == "process":
        return (Address("memory", f"{instance_id:x}"),)
    if config.backend.reach == "network":
        everywhere = Address("tcp", wildcard(), 0)
        if not UNIX_SOCKETS:
            return (everywhere,)
        try:
            return _private_socket(config, instance_id, where), everywhere
        except (DiscoveryError, OSError) as error:  # For example, a read-only file system: TCP works without it.
            logger.warning("listening on TCP only: %s", error)
            return (everywhere,)
    if not UNIX_SOCKETS:
        return (Address("tcp", "127.0.0.1", 0),)
    return (_private_socket(config, instance_id, where),)


def _private_socket(config: Config, instance_id: int, where: str) -> Address:
    folder = Path(config.directory).absolute() / SOCKETS
    _make_private(folder, where)
    return Address("unix", str(folder / f"{instance_id:016x}.sock"))


def _make_private(folder: Path, where: str) -> None:
    private_folder(str(folder.parent), where)
    keep_private(str(folder))
    private_folder(str(folder), where)


def _make_folder(config: Config, address: Address, where: str) -> Callable[[], None] | None:
    """Return a function that creates the socket's folder again; None for sockets outside the private folder."""
    folder = Path(config.directory).absolute() / SOCKETS
    if address.scheme != "unix" or Path(address.host).parent != folder:
        return None
    return functools.partial(_make_private, folder, where)


async def published(loop: asyncio.AbstractEventLoop, config: Config, listened: Sequence[Address]) -> tuple[str, ...]:
    """Return the addresses to publish for those that are listened on, best first: Unix sockets, then TCP.

    Addresses in `TRD_ADVERTISE` replace those of their kind. A wildcard such as 0.0.0.0 cannot be dialled. It is
    replaced by the address from which this host reaches etcd, or else by the first one that is not loopback.

    Raises:
        ConfigError: `TRD_ADVERTISE` cannot be read, or there are more than `MOST_ADDRESSES`.
    """
    ports = [each.port for each in listened if each.scheme == "tcp"]
    found = _advertised(config.advertise, ports[0] if ports else 0)
    kinds = {each.scheme for each in found}
    for each in listened:
        if each.scheme in kinds:
            continue
        if each.scheme == "tcp" and each.host in WILDCARDS:
            each = Address("tcp", await own_address(loop, config, _families(each.host)), each.port)
        found.append(each)
    found.sort(key=lambda each: each.scheme == "tcp")
    texts = tuple(dict.fromkeys(map(str, found)))
    if len(texts) > MOST_ADDRESSES:
        setting = "TRD_ADVERTISE" if config.advertise else "TRD_LISTEN"
        raise ConfigError(setting, config.advertise or config.listen, f"at most {MOST_ADDRESSES} addresses")
    return texts


async def published_url(loop: asyncio.AbstractEventLoop, config: Config, url: str) -> str:
    """The URL to publish for one that is listened on: a wildcard is replaced by this host's most likely address."""
    host = urlsplit(url).hostname or ""
    if host not in WILDCARDS:
        return url
    own = await own_address(loop, config, _families(host))
    return f"http://{f'[{own}]' if ':' in own else own}:{urlsplit(url).port}"


def _advertised(text: str, listened_port: int) -> list[Address]:
    found = []
    for entry in entries_of(text, "TRD_ADVERTISE"):
        if "://" in entry and not entry.startswith("tcp://"):
            found.append(Address.parse(entry, "TRD_ADVERTISE"))
            continue
        rest = entry.removeprefix("tcp://")
        if _is_host(rest):
            if not listened_port:
                raise ConfigError("TRD_ADVERTISE", entry, "name a port too: the worker listens on no TCP address")
            rest = f"[{rest}]:{listened_port}" if rest.count(":") > 1 and rest[0] != "[" else f"{rest}:{listened_port}"
        address = Address.parse(f"tcp://{rest}", "TRD_ADVERTISE")
        if address.host in WILDCARDS or not address.port:
            raise ConfigError("TRD_ADVERTISE", entry, "it cannot be dialled: name a host, and a port other than 0")
        found.append(address)
    return found


def _is_host(text: str) -> bool:
    """Whether the text is a host without a port."""
    return ":" not in text or text.endswith("]") or _ip(text) is not None


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _families(wildcard_host: str) -> tuple[socket.AddressFamily, ...]:
    """The address families from which a wildcard takes connections."""
    if wildcard_host == "0.0.0.0":
        return (socket.AF_INET,)
    return (socket.AF_INET, socket.AF_INET6) if dual_stack() else (socket.AF_INET6,)


async def own_address(
    loop: asyncio.AbstractEventLoop, config: Config, families: tuple[socket.AddressFamily, ...]
) -> str:
    """Return this host's most likely address for other hosts, in one of `families`.

    If etcd runs on this host, the route to it is no evidence, and the host's first address is used.
    """
    ways: list[tuple[str, int]] = [(ANYWHERE[family], ETCD_PORT) for family in families] + [(socket.gethostname(), 0)]
    if config.discovery == "etcd":
        parts = urlsplit(config.etcd_endpoints.split(",")[0].strip())
        if parts.hostname:
            ways.insert(0, (parts.hostname, ETCD_PORT))  # With UDP the port does not matter.
    for host, port in ways:
        for family, target in await _resolved(loop, host, port, config.connect_timeout_s):
            found = _source(family, target) if family in families else ""
            address = _ip(found)
            if address is None or address.is_loopback or address.is_unspecified:
                continue
            if address.version == 4 or not address.is_link_local:  # A link-local IPv6 address needs a zone.
                return found
    return "127.0.0.1" if socket.AF_INET in families else "::1"


async def _resolved(
    loop: asyncio.AbstractEventLoop, host: str, port: int, timeout_s: float
) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    """The addresses of a host; empty if it has none or the resolver does not answer in time."""
    try:
        if _ip(host) is not None:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        else:
            async with asyncio.timeout(timeout_s):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # TimeoutError is an OSError.
        return []
    return [(socket.AddressFamily(each[0]), each[4]) for each in found]


def _source(family: socket.AddressFamily, target: tuple[object, ...]) -> str:
    """The local address from which this host would send to `target`. Nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)
            return str(sock.getsockname()[0])
    except OSError:
        return ""
