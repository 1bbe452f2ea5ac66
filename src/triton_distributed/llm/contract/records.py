"""The model card in the record of an instance: how a worker writes it, and how others read it."""

from __future__ import annotations

from typing import Any

import msgspec

from triton_distributed.llm.contract.model import ModelCard, Role
from triton_distributed.names import Instance

NAMESPACE = "models"
"""The namespace of the endpoints of models, if nothing else is set."""

GENERATE, EMBED, ASSETS, WATCH = "generate", "embed", "assets", "watch"
"""The endpoints of a model. A worker registers `generate` last, so that the others exist when it is seen."""

PREFILL = "prefill"
"""What a worker of the role `prefill` serves instead of `generate` and `embed`: no other request can reach it."""

_KEY = "model"


def metadata_of(card: ModelCard) -> dict[str, Any]:
    """The metadata of an instance that serves a model."""
    return {_KEY: msgspec.json.decode(msgspec.json.encode(card))}


def card_of(instance: Instance, namespace: str) -> ModelCard | None:
    """Return the card of the model that an instance serves; None if it does not serve one in this namespace.

    Args:
        instance: the record of an endpoint `generate` or `prefill`.
        namespace: of the endpoints of models.

    Raises:
        ValueError: it has no valid card, or the card has values that this version does not know.
    """
    name = instance.endpoint
    if name.namespace != namespace or name.endpoint not in (GENERATE, PREFILL) or _KEY not in instance.metadata:
        return None
    card = msgspec.convert(instance.metadata[_KEY], ModelCard)
    if card.component != name.component:
        raise ValueError(f"its card is that of {card.component!r}, perhaps as a newer version writes it")
    return card


def role_of(instance: Instance) -> Role:
    """The role of an instance; `both` if its card does not tell one that this version knows."""
    card = instance.metadata.get(_KEY)
    found = card.get("role") if isinstance(card, dict) else None
    return "prefill" if found == "prefill" else "decode" if found == "decode" else "both"


def differences(mine: ModelCard, other: ModelCard) -> list[str]:
    """A text for each field in which two cards differ: `context_tokens: 4096 here, 8192 there`. The role may differ."""
    found = []
    for field in ModelCard.__struct_fields__:
        here, there = getattr(mine, field), getattr(other, field)
        if here != there and field != "role":
            found.append(f"{field}: {here!r} here, {there!r} there")
    return found
