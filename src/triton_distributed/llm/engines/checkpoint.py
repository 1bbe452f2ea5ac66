"""Reads what a front end needs from a model's folder in the layout of Hugging Face: tokenizer, template, end tokens."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import Model, ModelCard

__all__: list[str] = []

_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files, without its weights. `context_tokens` is 0 if they do not tell it."""

    tokenizer: bytes
    template: str | None
    template_values: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    context_tokens: int

    def model(self, *, name: str, context_tokens: int, **card: Any) -> Model:
        """What an engine that takes token ids says of the model; `card` has further fields of its card."""
        return Model(
            card=ModelCard(
                name=name,
                context_tokens=context_tokens,
                template_values=self.template_values,
                eos_token_ids=self.eos_token_ids,
                chat=self.template is not None,
                max_logprobs=20,
                continues="greedy",
                **card,
            ),
            tokenizer=self.tokenizer,
            template=self.template,
        )


def read_checkpoint(model: str) -> Checkpoint:
    """Read a folder, or the small files of a model of the Hugging Face hub.

    Raises:
        InvalidParameter: there is no such model, or it has no `tokenizer.json`.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")):
            raise InvalidParameter("model", f"there is no folder {model!r}")
        hub = imported("huggingface_hub", "llm")
        try:
            folder = Path(hub.snapshot_download(model, allow_patterns=_FILES))
        except Exception as error:
            raise InvalidParameter("model", f"{model!r} is no folder, and the hub does not give it: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise InvalidParameter("model", f"{folder} has no tokenizer.json")
    told, config, generation = (_json(folder / each) for each in (_FILES[1], _FILES[3], _FILES[4]))
    text_config = config.get("text_config") or config
    return Checkpoint(
        tokenizer=(folder / "tokenizer.json").read_bytes(),
        template=_template(folder, told),
        template_values={key: found for key in ("bos_token", "eos_token") if (found := _token(told.get(key)))},
        eos_token_ids=_ids(generation.get("eos_token_id", text_config.get("eos_token_id"))),
        context_tokens=int(text_config.get("max_position_embeddings") or 0),
    )


def imported(name: str, extra: str = "") -> ModuleType:
    """Import a module of an engine's package.

    Raises:
        ImportError: it is not installed; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        wanted = f"'triton-distributed[{extra}]'" if extra else package
        raise ImportError(f"this engine needs the package {package}: pip install {wanted}", name=package) from error


def arguments(option: str, text: str) -> dict[str, Any]:
    """Further arguments of an engine, from the text of a JSON object.

    Raises:
        InvalidParameter: the text is not a JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidParameter(option, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidParameter(option, "expected a JSON object")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidParameter("model", f"{path}: {error}") from error
    return found if isinstance(found, dict) else {}


def _template(folder: Path, told: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = told.get("chat_template")
    if isinstance(found, list):
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token(found: object) -> str:
    return str(found.get("content") or "") if isinstance(found, dict) else str(found or "")


def _ids(found: object) -> tuple[int, ...]:
    return tuple(found) if isinstance(found, list) else (found,) if isinstance(found, int) else ()
