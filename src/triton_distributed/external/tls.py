"""TLS contexts from files that may change while a process runs."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from triton_distributed.errors import ConfigError


class TlsFiles:
    """The files of a certificate, its key and the authority for peers' certificates.

    A new context is made when one of the files has changed, so that a renewed certificate is used from the next
    handshake on. While a renewal is half written, the former context stays in use.

    Args:
        settings: the names of the three settings, for error texts: certificate, key, authority.
        cert: PEM file of this end's certificate chain; empty for none.
        key: PEM file of the private key; empty if `cert` contains it.
        ca: PEM file of the authorities that sign the peers' certificates; empty for those that the system trusts.
    """

    def __init__(self, settings: tuple[str, str, str], cert: str, key: str, ca: str) -> None:
        self._settings = settings
        self.cert, self.key, self.ca = cert, key, ca
        self._made: dict[tuple[bool, bool], tuple[tuple[tuple[int, int], ...], ssl.SSLContext]] = {}

    def __bool__(self) -> bool:
        return bool(self.cert or self.ca)

    def context(self, *, server: bool, check_hostname: bool = False) -> ssl.SSLContext:
        """Return the context for the next handshake. A server requires certificates from its clients.

        Raises:
            ConfigError: a file cannot be read, or is invalid; the error names the setting.
        """
        kind = (server, check_hostname)
        known = self._made.get(kind)
        try:
            stamp = self._stamp()
            if known is not None and known[0] == stamp:
                return known[1]
            context = self._make(server, check_hostname)
        except ConfigError:
            if known is not None:
                return known[1]  # a file is being replaced right now, or its replacement is unusable
            raise
        self._made[kind] = (stamp, context)
        return context

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        found = []
        for setting, path in zip(self._settings, (self.cert, self.key, self.ca), strict=True):
            if path:
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise ConfigError(setting, path, error.strerror or type(error).__name__) from None
                found.append((status.st_mtime_ns, status.st_ino))
        return tuple(found)

    def _make(self, server: bool, check_hostname: bool) -> ssl.SSLContext:
        cert_setting, key_setting, ca_setting = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = check_hostname and not server
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_RENEGOTIATION  # a peer could request one after another
        if server:
            context.num_tickets = 0  # a resumed TLS session would outlive the certificate it began with
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
            else:
                context.load_default_certs(ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(ca_setting, self.ca, f"not a PEM file of certificates: {error}") from error
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key or None)
            except (OSError, ssl.SSLError) as error:
                where = key_setting if self.key and not Path(self.key).is_file() else cert_setting
                raise ConfigError(where, self.cert, f"not a PEM certificate with its key: {error}") from error
        return context
