"""The OpenAI API as an ASGI app: routes, and what each of them does with the models."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

import msgspec

from triton_distributed.errors import ConnectionFailed, Draining, NoInstances, Paused, RemoteError
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.http import answers
from triton_distributed.llm.http.bodies import (
    MOST_ANSWERS,
    MOST_INPUTS,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    refuse,
)
from triton_distributed.llm.http.chunks import ChatChunks, Chunks, CompletionChunks, failed
from triton_distributed.llm.http.errors import Ending, Refused, shown
from triton_distributed.llm.http.exchange import MAX_HELD_BYTES, ClientLeft, EventStream, Exchange, Heartbeat, Held
from triton_distributed.llm.http.explain import read_wishes, route_header, told
from triton_distributed.llm.http.facts import GONE, KEY, Facts
from triton_distributed.llm.http.options import base_request, chat_template_values, with_prompt
from triton_distributed.llm.http.overasgi import AsgiExchange, Presences, Receive, Scope, Send
from triton_distributed.llm.http.pieces import new_id, to_json, usage_of
from triton_distributed.llm.http.several import Merged
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.models import Models
from triton_distributed.llm.models.prompts import Prompt
from triton_distributed.llm.models.served import ServedModel

Asked = tuple[str, Callable[[ServedModel], Awaitable[None]]]
"""What a request asks: the name of a model, and what answers with it."""

HEARTBEAT_S = 15.0
"""Proxies close a connection that is silent for a minute or so (nginx: 60 s)."""

JOINED_BYTES = 32 * 1024
"""Chunks that have arrived together are sent together, up to about this size."""

MAX_BODY_BYTES = 32 * 1024 * 1024
"""A prompt of a million tokens has about 5 MB; lists of token ids need twice that."""

_read_chat = msgspec.json.Decoder(ChatBody).decode
_read_completion = msgspec.json.Decoder(CompletionBody).decode
_read_embedding = msgspec.json.Decoder(EmbeddingBody).decode


def openai_app(
    models: Models,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_held_bytes: int = MAX_HELD_BYTES,
) -> OpenAIApp:
    """Return the OpenAI API of the models that are served, as an ASGI app.

    It runs alone under an ASGI server, or mounted into an app of Starlette or FastAPI. It answers
    `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/v1/models` and `/v1/models/{id}`.

    Args:
        models: which models there are. It is open while the app runs.
        heartbeat_s: seconds without an event after which a stream sends a comment.
        max_body_bytes: the largest body of a request.
        max_held_bytes: memory of the requests that run, by an estimate: four times their bodies, and 130 bytes for
            each value of a body above 4 KiB. What is above it is refused.
    """
    return OpenAIApp(models, heartbeat_s, max_body_bytes, max_held_bytes)


class OpenAIApp:
    """See `openai_app`.

    Attributes:
        held: the memory of the requests that run.
    """

    def __init__(self, models: Models, heartbeat_s: float, max_body_bytes: int, max_held_bytes: int) -> None:
        self._models = models
        self._heartbeat = Heartbeat(heartbeat_s)
        self._max_body_bytes, self.held = max_body_bytes, Held(max_held_bytes)
        self._presences = Presences()
        self._asked: dict[str, Callable[[Exchange, bytes], Asked]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/v1/embeddings": self._embeddings,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        if scope["type"] != "http":
            await _not_http(scope, receive, send)
            return
        await self.answer(AsgiExchange(scope, receive, send, scope.get(KEY) or Facts(), self._presences))

    async def answer(self, exchange: Exchange) -> None:
        """Answer a request."""
        facts = exchange.facts
        failure: BaseException | None = None
        try:
            try:
                await self._handle(exchange)
            except (Exception, asyncio.CancelledError) as error:
                failure = error
            if exchange.ended() or isinstance(failure, ClientLeft):
                facts.error = GONE
            elif isinstance(failure, Exception):
                found = shown(failure)
                facts.error = found.code or found.type
                await exchange.answer(found.status, found.json, found.headers)
            elif failure is not None:
                raise failure
        finally:
            failure = None  # Else its traceback and this frame would hold each other, and the body with them.
            self.held.release(facts)

    async def _handle(self, exchange: Exchange) -> None:
        """Answer a request. If a model's last worker refuses because it leaves, its successor of that name answers.

        Raises:
            ModelNotFound: there is no such model, or it has left and has no successor.
        """
        path, facts = exchange.path, exchange.facts
        asked = self._asked.get(path)
        if asked is None:
            await self._shown(exchange, path)
            return
        _check_method(exchange, "POST")
        name, answer = asked(exchange, await exchange.body(self._max_body_bytes, self.held))
        model = self._model(name, facts)
        while True:
            try:
                await answer(model)
                return
            except (Draining, Paused, NoInstances, ConnectionFailed) as error:
                refused = error
            try:
                if isinstance(refused, RemoteError) or not await self._models.has_left(model):
                    raise refused
            finally:
                del refused
            model = self._model(name, facts)  # Without a successor it is not found, as for the next request.

    async def _shown(self, exchange: Exchange, path: str) -> None:
        """Answer with the models, or with one of them."""
        if path == "/v1/models":
            _check_method(exchange, "GET")
            data = [_described(name, model) for model in self._models.list() for name in model.card.names]
            await exchange.answer(200, to_json({"object": "list", "data": data}))
            return
        if not path.startswith("/v1/models/"):
            raise Refused(404, f"There is no path {path}.", "unknown_url")
        _check_method(exchange, "GET")
        name = path.removeprefix("/v1/models/")
        if "%" in name:  # The server decodes once; some clients encode the slashes of an id.
            name = unquote(name)
        await exchange.answer(200, to_json(_described(name, self._model(name, exchange.facts))))

    def _chat(self, exchange: Exchange, raw: bytes) -> Asked:
        body = _read_chat(raw)
        return body.model, partial(self._answer_chat, exchange, raw, body)

    async def _answer_chat(self, exchange: Exchange, raw: bytes, body: ChatBody, model: ServedModel) -> None:
        card = model.card
        if not card.chat:
            raise InvalidParameter("model", f"{body.model} has no chat template: use /v1/completions")
        for number, message in enumerate(body.messages):
            if not isinstance(message.get("role"), str):
                raise InvalidParameter(f"messages[{number}].role", "is missing, or is not a text", "invalid_value")
        request = base_request(body, card, raw)
        exchange.watch()
        prompt = await model.prompts.chat(
            body.messages,
            tools=request.tools,
            template_values=chat_template_values(body),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        await self._generate(exchange, model, body, with_prompt(request, body, card, prompt), [prompt])

    def _completions(self, exchange: Exchange, raw: bytes) -> Asked:
        body = _read_completion(raw)
        return body.model, partial(self._answer_completion, exchange, raw, body)

    async def _answer_completion(
        self, exchange: Exchange, raw: bytes, body: CompletionBody, model: ServedModel
    ) -> None:
        card = model.card
        if not card.completions:
            raise InvalidParameter("model", f"{body.model} does not answer completions")
        request = base_request(body, card, raw)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidParameter("best_of", "must equal n: no answers are left out", "unsupported_parameter")
        if body.echo and body.logprobs is not None:
            raise InvalidParameter("echo", "is not supported with logprobs", "unsupported_parameter")
        inputs = _inputs("prompt", body.prompt)
        if len(inputs) * (body.n or 1) > MOST_ANSWERS:
            raise InvalidParameter(
                "prompt", f"{len(inputs)} prompts with n={body.n or 1} need more than {MOST_ANSWERS} answers"
            )
        exchange.watch()
        prompts = await _prompts(model, "prompt", inputs)
        requests = [with_prompt(msgspec.structs.replace(request), body, card, prompt) for prompt in prompts]
        echoes = None
        if body.echo:
            if not isinstance(inputs[0], str):
                raise InvalidParameter("echo", "is supported for a prompt of text only", "unsupported_parameter")
            echoes = [str(each) for each in inputs for _ in range(body.n or 1)]
        await self._generate(exchange, model, body, requests[0], prompts, echoes, requests)

    async def _generate(
        self,
        exchange: Exchange,
        model: ServedModel,
        body: ChatBody | CompletionBody,
        request: Request,
        prompts: list[Prompt],
        echoes: list[str] | None = None,
        requests: list[Request] | None = None,
    ) -> None:
        n = body.n or 1
        count = n * len(prompts)
        source: Answer | Merged
        wishes = read_wishes(exchange.head)
        session, explain = wishes.session_of(body), bool(wishes.explain)
        if wishes.explain == "only":
            decision = model.explain(prompts[0], request, session=session)
            if decision is None:
                raise Refused(404, "No router chooses the worker of this model.", "no_router")
            await exchange.answer(200, told(decision, prompts[0].tokens))
            return
        if count == 1:
            source = model.answer(prompts[0], request, session=session, explain=explain)
        else:
            source = Merged(
                [
                    model.answer(prompt, _nth(each, number), session=session, explain=explain)
                    for prompt, each in zip(prompts, requests or [request], strict=True)
                    for number in range(n)
                ]
            )
        failure: BaseException | None = None
        try:
            if body.stream:
                exchange.facts.stream = True
                chunks = _chunks(body, prompts, count, echoes)
                await self._stream(exchange, source, chunks, count, n, explain)
            else:
                await self._whole(exchange, source, body, prompts, count, echoes, explain)
        except BaseException as error:
            failure = error
        await source.aclose()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # Else its traceback and this frame would hold each other, and the body with them.

    async def _stream(
        self, exchange: Exchange, source: Answer | Merged, chunks: Chunks, count: int, n: int, explain: bool
    ) -> None:
        events, facts = EventStream(exchange, self._heartbeat), exchange.facts
        usages: list[tuple[int, Usage]] = []
        merged = source if isinstance(source, Merged) else None
        ready, ended = chunks.opening(), 0
        failure: BaseException | None = None
        try:
            async for first in source:
                delta: Delta | None = first
                if explain:
                    facts.headers, explain = facts.headers + route_header(source), False
                while delta is not None:  # What has arrived together is sent together.
                    index = 0 if merged is None else merged.index
                    if delta.token_ids:
                        facts.arrived(len(delta.token_ids))
                    ready += chunks.delta(index, delta)
                    if delta.usage is not None:
                        usages.append((index // n, delta.usage))
                    if delta.finish_reason is not None:
                        ended += 1
                        if ended == count:
                            break
                    delta = await source.more() if len(ready) < JOINED_BYTES else None
                if ended == count:
                    facts.usage = usage_of(usages)
                    await events.write(ready + chunks.closing(facts.usage), more=False)
                    break
                if ready:
                    await events.write(ready)
                    ready = b""
            else:
                raise RuntimeError("an answer ended without a reason")
        except BaseException as error:
            failure = error
        cancelled = isinstance(failure, asyncio.CancelledError)  # The server ends, unless the client has left.
        if (
            failure is not None
            and facts.begun
            and facts.error != GONE
            and (cancelled or isinstance(failure, Exception))
        ):
            found = shown(Ending() if cancelled else failure)
            facts.error = found.code or found.type
            if not cancelled:
                failure = None
            try:
                await events.write(ready + failed(found.json), more=False)
            except BaseException as error:  # It waits for a client that reads slowly, and may leave.
                failure = error
        await events.close()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # Else its traceback and this frame would hold each other, and the body with them.

    async def _whole(
        self,
        exchange: Exchange,
        source: Answer | Merged,
        body: ChatBody | CompletionBody,
        prompts: list[Prompt],
        count: int,
        echoes: list[str] | None,
        explain: bool,
    ) -> None:
        chat, n, facts = isinstance(body, ChatBody), count // len(prompts), exchange.facts
        logprobs, token_ids = _with_logprobs(body), bool(body.return_token_ids)
        folded = [
            answers.Folded(logprobs, token_ids, echoes[index] if echoes is not None else "") for index in range(count)
        ]
        usages: list[tuple[int, Usage]] = []
        merged, ended = source if isinstance(source, Merged) else None, 0
        async for delta in source:
            index = 0 if merged is None else merged.index
            if delta.token_ids:
                facts.arrived(len(delta.token_ids))
            folded[index].add(delta)
            if delta.usage is not None:
                usages.append((index // n, delta.usage))
            if delta.finish_reason is not None:
                ended += 1
                if ended == count:
                    break
        else:
            raise RuntimeError("an answer ended without a reason")
        choices = [each.chat(index) if chat else each.completion(index) for index, each in enumerate(folded)]
        facts.usage = usage_of(usages)
        head = _head(body, b"chat.completion" if chat else b"text_completion")
        if token_ids:
            head += _prompt_ids(body, prompts)
        headers = route_header(source) if explain else ()
        await exchange.answer(200, answers.body(head, choices, facts.usage), headers)

    def _embeddings(self, exchange: Exchange, raw: bytes) -> Asked:
        body = _read_embedding(raw)
        return body.model, partial(self._answer_embedding, exchange, body)

    async def _answer_embedding(self, exchange: Exchange, body: EmbeddingBody, model: ServedModel) -> None:
        card = model.card
        if not card.embeddings:
            raise InvalidParameter("model", f"{body.model} makes no embeddings: its worker was started without them")
        if read_wishes(exchange.head).explain == "only":
            raise InvalidParameter("x-trd-explain", "no router chooses the worker of embeddings", "no_router")
        refuse(body, card)
        if body.dimensions is not None and card.dimensions and body.dimensions > card.dimensions:
            raise InvalidParameter("dimensions", f"{body.dimensions} is above {card.dimensions}, those of the model")
        inputs = _inputs("input", body.input)
        if len(inputs) > MOST_INPUTS:
            raise InvalidParameter("input", f"has {len(inputs)} inputs, more than {MOST_INPUTS}", "invalid_value")
        exchange.watch()
        prompts = await _prompts(model, "input", inputs)
        found = await model.embed(prompts, dimensions=body.dimensions, model=body.model)
        exchange.facts.usage = Usage(prompt_tokens=found.prompt_tokens)
        write = _base64 if body.encoding_format == "base64" else _floats
        data = [
            b'{"object":"embedding","index":%d,"embedding":%s}' % (index, write(each))
            for index, each in enumerate(found.vectors)
        ]
        answer = b'{"object":"list","data":[%s],"model":%s,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
            b",".join(data),
            to_json(body.model),
            found.prompt_tokens,
            found.prompt_tokens,
        )
        await exchange.answer(200, answer)

    def _model(self, name: str, facts: Facts) -> ServedModel:
        found: ServedModel = self._models.get(name)
        facts.model = name  # Only a known one, since it becomes a label of metrics.
        return found


def _check_method(exchange: Exchange, method: str) -> None:
    if exchange.method != method:
        text = f"{exchange.path} takes only {method}."
        raise Refused(405, text, "method_not_allowed", (b"allow", method.encode()))


def _described(name: str, model: ServedModel) -> dict[str, Any]:
    card = model.card
    found = {"id": name, "object": "model", "created": model.created, "owned_by": card.owned_by}
    return {**found, "parent": card.name} if name in card.adapters else found  # As vLLM describes a LoRA adapter.


def _inputs(field: str, given: str | list[Any]) -> list[str] | list[list[int]]:
    """Return one or several texts, or one or several lists of token ids, as a list of them."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidParameter(field, "is empty", "invalid_value")
    if type(given[0]) is int:
        return [given]  # `Prompts.ids` tests all of them, if they are not too many.
    if len(set(map(type, given))) > 1:
        raise InvalidParameter(field, "has texts, token ids or lists of token ids, but not mixed", "invalid_value")
    if [] in given:
        raise InvalidParameter(f"{field}[{given.index([])}]", "is empty", "invalid_value")
    return given


async def _prompts(model: ServedModel, field: str, inputs: list[str] | list[list[int]]) -> list[Prompt]:
    make = model.prompts
    return [
        await make.text(each, param=field) if isinstance(each, str) else make.ids(each, param=field) for each in inputs
    ]


def _nth(request: Request, number: int) -> Request:
    """Return the request for one of several answers. Each has a seed of its own."""
    seed = request.sampling.seed
    if number == 0 or seed is None:
        return request
    seed = (seed + number + 2**63) % 2**64 - 2**63  # In 64 bits with a sign.
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, seed=seed))


def _with_logprobs(body: ChatBody | CompletionBody) -> bool:
    return body.logprobs is not None and body.logprobs is not False


def _head(body: ChatBody | CompletionBody, kind: bytes) -> bytes:
    return b'{"id":"%s","object":"%s","created":%d,"model":%s,' % (
        new_id(b"chatcmpl" if isinstance(body, ChatBody) else b"cmpl"),
        kind,
        time.time(),
        to_json(body.model),
    )


def _prompt_ids(body: ChatBody | CompletionBody, prompts: list[Prompt]) -> bytes:
    """Return the field of the prompt's token ids, which only an answer to one prompt has."""
    if len(prompts) != 1 or not prompts[0].ids:
        return b""
    return b'"prompt_token_ids":%s,' % to_json(Request(prompt=prompts[0].ids).token_ids.tolist())


def _chunks(body: ChatBody | CompletionBody, prompts: list[Prompt], count: int, echoes: list[str] | None) -> Chunks:
    options: dict[str, Any] = {
        "choices": count,
        "logprobs": _with_logprobs(body),
        "token_ids": bool(body.return_token_ids),
    }
    if (wanted := body.stream_options) is not None:
        options["include_usage"] = bool(wanted.include_usage)
        options["running_usage"] = bool(wanted.include_usage and wanted.continuous_usage_stats)
        options["prompt_tokens"] = sum(each.tokens for each in prompts)
    if isinstance(body, ChatBody):
        return ChatChunks(_head(body, b"chat.completion.chunk"), **options)
    return CompletionChunks(_head(body, b"text_completion"), echoes=echoes, **options)


def _base64(vector: bytes) -> bytes:
    return b'"%s"' % base64.b64encode(vector)


def _floats(vector: bytes) -> bytes:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return to_json(numbers.tolist())


async def _not_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is not HTTP: take part in the server's lifespan, and refuse a WebSocket."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
