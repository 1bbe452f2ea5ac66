"""Checks of TLS files: readable, matching, accepted by their own authority, and not near their end."""

from __future__ import annotations

import math
import os
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from triton_distributed.cli.checks.finding import Finding, error, ok, warning
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.external.certificate_ends import certificate_ends
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
    yield from _key_file("tls", config.tls_key or config.tls_cert)
    try:
        known = handshake(server, client, name or None)[0]
    except ssl.SSLError as failed:
        yield error("tls", f"members with this certificate refuse each other: {_words(failed)}", _advice(failed, name))
        return
    yield from authorities("tls", config.tls_ca)
    renew = "renew it: running members take the new files for their next connections"
    left_days = _days(known)
    if left_days < SOON_DAYS:
        yield warning("tls", f"the certificate {config.tls_cert} ends in {left_days:.1f} days", renew)
    else:
        yield ok("tls", f"the certificate is accepted by its own authority, and valid for {left_days:.0f} days")


def servers(config: Config) -> Iterator[Finding]:
    """Check the files for the connections to etcd and NATS, if these are used: their ends, and who can read the key."""
    if config.discovery == "etcd":
        yield from _client_files("etcd", config.etcd_cert, config.etcd_key, config.etcd_ca)
    if config.nats_urls:
        yield from _client_files("nats", config.nats_cert, config.nats_key, config.nats_ca)


def _client_files(part: str, cert: str, key: str, ca: str) -> Iterator[Finding]:
    yield from authorities(part, ca)
    if not cert:
        return
    names = f"TRD_{part.upper()}_CERT and TRD_{part.upper()}_KEY"
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # It accepts this one certificate, of any authority.
    try:
        server.load_verify_locations(cert)
        for each in (server, client):
            each.load_cert_chain(cert, key or None, password=str)
        left_days = _days(handshake(server, client, None)[1])
    except ssl.SSLCertVerificationError as failed:
        yield error(part, f"the certificate {cert} is refused: {_words(failed)}", _advice(failed, ""))
    except (OSError, ValueError) as failed:  # An SSLError is an OSError.
        words = f"{names} cannot be used: {getattr(failed, 'strerror', None) or failed}"
        yield error(part, words, "name PEM files that belong together")
    else:
        yield from _key_file(part, key or cert)
        if left_days < SOON_DAYS:
            yield warning(part, f"the certificate {cert} ends in {left_days:.1f} days", "renew it")


def authorities(part: str, ca: str) -> Iterator[Finding]:
    """Check the ends of the authorities in a file. A file that cannot be read is found where it is used."""
    try:
        ends = list(certificate_ends(Path(ca).read_text(encoding="ascii", errors="replace"))) if ca else []
    except (OSError, ValueError):
        return
    left_days = (min(ends, default=math.inf) - time.time()) / DAY_S
    if left_days < SOON_DAYS:
        when = f"ends in {left_days:.1f} days" if left_days > 0 else "has ended"
        advice = "make a new authority; give every member a file with both authorities, then the new certificates"
        yield warning(part, f"an authority in {ca} {when}, and with it all certificates that it has signed", advice)


def _days(certificate: Mapping[str, object]) -> float:
    """Days until the end of a certificate, as `SSLSocket.getpeercert` describes it."""
    return (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / DAY_S


def _key_file(part: str, path: str) -> Iterator[Finding]:
    if os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield warning(part, f"other users can read the key {path}", f"chmod 600 {path}")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> tuple[dict[str, object], ...]:
    """Let two contexts shake hands in memory.

    Args:
        name: the name that the server's certificate must carry; None for any.

    Returns:
        the server's certificate and the client's, as `SSLSocket.getpeercert` describes them; empty if not asked for.

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
    return tuple(dict(each.getpeercert() or {}) for each in ends)


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
