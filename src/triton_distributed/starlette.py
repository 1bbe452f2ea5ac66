"""Calls from a Starlette app: `pip install 'triton-distributed[starlette]'`. See docs/http.md.

app = Starlette(routes=…, lifespan=trd_starlette.lifespan())
trd_starlette.install(app)
"""

from __future__ import annotations

try:
    from triton_distributed.integrations.http.app import install, lifespan
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "starlette":
        raise
    raise ModuleNotFoundError(
        "triton_distributed.starlette needs Starlette: pip install 'triton-distributed[starlette]'", name=error.name
    ) from None
from triton_distributed.integrations.http.items import ndjson, sse
from triton_distributed.integrations.http.text import Event

__all__ = ["Event", "install", "lifespan", "ndjson", "sse"]
