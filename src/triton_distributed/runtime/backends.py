"""The backends of a runtime, chosen by its settings. No other file names concrete backends.

Backends for a cluster are imported only when they are chosen: a program on one machine starts without them.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from pathlib import Path
from typing import Any

from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.discovery.file.elsewhere import Elsewhere
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.discovery.static import StaticDiscovery
from triton_distributed.errors import ConfigError
from triton_distributed.events import EventPlane
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.external.tls import TlsFiles
from triton_distributed.runtime.own_calls import OwnCalls
from triton_distributed.status.port import Opened, StatusPort
from triton_distributed.system import unix_sockets
from triton_distributed.system.fork import no_fork, own
from triton_distributed.transport.network import LazyNetwork, Networks
from triton_distributed.transport.tls import SessionTls


def _load(module: str) -> Any:
    with no_fork:
        return importlib.import_module(f"triton_distributed.{module}")


def make_discovery(config: Config) -> Discovery:
    """Make the discovery that the settings name, without I/O.

    Raises:
        ConfigError: a setting is invalid. `TRD_STATIC` is checked even if discovery is not static.
    """
    static = StaticDiscovery(config.static)
    if config.discovery == "memory":
        return MemoryDiscovery()
    if config.discovery == "static":
        return static
    if config.discovery == "etcd":
        files = TlsFiles(
            ("TRD_ETCD_CERT", "TRD_ETCD_KEY", "TRD_ETCD_CA"), config.etcd_cert, config.etcd_key, config.etcd_ca
        )
        etcd: Discovery = _load("discovery.etcd.backend").EtcdDiscovery(
            _load("external.etcd_endpoint").EtcdOptions(
                endpoints=config.etcd_endpoints,
                username=config.etcd_username,
                password=config.etcd_password,
                tls=lambda: files.context(server=False, check_hostname=True),
            ),
            prefix=config.etcd_prefix,
            lease_ttl_s=config.etcd_lease_ttl_s,
            timeout_s=config.connect_timeout_s,
        )
        return etcd
    if config.discovery == "file":
        return FileDiscovery(Path(config.directory))
    raise ConfigError("TRD_DISCOVERY", config.discovery, "no backend of this name is constructed here")


def make_elsewhere(config: Config) -> Elsewhere | None:
    """Make the search for instances that file discovery cannot see because they use another folder."""
    return Elsewhere(os.path.abspath(config.directory)) if config.discovery == "file" else None


def make_tls(config: Config) -> SessionTls | None:
    """Make the TLS of TCP sessions; None if the settings name no certificate.

    Raises:
        ConfigError: a setting is missing, or its file is invalid.
    """
    names = {"TRD_TLS_CERT": config.tls_cert, "TRD_TLS_KEY": config.tls_key, "TRD_TLS_CA": config.tls_ca}
    if not any(names.values()) and not config.tls_server_name:
        return None
    for name in ("TRD_TLS_CERT", "TRD_TLS_CA"):
        if not names[name]:
            raise ConfigError(name, "", "TLS needs TRD_TLS_CERT, _KEY and _CA, since both ends present a certificate")
    files = TlsFiles(("TRD_TLS_CERT", "TRD_TLS_KEY", "TRD_TLS_CA"), *names.values())
    return SessionTls(files, config.tls_server_name)


def certificate_files(config: Config) -> dict[str, str]:
    """The files of certificates that a runtime with these settings uses, by setting."""
    files = {"TRD_TLS_CERT": config.tls_cert, "TRD_TLS_CA": config.tls_ca}
    if config.discovery == "etcd":
        files |= {"TRD_ETCD_CERT": config.etcd_cert, "TRD_ETCD_CA": config.etcd_ca}
    if config.nats_urls:
        files |= {"TRD_NATS_CERT": config.nats_cert, "TRD_NATS_CA": config.nats_ca}
    return {setting: path for setting, path in files.items() if path}


def make_nats(config: Config) -> NatsConnection:
    """Make the NATS connection that all parts of a runtime share. It connects when it is first used."""
    files = TlsFiles(
        ("TRD_NATS_CERT", "TRD_NATS_KEY", "TRD_NATS_CA"), config.nats_cert, config.nats_key, config.nats_ca
    )
    connection = NatsConnection(
        NatsOptions(
            servers=config.nats_urls,
            username=config.nats_username,
            password=config.nats_password,
            token=config.nats_token,
            nkey=config.nats_nkey,
            credentials_file=config.nats_credentials_file,
            tls=(lambda: files.context(server=False, check_hostname=True)) if files else None,
            timeout_s=config.connect_timeout_s,
        )
    )
    own(connection)
    return connection


def open_status_port(runtime: Any, port: StatusPort, thread: int) -> None:
    """Open the status port of a runtime if the settings name one. If that fails, the log says why.

    Args:
        runtime: the runtime.
        port: what the program adds to the port.
        thread: the id of the thread of the runtime's loop.
    """
    config: Config = runtime.config
    if config.status_port < 0:
        return

    def make() -> Opened:
        service: Opened = _load("status.service").StatusService(
            runtime, port, thread, lambda served: OwnCalls(runtime, served)
        )
        return service

    port.open(make, f"{config.status_host}, port {config.status_port}")


def make_networks(loop: asyncio.AbstractEventLoop, config: Config, nats: NatsConnection) -> Networks:
    """Make the networks of all schemes but sockets and memory: a client dials any address that a worker publishes."""
    # It ends before the pool's timeout, because the pool's error would not name the NATS server.
    timeout_s = 0.8 * config.connect_timeout_s
    return {"nats": LazyNetwork(lambda: _load("transport.nats.network").NatsNetwork(loop, nats, timeout_s))}


def make_events(config: Config, nats: NatsConnection, instance_id: int) -> EventPlane:
    """Make the event plane that the settings name, without I/O.

    Raises:
        ConfigError: the settings name no event plane that can be used.
    """
    plane: EventPlane
    if config.event_plane == "nats":
        plane = _load("events.nats").NatsEvents(nats)
    elif not config.event_plane:
        raise ConfigError(
            "NATS_SERVER",
            config.nats_server,
            f"with {config.discovery} discovery, events may have to reach other hosts, which needs NATS_SERVER; "
            "TRD_EVENTS=local keeps them on this machine",
        )
    elif config.discovery == "memory":
        plane = _load("events.memory").MemoryEvents()
    elif not unix_sockets.SUPPORTED:
        raise ConfigError("TRD_EVENTS", config.events, "this system has no Unix sockets: set NATS_SERVER")
    else:
        plane = _load("events.local").LocalEvents(
            Path(config.directory), id=instance_id, max_message_bytes=config.max_message_bytes
        )
    return plane
