"""Checks of TLS files: readable, matching, trusted by their own authority, and not near their end."""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator

from triton_distributed.cli.checks.finding import Finding, error, ok, warning
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.external.tls import TlsFiles
from triton_distributed.runtime.backends import make_tls

SOON_DAYS = 14.0
"""Days before the end of a certificate from which on it is reported."""

DAY_S = 86400.0


def sessions(config: Config) -> Iterator[Finding]:
    """Check the certificate of sessions by a handshake with itself, in memory: each member presents one like it."""
    try:
        if make_tls(config) is None:
            return
        files = TlsFiles(("TRD_TLS_CERT", "TRD_TLS_KEY", "TRD_TLS_CA"), config.tls_cert, config.tls_key, config.tls_ca)
        name = config.tls_server_name
        server, client = files.context(server=True), files.context(server=False, check_hostname=bool(name))
    except ConfigError as failed:
        yield error("tls", str(failed), "name PEM files that belong together: certificate, its key, the authority")
        return
    yield from _key_file(config.tls_key or config.tls_cert)
    try:
        known = handshake(server, client, name or None)
    except ssl.SSLError as failed:
        yield error("tls", f"members with this certificate refuse each other: {_words(failed)}", _advice(failed, name))
        return
    left_days = (ssl.cert_time_to_seconds(str(known["notAfter"])) - time.time()) / DAY_S
    if left_days < SOON_DAYS:
        yield warning(
            "tls",
            f"the certificate {config.tls_cert} ends in {left_days:.1f} days",
            "renew it: running members take the new files for their next connections",
        )
    else:
        yield ok("tls", f"the certificate is accepted by its own authority, and valid for {left_days:.0f} days")


def _key_file(path: str) -> Iterator[Finding]:
    if os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield warning("tls", f"other users can read the key {path}", f"chmod 600 {path}")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> dict[str, object]:
    """Let two contexts shake hands in memory.

    Args:
        name: the name that the server's certificate must carry; None for any.

    Returns:
        the server's certificate, as `SSLSocket.getpeercert` describes it.

    Raises:
        ssl.SSLError: one end refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    while waiting:
        for each in list(waiting):
            try:
                each.do_handshake()
                waiting.remove(each)
            except ssl.SSLWantReadError:
                continue
    return dict(ends[0].getpeercert() or {})


def _words(failed: ssl.SSLError) -> str:
    return getattr(failed, "verify_message", "") or failed.reason or str(failed)


def _advice(failed: ssl.SSLError, name: str) -> str:
    words = _words(failed)
    if "expired" in words or "not yet valid" in words:
        return "renew the certificate, or set this machine's clock"
    if "Hostname mismatch" in words or "not valid for" in words:
        return f"make the certificate for the name {name!r}, or change TRD_TLS_SERVER_NAME"
    if "unsupported certificate purpose" in words or "unsuitable certificate purpose" in words:
        return "make it for both ends: extendedKeyUsage = serverAuth, clientAuth"
    return "sign the certificate with the authority in TRD_TLS_CA, or name the one that signed it"
