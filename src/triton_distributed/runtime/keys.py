"""How a request names the endpoint it is for."""

from __future__ import annotations

from hashlib import blake2b

from triton_distributed.names import EndpointName


def endpoint_key(name: EndpointName) -> int:
    """64 bits that stand for an endpoint on the wire: a worker serves several on one session under one instance id."""
    text = "\0".join((name.namespace, name.component, name.endpoint))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
