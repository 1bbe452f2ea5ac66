"""`trd model ls`: list the models that are served."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from triton_distributed.api.connection import connect
from triton_distributed.cli.instances import listed
from triton_distributed.cli.rendering import json_option, table, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.discovery.base import Snapshot
from triton_distributed.llm.contract.errors import PrefillOnly
from triton_distributed.llm.contract.records import NAMESPACE
from triton_distributed.llm.models.table import Entry, ModelTable

EPILOG = """\
A model with several generations has a line for each: new requests go to the first
one. WORKERS that only compute prompts are counted after a +. CONTEXT is in tokens.
"""

HEADER = ("MODEL", "GENERATION", "WORKERS", "ENGINE", "CONTEXT", "ALIASES", "ENDPOINTS")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("--namespace", default=NAMESPACE, help=f"of the endpoints (default: {NAMESPACE})")
    json_option(parser, "one generation of a model")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    models, where = asyncio.run(_look(settings(), arguments.namespace))
    prefills = {name: sorted(each.instances) for name, each in models.prefills.items()}
    unable = sorted({each.card.name for each in models.prefills.values()} & models.prefill_only())
    found = sorted(models.entries.values(), key=lambda each: (each.card.name, -each.card.generation))
    if arguments.json:
        for each in found:
            write_json(_as_json(each, prefills.get(each.card.component, ()), arguments.namespace))
    elif found:
        rows = [_cells(each, prefills.get(each.card.component, ()), arguments.namespace) for each in found]
        for line in table(HEADER, rows):
            print(line)
    sys.stdout.flush()
    for name in unable:
        print(PrefillOnly(name), file=sys.stderr)
    if not found and not unable:
        print(f"no model is served in the namespace {arguments.namespace!r}; {where} was asked", file=sys.stderr)
    return 0


async def _look(config: Config, namespace: str) -> tuple[ModelTable, str]:
    """The models, and which discovery was asked."""
    models = ModelTable(namespace)
    async with connect(config) as here:
        discovery = here.runtime.discovery
        models.apply(Snapshot(tuple(await listed(discovery))))
        return models, discovery.where


def _cells(entry: Entry, prefills: Sequence[int], namespace: str) -> tuple[str, ...]:
    card, more = entry.card, len(prefills)
    return (
        card.name,
        str(card.generation),
        f"{len(entry.instances)}+{more}" if more else str(len(entry.instances)),
        card.engine or "-",
        str(card.context_tokens or "-"),
        ",".join(card.names[1:]) or "-",
        f"{namespace}.{card.component}",
    )


def _as_json(entry: Entry, prefills: Sequence[int], namespace: str) -> dict[str, Any]:
    card = entry.card
    return {
        "model": card.name,
        "generation": card.generation,
        "aliases": list(card.aliases),
        "adapters": list(card.adapters),
        "instances": [str(each) for each in sorted(entry.instances)],
        "prefill_instances": [str(each) for each in prefills],
        "created": entry.created,
        "engine": card.engine,
        "context_tokens": card.context_tokens,
        "embeddings": card.embeddings,
        "endpoints": f"{namespace}.{card.component}",
    }
