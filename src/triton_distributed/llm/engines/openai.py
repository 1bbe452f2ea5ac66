"""Any server of the OpenAI API as an engine: vLLM serve, llama-server, Ollama, SGLang, or a provider."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from triton_distributed.errors import Overloaded
from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Candidate, Embeddings, Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Request, Sampling
from triton_distributed.llm.engines.checkpoint import read_checkpoint
from triton_distributed.llm.engines.options import whole
from triton_distributed.llm.kv_events.subscriber import EventSubscriber

if TYPE_CHECKING:
    import httpx

__all__: list[str] = []

_TASKS = ("chat", "completions", "embeddings")
_MAX_LINE_BYTES = 16 << 20
_LOWEST = -9999.0
_SAMPLING = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "logit_bias")


class OpenAIEngine(Engine):
    """Forwards requests to a server of the OpenAI API. Messages and text go through as they are.

    Args:
        url: the base URL, e.g. `http://127.0.0.1:8000/v1`.
        model: the model's name at the server; by default the only model that the server has.
        name: the name to serve it under; by default `model`.
        adapters: further models of the server, separated by commas, that are LoRA adapters of this one.
        api_key: sent as `Authorization: Bearer`.
        api_key_file: a file with that key, which the list of processes does not show.
        tasks: which routes the model answers, separated by commas: `chat`, `completions`, `embeddings`.
        context_tokens: the most tokens of prompt and answer together; by default what the server says, if it does.
        slots: the most requests at once.
        tokenizer: a folder, or a model of the Hugging Face hub, with the model's tokenizer and template. Then prompts
            are made outside of the server, and go to its route `completions` as token ids.
        kv_events: with a tokenizer: where the server publishes the events of its KV cache, e.g. `tcp://10.0.0.7:5557`.
        kv_replay: where it answers with earlier events; empty for nowhere.

    Raises:
        InvalidParameter: an option is invalid, or does not fit another.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str = "",
        name: str = "",
        adapters: str = "",
        api_key: str = "",
        api_key_file: str = "",
        tasks: str = "chat,completions",
        context_tokens: str | int = 0,
        slots: str | int = 64,
        tokenizer: str = "",
        kv_events: str = "",
        kv_replay: str = "",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidParameter("url", f"expected http:// or https://, got {url!r}")
        if api_key and api_key_file:
            raise InvalidParameter("api_key", "api_key_file is given too")
        self._tasks = [each.strip() for each in tasks.split(",")]
        if unknown := [each for each in self._tasks if each not in _TASKS]:
            raise InvalidParameter("tasks", f"expected some of {', '.join(_TASKS)}; got {unknown[0]!r}")
        if tokenizer and "embeddings" in self._tasks:
            raise InvalidParameter("tokenizer", "it does not fit the task embeddings")
        if kv_events and not tokenizer:
            raise InvalidParameter("kv_events", "events are about token ids: give the option tokenizer, too")
        if kv_replay and not kv_events:
            raise InvalidParameter("kv_replay", "kv_events is not given")
        self._tokenizer, self._kv_events, self._kv_replay = tokenizer, kv_events, kv_replay
        self._subscriber: EventSubscriber | None = None
        self.slots = whole("slots", slots, 1)
        self._context_tokens = whole("context_tokens", context_tokens, 0)
        self._url, self._upstream, self._name = url.rstrip("/"), model, name
        self._api_key, self._api_key_file = api_key, api_key_file
        self._adapters = tuple(dict.fromkeys(each.strip() for each in adapters.split(",") if each.strip()))
        self._client: httpx.AsyncClient | None = None
        self._active = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    def kv_events(self, publish: Publish) -> bool:
        """Report the events of the server's KV cache. See `Engine.kv_events`."""
        if self._kv_events:
            self._subscriber = EventSubscriber(self._kv_events, publish, replay=self._kv_replay)
        return self._subscriber is not None

    async def start(self) -> None:
        """Ask the server which models it has.

        Raises:
            ImportError: the extra `llm` is not installed.
            InvalidParameter: the server does not have the model.
            ConnectionError: the server cannot be reached, or does not answer as expected.
        """
        try:
            import httpx
        except ImportError as error:
            raise ImportError("the engine openai needs httpx: pip install 'triton-distributed[llm]'") from error
        key = self._api_key
        if self._api_key_file:
            try:
                key = (await asyncio.to_thread(Path(self._api_key_file).read_text, encoding="utf-8")).strip()
            except OSError as error:
                raise InvalidParameter("api_key_file", str(error)) from error
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=10.0),  # The caller's limit of time holds, by cancellation.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.slots),
        )
        listed = await self._read_models()
        if not self._upstream:
            own = [each for each in listed if each not in self._adapters]
            if len(own) != 1:
                known = ", ".join(own) or "it has none"
                raise InvalidParameter("model", f"name one of the server's models: {known}")
            self._upstream = own[0]
        elif self._upstream not in listed:
            known = ", ".join(listed) or "none"
            raise InvalidParameter("model", f"the server does not have {self._upstream!r}; it has: {known}")
        if missing := [each for each in self._adapters if each not in listed]:
            raise InvalidParameter("adapters", f"the server does not have {missing[0]!r}; it has: {', '.join(listed)}")
        context = self._context_tokens or _context_of(listed[self._upstream])
        card = ModelCard(
            name=self._name or self._upstream,
            adapters=self._adapters,
            context_tokens=context,
            chat="chat" in self._tasks,
            completions="completions" in self._tasks,
            max_logprobs=20,
            guides=("json", "schema"),
            tools="chat" in self._tasks,
            extra_fields=("reasoning_effort", "chat_template_kwargs"),
            engine="openai",
        )
        if "embeddings" in self._tasks:
            probe = await self.embed(EmbedRequest(texts=["a"]))
            card = msgspec.structs.replace(card, embeddings=True, dimensions=len(probe.vectors[0]) // 4)
        self.model = Model(card=card)
        if self._tokenizer:
            files = await asyncio.to_thread(read_checkpoint, self._tokenizer)
            if "chat" in self._tasks and files.template is None:
                raise InvalidParameter(
                    "tokenizer", f"{self._tokenizer!r} has no chat template: leave chat out of tasks"
                )
            card = msgspec.structs.replace(
                card,
                template_values=files.template_values,
                eos_token_ids=files.eos_token_ids,
                tools=False,
                extra_fields=(),
            )
            self.model = Model(card=card, tokenizer=files.tokenizer, template=files.template)
        if self._subscriber is not None:
            self._subscriber.start()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`.

        Raises:
            InvalidParameter: the server calls the request invalid, in its own words.
            Overloaded: the server answers 429 or 503.
            ConnectionError: the server fails, or its answer ends too early.
        """
        chat = request.messages is not None
        if not chat and request.text is None and not self._tokenizer:
            raise InvalidParameter("prompt", "this engine takes text or messages, not token ids")
        body = _body(request, request.model if request.model in self._adapters else self._upstream)
        self._active += 1
        last: Output | None = None
        usage: Usage | None = None
        try:
            async for chunk in self._stream("chat/completions" if chat else "completions", body):
                if chunk.get("usage"):
                    usage = _usage(chunk["usage"])
                for choice in chunk.get("choices") or ():
                    found = _output(choice, chat)
                    if last is not None:
                        raise ConnectionError(f"{self._url}: the answer went on after its finish_reason")
                    if found.finish_reason is not None:
                        last = found  # The usage comes after it.
                    elif found.text or found.reasoning or found.tool_calls or found.logprobs:
                        yield found
            if last is None:
                raise ConnectionError(f"{self._url}: the answer ended without a finish_reason")
            if usage is not None:
                self._prompt_tokens += usage.prompt_tokens
                self._cached_tokens += usage.cached_tokens
                self._generated_tokens += usage.completion_tokens
                last.usage = usage
            yield last
        finally:
            self._active -= 1

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts. Raises as `generate` does."""
        if request.prompts:
            raise InvalidParameter("input", "this engine takes texts, not token ids")
        body: dict[str, Any] = {"model": self._upstream, "input": request.texts, "encoding_format": "float"}
        if request.dimensions is not None:
            body["dimensions"] = request.dimensions
        found = await self._json("POST", "embeddings", body)
        try:
            ordered = sorted(found["data"], key=lambda each: each["index"])
            vectors = [_vector(each["embedding"]) for each in ordered]
            tokens = int((found.get("usage") or {}).get("prompt_tokens", 0))
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ConnectionError(f"{self._url}: the embeddings are invalid: {error!r}") from error
        if len(vectors) != len(request.texts):
            raise ConnectionError(f"{self._url}: {len(vectors)} embeddings for {len(request.texts)} inputs")
        return Embeddings(vectors=vectors, prompt_tokens=tokens)

    def metrics(self) -> EngineMetrics:
        """The requests that are at the server now, and the tokens that it reported."""
        return EngineMetrics(
            active=self._active,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            kv_unread=0 if self._subscriber is None else self._subscriber.unread,
            kv_lost=0 if self._subscriber is None else self._subscriber.lost,
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._subscriber is not None:
            await self._subscriber.close()
        if self._client is not None:
            await self._client.aclose()

    async def _read_models(self) -> dict[str, dict[str, Any]]:
        found = await self._json("GET", "models", None)
        try:
            return {str(each["id"]): each for each in found.get("data") or ()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ConnectionError(f"{self._url}/models: not a list of models: {error!r}") from error

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        import httpx

        assert self._client is not None, "start() comes first"
        try:
            answer = await self._client.request(method, f"{self._url}/{path}", json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self._url}/{path}: {_words(error)}") from error
        self._check(answer.status_code, answer.content, answer.headers.get("retry-after"))
        try:
            return answer.json()
        except ValueError as error:
            raise ConnectionError(f"{self._url}/{path}: the answer is not JSON") from error

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of an answer. The end of the iteration closes the connection, so that the server stops."""
        import httpx

        assert self._client is not None, "start() comes first"
        try:
            async with self._client.stream("POST", f"{self._url}/{path}", json=body) as answer:
                if answer.status_code != 200:
                    self._check(answer.status_code, await answer.aread(), answer.headers.get("retry-after"))
                async for event in _events(answer.aiter_bytes()):
                    if event == b"[DONE]":
                        return
                    yield self._chunk(event)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self._url}/{path}: {_words(error)}") from error

    def _chunk(self, event: bytes) -> dict[str, Any]:
        try:
            chunk = json.loads(event)
        except ValueError as error:
            raise ConnectionError(f"{self._url}: a chunk of the answer is not JSON: {event[:200]!r}") from error
        if not isinstance(chunk, dict):
            raise ConnectionError(f"{self._url}: a chunk of the answer is not an object: {event[:200]!r}")
        if chunk.get("error"):
            raise ConnectionError(f"{self._url}: the server failed in the middle: {_message(chunk)[0]}")
        return chunk

    def _check(self, status: int, content: bytes, retry_after: str | None) -> None:
        if status == 200:
            return
        try:
            said, param = _message(json.loads(content))
        except ValueError:
            said, param = content[:500].decode(errors="replace"), ""
        if status in (429, 503):
            raise Overloaded(self._url, 0, f"{status}: {said}", retry_after_s=_seconds(retry_after))
        if status in (400, 404, 413, 422):
            raise InvalidParameter(param or "request", said.removeprefix(f"{param}: "))
        raise ConnectionError(f"{self._url}: the server answers {status}: {said}")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, from pieces that may end anywhere.

    Only LF and CR LF end a line: JSON texts may have characters such as U+2028, which `str.splitlines` breaks at.
    """
    rest = b""
    data: list[bytes] = []
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise ConnectionError(f"a line of the answer is longer than {_MAX_LINE_BYTES} bytes")
        for line in (each.removesuffix(b"\r") for each in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if rest.startswith(b"data:"):
        data.append(rest[5:].strip())
    if data:
        yield b"\n".join(data)


def _body(request: Request, model: str) -> dict[str, Any]:
    """The body of the call. What has its default is left out, since not every server knows every field."""
    sampling = request.sampling
    body: dict[str, Any] = {
        **request.extra,
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    default = Sampling()
    for field in _SAMPLING:
        if (value := getattr(sampling, field)) != getattr(default, field):
            body[field] = value
    for field in ("min_tokens", "stop", "stop_token_ids", "ignore_eos"):
        if value := getattr(request, field):
            body[field] = value
    if request.guide is not None:
        body["response_format"] = _response_format(request)
    if request.messages is None:
        body["prompt"] = request.token_ids.tolist() if request.text is None else request.text
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        return body
    body["messages"] = request.messages
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    for field in ("tools", "tool_choice", "parallel_tool_calls"):
        if (value := getattr(request, field)) is not None:
            body[field] = value
    return body


def _response_format(request: Request) -> dict[str, Any]:
    guide = request.guide
    assert guide is not None
    if guide.json:
        return {"type": "json_object"}
    if guide.schema is not None:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": guide.schema, "strict": True}}
    raise InvalidParameter(guide.field, "this engine takes only JSON, with or without a schema")


def _output(choice: dict[str, Any], chat: bool) -> Output:
    finish = choice.get("finish_reason")
    if finish not in (None, "stop", "length", "tool_calls", "content_filter"):
        raise ConnectionError(f"the server ended the answer with {finish!r}")
    delta = (choice.get("delta") or {}) if chat else choice
    logprobs = choice.get("logprobs")
    return Output(
        text=delta.get("content" if chat else "text"),
        reasoning=delta.get("reasoning_content") or delta.get("reasoning"),
        tool_calls=delta.get("tool_calls") or None,
        logprobs=(_chat_logprobs(logprobs) if chat else _text_logprobs(logprobs)) if logprobs else None,
        finish_reason=finish,
        stop_reason=choice.get("stop_reason"),
    )


def _chat_logprobs(found: dict[str, Any]) -> list[TokenLogprob] | None:
    return [
        TokenLogprob(
            -1,
            max(each["logprob"], _LOWEST),
            each["token"],
            [Candidate(-1, max(top["logprob"], _LOWEST), top["token"]) for top in each.get("top_logprobs") or ()],
        )
        for each in found.get("content") or ()
    ] or None


def _text_logprobs(found: dict[str, Any]) -> list[TokenLogprob] | None:
    tokens, values = found.get("tokens") or [], found.get("token_logprobs") or []
    tops = found.get("top_logprobs") or [{}] * len(tokens)
    return [
        TokenLogprob(
            -1,
            max(_LOWEST if value is None else value, _LOWEST),
            token,
            [Candidate(-1, max(each, _LOWEST), text) for text, each in sorted((top or {}).items(), key=_by_logprob)],
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    ] or None


def _by_logprob(item: tuple[str, float]) -> float:
    return -item[1]


def _usage(found: dict[str, Any]) -> Usage:
    details = found.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=found.get("prompt_tokens") or 0,
        completion_tokens=found.get("completion_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
    )


def _vector(found: str | list[float]) -> bytes:
    if isinstance(found, str):  # Some servers answer with base64 whatever is asked.
        return base64.b64decode(found, validate=True)
    return struct.pack(f"<{len(found)}f", *found)


def _message(found: object) -> tuple[str, str]:
    """The words of an error body, and the field that it names."""
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        said = error.get("message") or error.get("detail") or error
        return str(said)[:2000], str(error.get("param") or "")
    return str(error)[:2000], ""


def _context_of(listed: dict[str, Any]) -> int:
    """What vLLM and SGLang (`max_model_len`) or llama-server (`meta.n_ctx`) say."""
    meta = listed.get("meta")
    found = listed.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0)
    return found if isinstance(found, int) else 0


def _seconds(retry_after: str | None) -> float:
    try:
        return max(float(retry_after or 0), 0.0)
    except ValueError:  # A date.
        return 0.0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
