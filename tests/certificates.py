"""Certificates of tests: an authority, and members that it has signed, as files."""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path
from typing import Any

import trustme

from triton_distributed.external.tls import TlsFiles
from triton_distributed.transport.tls import SessionTls

SETTINGS = ("TRD_TLS_CERT", "TRD_TLS_KEY", "TRD_TLS_CA")
LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


class Member:
    """A certificate and its key in files, and the authority that its peers are held to.

    Args:
        folder: where the files are.
        own: the authority that signs its certificate.
        trusted: the one that it holds its peers to; its own by default.
        name: what the certificate carries.
        options: of `trustme.CA.issue_cert`.
    """

    def __init__(
        self, folder: Path, own: trustme.CA, trusted: trustme.CA | None = None, name: str = "a.example", **options: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.cert, self.key, self.ca = (str(folder / each) for each in ("cert.pem", "key.pem", "ca.pem"))
        self.write(own, trusted, name, **options)

    def write(
        self, own: trustme.CA, trusted: trustme.CA | None = None, name: str = "a.example", **options: Any
    ) -> None:
        """Replace the files, one after the other, each atomically."""
        issued = own.issue_cert(name, **options)
        chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
        content = {
            self.cert: chain,
            self.key: issued.private_key_pem.bytes(),
            self.ca: (trusted or own).cert_pem.bytes(),
        }
        for path, data in content.items():
            Path(path + ".new").write_bytes(data)
            os.replace(path + ".new", path)

    def files(self) -> TlsFiles:
        return TlsFiles(SETTINGS, self.cert, self.key, self.ca)

    def tls(self, server_name: str = "") -> SessionTls:
        return SessionTls(self.files(), server_name)

    def config(self) -> dict[str, str]:
        """As settings of a runtime."""
        return {"tls_cert": self.cert, "tls_key": self.key, "tls_ca": self.ca}

    def context(self, server: bool = False) -> ssl.SSLContext:
        """For connections that are not made by the transport under test."""
        return self.files().context(server=server)
