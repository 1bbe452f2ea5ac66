"""The description of the front end for tools that read OpenAPI. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from triton_distributed.llm.http.routes import Route

OPENAI = {
    "/v1/chat/completions": ("post", "Answer a chat."),
    "/v1/completions": ("post", "Complete a text."),
    "/v1/embeddings": ("post", "Make embeddings of texts."),
    "/v1/models": ("get", "List the models."),
    "/v1/models/{id}": ("get", "Describe a model."),
}
"""The routes of the OpenAI API, whose bodies its own reference describes."""


def description(version: str, with_models: bool, routes: Iterable[tuple[Route, Mapping[str, Any]]]) -> dict[str, Any]:
    """Make the content of `/openapi.json`.

    Args:
        version: of this package.
        with_models: whether the front end has the OpenAI API.
        routes: the other routes, each with the schema that its endpoint has published; empty without one.
    """
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for path, (method, summary) in OPENAI.items() if with_models else ():
        paths[path] = {method: {"summary": summary, "responses": {"200": {"description": "The answer."}}}}
        if "{id}" in path:
            text = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path][method]["parameters"] = [text]
    for route, contract in routes:
        label = str(route.endpoint)
        request, answer = (_schema(contract.get(each) or {}, label, schemas) for each in ("request", "answer"))
        kind = "text/event-stream" if contract.get("kind") in ("stream", "bidirectional") else "application/json"
        paths.setdefault(route.path, {})[route.method.lower()] = {
            "summary": f"Call the endpoint {label}.",
            "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
            "responses": {"200": {"description": "The answer.", "content": {kind: {"schema": answer}}}},
        }
    found: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "triton_distributed", "version": version}}
    return {**found, "paths": paths, "components": {"schemas": schemas}}


def _schema(published: Mapping[str, Any], label: str, schemas: dict[str, Any]) -> Any:
    """A published schema in OpenAPI's form: its classes become components, with the endpoint in their names."""
    for name, each in (published.get("$defs") or {}).items():
        schemas[f"{label}.{name}"] = _plain(each, label)
    return _plain({key: each for key, each in published.items() if key != "$defs"}, label)


def _plain(part: Any, label: str) -> Any:
    if isinstance(part, list):
        return [_plain(each, label) for each in part]
    if not isinstance(part, Mapping):
        return part
    if isinstance(name := part.get("$ref"), str):
        return {"$ref": f"#/components/schemas/{label}.{name}"}
    return {
        key: {name: _plain(one, label) for name, one in each.items()} if key == "properties" else _plain(each, label)
        for key, each in part.items()
        if key != "names"  # The aliases of fields, which are not part of JSON schema.
    }
