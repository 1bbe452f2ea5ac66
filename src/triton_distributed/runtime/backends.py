"""The only place that names concrete backends: what a runtime is composed of, by its settings."""

from __future__ import annotations

from pathlib import Path

from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.discovery.file import FileDiscovery
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.discovery.static import StaticDiscovery
from triton_distributed.errors import ConfigError
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.external.tls import TlsFiles
from triton_distributed.transport.tls import SessionTls


def make_discovery(config: Config) -> Discovery:
    """Where instances are registered; no I/O yet."""
    if config.discovery == "memory":
        return MemoryDiscovery()
    if config.discovery == "static":
        return StaticDiscovery(config.static)
    return FileDiscovery(Path(config.directory))


def make_tls(config: Config) -> SessionTls | None:
    """The TLS of TCP sessions, or None where the settings name no certificate.

    Raises:
        ConfigError: a setting is missing, or its file is not what it should be.
    """
    names = {"TRD_TLS_CERT": config.tls_cert, "TRD_TLS_KEY": config.tls_key, "TRD_TLS_CA": config.tls_ca}
    if not any(names.values()) and not config.tls_server_name:
        return None
    for name in ("TRD_TLS_CERT", "TRD_TLS_CA"):
        if not names[name]:
            raise ConfigError(name, "", "both ends show a certificate: TLS needs TRD_TLS_CERT, _KEY and _CA")
    files = TlsFiles(("TRD_TLS_CERT", "TRD_TLS_KEY", "TRD_TLS_CA"), *names.values())
    return SessionTls(files, config.tls_server_name)


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
