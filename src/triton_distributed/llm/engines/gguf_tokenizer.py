"""Turns the vocabulary of a GGUF file into the contents of a `tokenizer.json`. Pure.

A GGUF file has the tokens and merges of a byte-level BPE, but only a name for the rule that splits a text into words.
The rules below are those of llama.cpp (`src/llama-vocab.cpp`) and of the `tokenizer.json` of the models.
"""

from __future__ import annotations

import json
from typing import Any

__all__: list[str] = []

_CONTROL, _USER_DEFINED = 3, 4  # `llama_token_type`

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT_2 = {**_BYTES, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, _BYTES]


_RULES: dict[str, list[dict[str, Any]]] = {
    name: rule
    for names, rule in {
        "gpt-2 phi-2 olmo mpt jais roberta-bpe": [_GPT_2],
        "smollm starcoder refact command-r codeshell": [_DIGITS, _GPT_2],
        "llama-bpe llama3 llama-v3 dbrx smaug-bpe": _split(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"),
        "qwen2 deepseek-r1-qwen stablelm2": _split(rf"{_LETTERS}|\p{{N}}|{_REST}"),
        "gpt-4o": _split(_GPT_4O),
    }.items()
    for name in names.split()
}
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}  # a word that is a token is taken without merging


def convert(metadata: dict[str, Any]) -> bytes:
    """Make the contents of a `tokenizer.json`.

    Args:
        metadata: of the GGUF file.

    Raises:
        ValueError: the vocabulary is of another kind, or the name of its rule is not known.
    """
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "")
    if kind != "gpt2":
        raise ValueError(f"its tokenizer is of the kind {kind!r}, not a byte-level BPE")
    if rule not in _RULES:
        raise ValueError(f"the pre-tokenizer {rule!r} is not known")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    added = [
        {"id": token_id, "content": tokens[token_id], "special": kind == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token_id, kind in enumerate(metadata["tokenizer.ggml.token_type"])
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "ignore_merges": rule in _WHOLE_WORDS,
        "vocab": {token: token_id for token_id, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
    }
    file = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _RULES[rule]},
        "post_processor": _bos(metadata, tokens),
        "decoder": _GPT_2,
        "model": model,
    }
    return json.dumps(file, ensure_ascii=False, separators=(",", ":")).encode()


def control_tokens(metadata: dict[str, Any]) -> frozenset[int]:
    """The ids of tokens without a text, like the end token."""
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    return frozenset(token_id for token_id, kind in enumerate(kinds) if kind == _CONTROL)


def _bos(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Puts the begin token before a text, where the model asks for it."""
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    if begin is None or not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    special, text = {"id": tokens[begin], "type_id": 0}, [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, *text],
        "pair": [{"SpecialToken": special}, *text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[begin]: {"id": tokens[begin], "ids": [begin], "tokens": [tokens[begin]]}},
    }
