"""Which settings several processes can share."""

from __future__ import annotations

import contextlib

from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.supervisor.replicas import NUMBER, Replicas
from triton_distributed.transport.address import Address, entries_of

LISTEN = "TRD_LISTEN"
STATUS_PORT = "TRD_STATUS_PORT"


def check_shareable(replicas: Replicas, config: Config) -> None:
    """Check that several processes can use the settings.

    Raises:
        ConfigError: they would listen on one address, or their memory has to be shared.
    """
    count = replicas.count
    if config.backend.reach == "process":
        raise ConfigError("TRD_DISCOVERY", config.discovery, "processes do not share memory: use file or etcd")
    if count == 1:
        return
    if config.backend.fixed:
        raise ConfigError(
            "TRD_DISCOVERY",
            config.discovery,
            f"{count} processes cannot share the addresses of one worker: use file or etcd, or start each process with "
            "a TRD_LISTEN of its own",
        )
    for variable, text in ((LISTEN, _listen(replicas, config)), ("TRD_ADVERTISE", config.advertise)):
        for entry in _fixed(variable, text):
            if NUMBER in entry:
                continue
            instead = "remove it"
            if entry.startswith("tcp://"):
                instead = f"use port 0: tcp://{Address.parse(entry, variable).host}:0"
            raise ConfigError(variable, entry, f"{count} processes cannot share an address: {instead}")
    port = replicas.env.get(STATUS_PORT, "").strip()  # The port of the settings is the supervisor's.
    if port.isdecimal() and int(port):
        raise ConfigError(STATUS_PORT, port, f"{count} processes cannot share a port: use 0, or one with {NUMBER}")


def has_fixed_address(replicas: Replicas, config: Config) -> bool:
    """Whether a replica listens on an address that its successor needs too."""
    return config.backend.fixed or bool(_fixed(LISTEN, _listen(replicas, config)))


def _listen(replicas: Replicas, config: Config) -> str:
    return replicas.env.get(LISTEN, config.listen)


def _fixed(variable: str, text: str) -> list[str]:
    """The addresses in a setting that only one process at a time can have."""
    found = []
    for entry in entries_of(text, variable):
        with contextlib.suppress(ConfigError):  # A host alone can be advertised. The worker checks the rest.
            address = Address.parse(entry.replace(NUMBER, "1"), variable)
            if address.scheme != "tcp" or address.port:
                found.append(entry)
    return found
