"""The bodies of the OpenAI API's requests, and what is done with each of their fields.

A field is honoured, has no effect here, or is refused. `NO_EFFECT` and `REFUSED` name those of the second and third
kind; all others are honoured. A field of an unknown name has no effect, as with vLLM: clients send fields of their own.
A model may name any field in `ModelCard.extra_fields`; it then goes to the engine as it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import ModelCard

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
MOST = 2**63 - 1
"""The largest whole number: a larger one cannot travel to a worker."""

Whole = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Token = Annotated[int, Meta(ge=0, lt=2**32)]
Text = Annotated[str, Meta(min_length=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1000)]
"""Each token of an answer is compared with all beginnings of the stop texts, on the event loop."""

MOST_ANSWERS = 128
"""The most answers of one request, all its prompts together. OpenAI's own limit of `n`."""

MOST_INPUTS = 2048
"""The most inputs of a request for embeddings, OpenAI's own limit. Each takes some microseconds of the event loop."""


class StreamOptions(msgspec.Struct):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JSONSchema(msgspec.Struct):
    """The schema of `response_format`."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(msgspec.Struct):
    """The form that the answer must have, as vLLM names it."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None  # Refused.


class Generation(msgspec.Struct, kw_only=True):
    """The fields that chats and completions have in common."""

    model: Text
    n: Annotated[int, Meta(ge=1, le=MOST_ANSWERS)] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=MOST)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=64)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Of vLLM.
    top_k: Annotated[int, Meta(ge=-1, le=MOST)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    min_tokens: Whole | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    # Without effect.
    metadata: Any = None
    priority: Any = None
    request_id: Any = None
    guided_decoding_backend: Any = None
    spaces_between_special_tokens: Any = None
    # Refused.
    allowed_token_ids: Any = None
    bad_words: Any = None
    cache_salt: Any = None
    guided_whitespace_pattern: Any = None
    include_stop_str_in_output: Any = None
    kv_transfer_params: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    prompt_logprobs: Any = None
    return_tokens_as_token_ids: Any = None
    skip_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None


class ChatBody(Generation, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # Of vLLM.
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    prompt_cache_key: str | None = None
    # Without effect.
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    # Refused.
    add_special_tokens: Any = None
    audio: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    mm_processor_kwargs: Any = None
    modalities: Any = None
    moderation: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Generation, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: str | list[str | Token | list[Token]]
    echo: bool | None = None
    logprobs: Whole | None = None
    best_of: Positive | None = None
    # Refused.
    add_special_tokens: Any = None
    suffix: Any = None


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The body of `/v1/embeddings`."""

    model: Text
    input: str | list[str | Token | list[Token]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: Any = None
    priority: Any = None
    truncate_prompt_tokens: Any = None
    add_special_tokens: Any = None


NO_EFFECT: dict[str, str] = {
    "user": "it is not kept",
    "metadata": "it is not kept",
    "safety_identifier": "it is not kept",
    "store": "no answer is kept",
    "service_tier": "there is one tier",
    "prediction": "it would only change the speed",
    "prompt_cache_options": "engines share prefixes by their tokens",
    "prompt_cache_retention": "engines share prefixes by their tokens",
    "priority": "all requests have the same",
    "request_id": "the header `x-request-id` is what counts",
    "guided_decoding_backend": "the engine chooses",
    "spaces_between_special_tokens": "special tokens are not part of the text",
}
"""Fields that are accepted and change nothing, each with the reason."""

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_special_tokens": ("the model's tokenizer and template decide", (True,)),
    "allowed_token_ids": ("use logit_bias", ()),
    "audio": ("answers are text", ()),
    "bad_words": ("use logit_bias", ([],)),
    "cache_salt": ("prefixes of all callers share one cache", ()),
    "chat_template": ("the model's own template is used, with chat_template_kwargs", ()),
    "continue_final_message": ("use /v1/completions with the text so far", (False,)),
    "echo": ("a chat cannot be repeated", (False,)),
    "function_call": ("use tool_choice", ("none",)),
    "functions": ("use tools", ([],)),
    "guided_whitespace_pattern": ("the engine chooses", ()),
    "include_stop_str_in_output": ("the stop text is never part of the answer", (False,)),
    "kv_transfer_params": ("the front end chooses prefill workers", ()),
    "length_penalty": ("there is no beam search", (1,)),
    "logits_processors": ("callers cannot bring code", ([],)),
    "mm_processor_kwargs": ("messages are text", ({},)),
    "modalities": ("answers are text", (["text"],)),
    "moderation": ("there is no moderation", ()),
    "prompt_logprobs": ("log-probabilities are of the answer only", ()),
    "return_tokens_as_token_ids": ("use return_token_ids", (False,)),
    "skip_special_tokens": ("special tokens are not part of the text", (True,)),
    "suffix": ("put the model's own marks for infilling into the prompt", ("",)),
    "truncate_prompt_tokens": ("a prompt is never shortened", ()),
    "use_beam_search": ("there is no beam search", (False,)),
    "verbosity": ("say it in the messages", ("medium",)),
    "vllm_xargs": ("the engine has no such options", ({},)),
    "web_search_options": ("there is no web search", ()),
}
"""Fields that are refused: the reason, and the values that are accepted, since they ask for nothing. None is one."""


def refused(kind: type[Generation | EmbeddingBody]) -> tuple[str, ...]:
    """Return the fields of a kind of body that are refused, most of them unless their value asks for nothing."""
    # A body whose type honours a field under the same name (`echo` of completions) gives it a type.
    return tuple(each.name for each in msgspec.structs.fields(kind) if each.type is Any and each.name in REFUSED)


_OF_KIND: dict[type[Any], tuple[str, ...]] = {}


def refuse(body: Generation | EmbeddingBody, card: ModelCard) -> None:
    """Refuse a field of a body that cannot be honoured.

    Raises:
        InvalidParameter: of the first such field.
    """
    kind = type(body)
    found = _OF_KIND.get(kind)
    if found is None:
        found = _OF_KIND[kind] = refused(kind)
    for name in found:
        value = getattr(body, name)
        if value is None or name in card.extra_fields:
            continue
        reason, harmless = REFUSED[name]
        if value not in harmless:
            raise InvalidParameter(name, f"this field is not supported: {reason}", "unsupported_parameter")


def field_of(message: str) -> tuple[str, str]:
    """Split an error text of msgspec into its words and the field: `… - at `$.stop[...]``."""
    words, _, path = message.replace(" - at `key` in `$", " as a key - at `$").rpartition(" - at `$")
    if not words:  # A field that is absent: "Object missing required field `model`".
        return message, message.partition("required field `")[2].rstrip("`")
    field = path.rstrip("`").lstrip(".")
    if "required field `" in words:
        inner = words.partition("required field `")[2].rstrip("`")
        field = f"{field}.{inner}" if field else inner
    return words, field
