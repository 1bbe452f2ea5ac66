"""Addresses: `unix:///path`, `tcp://host:port`, `memory://name`, `nats://subject`."""

from __future__ import annotations

import re

import msgspec

from triton_distributed.errors import ConfigError

SCHEMES = ("unix", "tcp", "memory", "nats")
# A NATS subject is a list of tokens without blanks and wildcards, joined by dots. Its length keeps the server's control
# lines, which hold two subjects, below their 4096 bytes.
_SUBJECT = r"(?=.{1,1000}\Z)[!-)+-\-/-=?-~]+(\.[!-)+-\-/-=?-~]+)*\Z"


class Address(msgspec.Struct, frozen=True):
    """The address of a worker.

    Attributes:
        scheme: `unix`, `tcp`, `memory` or `nats`.
        host: the host, the socket's path, the name, or the subject.
        port: 0 to 65535 for `tcp`; 0 to listen on any free port.
    """

    scheme: str
    host: str
    port: int = 0

    @classmethod
    def parse(cls, text: str, setting: str = "address") -> Address:
        """Read an address.

        Args:
            setting: name of the setting it comes from, for the error's text.

        Raises:
            ConfigError: the text is not an address.
        """
        scheme, mark, rest = text.partition("://")
        if not mark or scheme not in SCHEMES or not rest:
            raise ConfigError(
                setting, text, "an address is unix:///path, tcp://host:port, memory://name or nats://subject"
            )
        if scheme != "tcp":
            if scheme == "unix" and not rest.startswith("/"):
                raise ConfigError(setting, text, "the path of a Unix socket is absolute: unix:///path")
            if scheme == "nats" and not re.match(_SUBJECT, rest):
                raise ConfigError(setting, text, "a NATS address is nats://subject, without wildcards and blanks")
            return cls(scheme, rest)
        host, mark, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not mark or not host or set(host) & set("/ @") or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(setting, text, "a TCP address is tcp://host:port, an IPv6 host in brackets")
        return cls("tcp", host, int(port))

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.host}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def entries_of(text: str, setting: str) -> list[str]:
    """Split a setting that lists addresses at its commas; spaces around them and empty entries are ignored.

    Raises:
        ConfigError: an entry contains a user, and perhaps a password. Addresses are published.
    """
    entries = [each for each in map(str.strip, text.split(",")) if each]
    if any("@" in each and not each.startswith("unix://") for each in entries):
        raise ConfigError(setting, text, "addresses are published, and must not contain a user or password")
    return entries


def parse_list(text: str, setting: str) -> tuple[Address, ...]:
    """Read addresses that are separated by commas.

    Raises:
        ConfigError: an entry is not an address, or there is no entry. The text names the entry.
    """
    found = tuple(Address.parse(each, setting) for each in entries_of(text, setting))
    if not found:
        raise ConfigError(setting, text, "it lists no address")
    return found
