"""The ends of the certificates in a PEM file. The standard library reads them only in the course of a handshake."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
MOST_CERTIFICATES = 1000
"""Certificates of a file that are read: the bundles of operating systems have some 150."""

# Tags of DER (X.690): the types that stand before the validity of a certificate (RFC 5280, 4.1).
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


def certificate_ends(pem: str) -> Iterator[float]:
    """Return the end of each certificate, in seconds since 1970, in the order of the file.

    Args:
        pem: the text of the file. What stands beside certificates, for example a key, is left alone.

    Raises:
        ValueError: a certificate is malformed.
    """
    for block in pem.split(BEGIN)[1 : MOST_CERTIFICATES + 1]:
        body, mark, _ = block.partition(END)
        if not mark:
            raise ValueError("a certificate is cut")
        yield _end(ssl.PEM_cert_to_DER_cert(f"{BEGIN}{body}{END}\n"))


def _end(der: bytes) -> float:
    """The end of one certificate: Certificate.tbsCertificate.validity.notAfter."""
    try:
        _, at, _ = _value(der, 0, _SEQUENCE)
        _, at, _ = _value(der, at, _SEQUENCE)
        if der[at] == _VERSION:
            _, _, at = _value(der, at)
        for _ in ("serialNumber", "signature", "issuer"):
            _, _, at = _value(der, at)
        _, at, _ = _value(der, at, _SEQUENCE)
        _, _, at = _value(der, at)  # notBefore
        tag, start, stop = _value(der, at)
    except IndexError:
        raise ValueError("a certificate is cut") from None
    text = der[start:stop].decode("ascii")
    if tag == _UTC_TIME:  # Two digits are a year from 1950 to 2049.
        text = f"{'19' if text[:2] >= '50' else '20'}{text}"
    elif tag != _GENERALIZED_TIME:
        raise ValueError("a certificate has no end where it should be")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _value(der: bytes, at: int, expected: int = 0) -> tuple[int, int, int]:
    """The tag of the value at a place, and where its content begins and ends."""
    tag, size = der[at], der[at + 1]
    start = at + 2
    if size & 0x80:  # The size of the size comes first.
        start += size & 0x7F
        size = int.from_bytes(der[at + 2 : start], "big")
    if (expected and tag != expected) or start + size > len(der):
        raise ValueError("it is not a certificate")
    return tag, start, start + size
