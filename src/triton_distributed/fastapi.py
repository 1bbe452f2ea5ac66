"""Calls from a FastAPI app: `pip install 'triton-distributed[fastapi]'`. See docs/http.md.

app = FastAPI(lifespan=trd_fastapi.lifespan())
trd_fastapi.install(app)


@app.post("/embed")
async def embed(body: EmbedRequest, here: trd_fastapi.Here) -> EmbedResponse:
    return await here.call(EMBED, body, timeout=2)
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

try:
    from fastapi import Depends
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "fastapi":
        raise
    raise ModuleNotFoundError(
        "triton_distributed.fastapi needs FastAPI: pip install 'triton-distributed[fastapi]'", name=error.name
    ) from None
from triton_distributed.api import connection as api
from triton_distributed.starlette import Event, install, lifespan, ndjson, sse

__all__ = ["Event", "Here", "connection", "install", "lifespan", "ndjson", "sse"]


async def connection() -> api.Connection:
    """The connection of the app that handles this request: the dependency of `Here`.

    A test replaces it with `app.dependency_overrides[trd_fastapi.connection]`, or sets `app.state.trd`.

    Raises:
        RuntimeError: the app is not connected.
    """
    try:
        return api.here()
    except RuntimeError:
        raise RuntimeError(
            "this app is not connected: make it with FastAPI(lifespan=trd_fastapi.lifespan()) and call "
            "trd_fastapi.install(app); in a test, `with TestClient(app)` runs the lifespan"
        ) from None


Here: TypeAlias = Annotated[api.Connection, Depends(connection)]
"""The type of a parameter that gets the app's connection."""
