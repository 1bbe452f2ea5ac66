"""The only place that names concrete backends: what a runtime is composed of, by its settings."""

from __future__ import annotations

import asyncio
from pathlib import Path

from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.discovery.file import FileDiscovery
from triton_distributed.discovery.folder import private_folder
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.discovery.static import StaticDiscovery
from triton_distributed.errors import ConfigError
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.external.tls import TlsFiles
from triton_distributed.names import EndpointName, request_subject
from triton_distributed.transport.address import Address
from triton_distributed.transport.nats import NatsNetwork
from triton_distributed.transport.network import Networks
from triton_distributed.transport.unix import SUPPORTED as UNIX_SOCKETS


def make_discovery(config: Config) -> Discovery:
    """Where instances are registered; no I/O yet."""
    if config.discovery == "memory":
        return MemoryDiscovery()
    if config.discovery == "static":
        return StaticDiscovery(config.static)
    return FileDiscovery(Path(config.directory))


def make_nats(config: Config) -> NatsConnection:
    """The connection to NATS that everything in a runtime shares; made when first used."""
    files = TlsFiles(
        ("TRD_NATS_CERT", "TRD_NATS_KEY", "TRD_NATS_CA"), config.nats_cert, config.nats_key, config.nats_ca
    )
    return NatsConnection(
        NatsOptions(
            servers=config.nats_server,
            username=config.nats_username,
            password=config.nats_password,
            token=config.nats_token,
            nkey=config.nats_nkey,
            credentials_file=config.nats_credentials_file,
            tls=(lambda: files.context(server=False, check_hostname=True)) if files else None,
            timeout_s=config.connect_timeout_s,
        )
    )


def make_networks(loop: asyncio.AbstractEventLoop, config: Config, nats: NatsConnection) -> Networks:
    """What serves schemes that are not sockets or memory: a client dials whatever a worker publishes."""
    # Sooner than the pool gives the session up, whose words would not name the NATS server.
    return {"nats": NatsNetwork(loop, nats, 0.8 * config.connect_timeout_s)}


def listen_address(config: Config, name: EndpointName, instance_id: int, where: str) -> Address:
    """Where a worker listens.

    Args:
        name: the endpoint that it serves first.
        where: the place of discovery, for error texts.

    Raises:
        ConfigError: the settings name no address that can be one.
        DiscoveryError: the private folder is not private.
    """
    if config.listen:
        address = Address.parse(config.listen, "TRD_LISTEN")
        if (address.scheme == "nats") != (config.request_plane == "nats"):
            plane = f"TRD_REQUEST_PLANE is {config.request_plane}"
            raise ConfigError("TRD_LISTEN", config.listen, f"{plane}, which does not listen on such an address")
        return address
    if config.discovery == "static":
        raise ConfigError("TRD_LISTEN", "", "static discovery needs the address that TRD_STATIC names for this worker")
    if config.request_plane == "nats":
        return Address("nats", request_subject(name, instance_id))
    if config.discovery == "memory":
        return Address("memory", f"{instance_id:x}")
    if not UNIX_SOCKETS:
        return Address("tcp", "127.0.0.1", 0)
    private_folder(str(config.directory), where)
    folder = Path(config.directory).absolute() / "sockets"
    folder.mkdir(mode=0o700, exist_ok=True)
    return Address("unix", str(folder / f"{instance_id:016x}.sock"))
