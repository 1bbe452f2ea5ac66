"""The ends of certificates, read from PEM: as the certificates were made, and an error for anything else."""

from __future__ import annotations

import datetime
import ssl

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.external.certificate_ends import certificate_ends

AUTHORITY = trustme.CA()


def pem(*ends: datetime.datetime) -> str:
    return "".join(
        AUTHORITY.issue_cert("a.example", not_after=each).cert_chain_pems[0].bytes().decode() for each in ends
    )


ENDS = [datetime.datetime(year, 1, 2, 3, 4, 5, tzinfo=datetime.UTC) for year in (2001, 2049, 2050, 2120)]
PEM = pem(*ENDS)
DER = ssl.PEM_cert_to_DER_cert(pem(ENDS[0]))


def test_each_certificate_has_its_end() -> None:
    assert list(certificate_ends(PEM)) == [each.timestamp() for each in ENDS]
    key = AUTHORITY.issue_cert("a.example").private_key_pem.bytes().decode()
    assert list(certificate_ends(f"a remark\n{key}{PEM}{key}")) == [each.timestamp() for each in ENDS]
    assert list(certificate_ends(key)) == []
    known = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    known.load_verify_locations(cadata=AUTHORITY.cert_pem.bytes().decode())
    (authority,) = known.get_ca_certs()
    assert list(certificate_ends(AUTHORITY.cert_pem.bytes().decode())) == [
        ssl.cert_time_to_seconds(str(authority["notAfter"]))
    ]


@given(st.integers(0, len(DER) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_certificate_is_a_value_error_at_most(place: int, byte: int, cut: bool) -> None:
    damaged = DER[:place] if cut else DER[:place] + bytes([byte]) + DER[place + 1 :]
    try:
        list(certificate_ends(ssl.DER_cert_to_PEM_cert(damaged)))
    except ValueError:
        pass


@pytest.mark.parametrize("text", [PEM[:200], "-----BEGIN CERTIFICATE-----", ssl.DER_cert_to_PEM_cert(b"\x30\x00")])
def test_what_is_cut(text: str) -> None:
    with pytest.raises(ValueError, match=r"certificate"):
        list(certificate_ends(text))
