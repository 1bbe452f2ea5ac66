"""From the body of a request to what the engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec

from triton_distributed.compiled import caused
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.request import Guide, Request, Sampling
from triton_distributed.llm.http.bodies import ChatBody, CompletionBody, Generation, StructuredOutputs, refuse, refused
from triton_distributed.llm.models.prompts import Prompt

DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say: the OpenAI API's own value."""

UNKNOWN_CONTEXT_TOKENS = 32_768
"""`max_tokens` of a chat that does not say, for a model whose context length is not known."""


def chat_template_values(body: ChatBody) -> dict[str, Any] | None:
    """Return the variables that the caller gives to the chat template."""
    if body.chat_template_kwargs is None and body.reasoning_effort is None and body.documents is None:
        return None
    values = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        values.setdefault("reasoning_effort", body.reasoning_effort)
    if body.documents is not None:
        values.setdefault("documents", body.documents)
    return values or None


def base_request(body: ChatBody | CompletionBody, card: ModelCard, raw: bytes) -> Request:
    """Return the request without its prompt and `max_tokens`, after checking all that needs no prompt.

    Raises:
        InvalidParameter: a field cannot be honoured.
    """
    if body.stream_options is not None and not body.stream:
        refuse(body, card)
        raise InvalidParameter("stream_options", "is only allowed when stream is true")
    read, nothing = _RARE[type(body)]
    if not card.extra_fields and read(body) == nothing:  # As most requests.
        plain = _PLAIN if body.temperature is None else Sampling(temperature=body.temperature)
        return Request(model=body.model, sampling=plain)
    refuse(body, card)
    request = Request(model=body.model, sampling=_sampling(body, card))
    if body.stop is not None:
        request.stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.min_tokens:
        request.min_tokens = body.min_tokens
    if body.stop_token_ids:
        request.stop_token_ids = body.stop_token_ids
    if body.ignore_eos:
        request.ignore_eos = True
    request.guide = _guide(body, card)
    if isinstance(body, ChatBody) and (body.tools or body.tool_choice is not None):
        _take_tools(request, body, card)
    # The body is not read twice for a field that it is known not to have.
    if any(getattr(body, name, "") is not None for name in card.extra_fields):
        fields = msgspec.json.decode(raw)
        request.extra = {name: fields[name] for name in card.extra_fields if name in fields}
        if isinstance(salt := request.extra.get("cache_salt"), str):
            request.cache_salt = salt  # Of an engine that heeds it; elsewhere it was refused.
    return request


def with_prompt(request: Request, body: ChatBody | CompletionBody, card: ModelCard, prompt: Prompt) -> Request:
    """Set `max_tokens`, as the context length allows.

    Raises:
        InvalidParameter: the prompt and `max_tokens` do not fit the context length.
    """
    field, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            field, asked = "max_completion_tokens", body.max_completion_tokens
    elif asked is None:
        asked = DEFAULT_COMPLETION_TOKENS
        if card.context_tokens:
            asked = max(1, min(asked, card.context_tokens - prompt.tokens))
    left = (card.context_tokens - prompt.tokens) if card.context_tokens else UNKNOWN_CONTEXT_TOKENS
    if left < 1:
        raise InvalidParameter(
            "messages" if isinstance(body, ChatBody) else "prompt",
            f"the prompt has {prompt.tokens} tokens, and the context of the model {card.context_tokens}: "
            "none is left for the answer",
            "context_length_exceeded",
        )
    if asked is None:
        asked = left
    elif asked > left and card.context_tokens:
        raise InvalidParameter(
            field,
            f"the prompt has {prompt.tokens} tokens, {asked} more are asked for, and the context of the model has "
            f"{card.context_tokens}",
            "context_length_exceeded",
        )
    if request.min_tokens > asked:
        raise InvalidParameter("min_tokens", f"{request.min_tokens} is above {field}, {asked}")
    request.max_tokens = asked
    return request


_LESS_USUAL = (
    *("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "logit_bias"),
    *("logprobs", "top_logprobs", "stop", "min_tokens", "stop_token_ids", "ignore_eos", "tools", "tool_choice"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
"""Fields that `base_request` looks at, besides those of every second request and those that may be refused."""


def _rare(kind: type[ChatBody | CompletionBody]) -> tuple[Callable[[Any], Any], tuple[None, ...]]:
    """Return what reads all less usual fields of a body at once, and what it returns of a body without them."""
    known = {each.name for each in msgspec.structs.fields(kind)}
    names = [each for each in (*_LESS_USUAL, *refused(kind)) if each in known]
    return attrgetter(*names), (None,) * len(names)


_RARE: dict[type[Any], tuple[Callable[[Any], Any], tuple[None, ...]]] = {
    ChatBody: _rare(ChatBody),
    CompletionBody: _rare(CompletionBody),
}


def _sampling(body: ChatBody | CompletionBody, card: ModelCard) -> Sampling:
    given: dict[str, Any] = {}
    if body.temperature is not None:
        given["temperature"] = body.temperature
    if body.top_p is not None:
        given["top_p"] = body.top_p
    if body.top_k is not None and body.top_k > 0:
        given["top_k"] = body.top_k
    if body.min_p is not None:
        given["min_p"] = body.min_p
    if body.presence_penalty is not None:
        given["presence_penalty"] = body.presence_penalty
    if body.frequency_penalty is not None:
        given["frequency_penalty"] = body.frequency_penalty
    if body.repetition_penalty is not None:
        given["repetition_penalty"] = body.repetition_penalty
    if body.seed is not None:
        given["seed"] = body.seed
    if body.logit_bias:
        if any(not 0 <= token < 2**32 for token in body.logit_bias):
            raise InvalidParameter("logit_bias", "a key is not a token id")
        given["logit_bias"] = body.logit_bias
    if isinstance(body, CompletionBody):
        count, field = body.logprobs, "logprobs"
    else:
        count, field = (body.top_logprobs or 0) if body.logprobs else None, "top_logprobs"
        if count is None and body.top_logprobs:
            raise InvalidParameter("top_logprobs", "is only allowed when logprobs is true")
    if count is not None:
        if card.max_logprobs < 0:
            raise InvalidParameter("logprobs", "the engine of this model reports none", "unsupported_parameter")
        if count > card.max_logprobs:
            raise InvalidParameter(field, f"{count} is above {card.max_logprobs}, the most that this model reports")
        given["logprobs"] = count
    return Sampling(**given) if given else _PLAIN


_PLAIN = Sampling()


def _guide(body: Generation, card: ModelCard) -> Guide | None:
    found: list[tuple[str, str, Any]] = []  # The field of the body, the attribute of Guide, its value.
    if (wanted := body.response_format) is not None:
        if wanted.type == "json_object":
            found.append(("response_format", "json", True))
        elif wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                raise InvalidParameter("response_format.json_schema", "has no schema")
            found.append(("response_format", "schema", wanted.json_schema.schema))
    if (outputs := body.structured_outputs) is not None:
        found += _of_structured(outputs)
    if body.guided_json is not None:
        found.append(("guided_json", "schema", _schema("guided_json", body.guided_json)))
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{name}")) is not None:
            found.append((f"guided_{name}", name, value))
    if not found:
        return None
    if len(found) > 1:
        raise InvalidParameter(found[1][0], f"an answer has one form, and {found[0][0]} gives one already")
    field, attribute, value = found[0]
    if attribute not in card.guides:
        raise InvalidParameter(
            field, f"the engine of this model does not take this form ({attribute})", "unsupported_parameter"
        )
    if attribute == "choice" and not value:
        raise InvalidParameter(field, "there is nothing to choose from")
    return Guide(**{attribute: value}, field=field)


def _of_structured(outputs: StructuredOutputs) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    field = "structured_outputs"
    if outputs.structural_tag is not None:
        raise InvalidParameter(field + ".structural_tag", "is not supported", "unsupported_parameter")
    if outputs.json is not None:
        found.append((field, "schema", _schema(field + ".json", outputs.json)))
    if outputs.json_object:
        found.append((field, "json", True))
    others = ((name, getattr(outputs, name)) for name in ("regex", "choice", "grammar"))
    return found + [(field, name, value) for name, value in others if value is not None]


def _schema(field: str, value: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            return msgspec.json.decode(value, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise caused(InvalidParameter(field, f"is not a JSON schema: {error}"), None)
    return value


def _take_tools(request: Request, body: ChatBody, card: ModelCard) -> None:
    _check_choice(body)
    if body.tool_choice == "none" or not body.tools:
        return
    if not card.tools:
        raise InvalidParameter("tools", "the engine of this model does not take tools", "unsupported_parameter")
    request.tools = body.tools
    request.tool_choice = body.tool_choice
    request.parallel_tool_calls = body.parallel_tool_calls


def _check_choice(body: ChatBody) -> None:
    """Check that a function that must be called is one of the tools."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not body.tools:
        raise InvalidParameter("tool_choice", "asks for a call, and there are no tools")
    if choice == "required":
        return
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    known = [each["function"].get("name") for each in body.tools if isinstance(each.get("function"), dict)]
    if name is None:
        raise InvalidParameter("tool_choice", "must be 'none', 'auto', 'required', or an object with function.name")
    if name not in known:
        raise InvalidParameter("tool_choice", f"{name!r} is not the name of a tool")
