"""Annotations of handlers are held, both ways, and a mismatch names the field."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pydantic
import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.errors import InvalidRequest
from triton_distributed.runtime import Annotated, Context, triton_endpoint


@dataclasses.dataclass
class Prompt:
    text: str
    most: int = 10


class Options(msgspec.Struct):
    temperature: float
    stop: list[str] = []


class Chat(pydantic.BaseModel):
    prompt: str
    tokens: list[int] = []


@dataclasses.dataclass
class Whole:
    prompt: Prompt
    options: Options


@pytest.mark.any_loop
@pytest.mark.parametrize(
    ("hint", "good", "bad", "field"),
    [
        (int, 5, "five", "request"),
        (str, "text", 5, "request"),
        (list[int], [1, 2], [1, "two"], r"\[1\]"),
        (dict[str, int], {"a": 1}, {"a": "x"}, "request"),
        (int | None, None, "x", "request"),
        (Prompt, {"text": "t", "most": 3}, {"text": "t", "most": "x"}, "most"),
        (Prompt, {"text": "t"}, {"most": 3}, "text"),
        (Options, {"temperature": 0.5}, {"temperature": "hot"}, "temperature"),
        (Chat, {"prompt": "p", "tokens": [1]}, {"prompt": "p", "tokens": ["x"]}, r"tokens\.0"),
        (Whole, {"prompt": {"text": "t"}, "options": {"temperature": 1}}, {"prompt": {}, "options": {}}, "prompt"),
    ],
)
async def test_requests_are_checked(hint: Any, good: Any, bad: Any, field: str, cluster: Cluster) -> None:
    seen: list[Any] = []

    async def handler(request):  # type: ignore[no-untyped-def]
        seen.append(request)
        return "ok"

    handler.__annotations__["request"] = hint
    client = await cluster.connect(handler)
    assert await patiently(client.call(good)) == "ok"
    if isinstance(hint, type):
        assert isinstance(seen[0], hint)
    with pytest.raises(InvalidRequest, match=field) as caught:
        await patiently(client.call(bad))
    assert str(caught.value).startswith("Invalid request: ")
    assert isinstance(caught.value, ValueError)
    assert len(seen) == 1
    assert client.stats.outcomes()["invalid"] == 1


async def test_objects_of_the_handlers_own_type_arrive_as_them(cluster: Cluster) -> None:
    async def handler(request: Whole, context: Context) -> Prompt:
        assert isinstance(request.prompt, Prompt)
        assert isinstance(request.options, Options)
        return request.prompt

    client = await cluster.connect(handler)
    assert await patiently(client.call(Whole(Prompt("p"), Options(0.5)))) == {"text": "p", "most": 10}


async def int_stream(request: Any) -> AsyncIterator[int]:
    yield 1
    yield request


async def one_prompt(request: Any) -> Prompt:
    return request  # type: ignore[no-any-return]


def int_generator(request: Any) -> Iterator[int]:
    yield 1
    yield request


def int_function(request: Any) -> int:
    return request  # type: ignore[no-any-return]


@pytest.mark.parametrize("handler", [int_stream, int_generator, int_function])
async def test_items_are_checked(handler: Any, cluster: Cluster) -> None:
    client = await cluster.connect(handler)
    assert (await patiently(drained(client.generate(5, annotated=False))))[-1] == 5
    with pytest.raises(TypeError, match="response"):
        await patiently(drained(client.generate("text")))


async def test_a_bad_field_of_a_response_is_named(cluster: Cluster) -> None:
    client = await cluster.connect(one_prompt)
    assert await patiently(client.call({"text": "t"})) == {"text": "t"}
    with pytest.raises(TypeError, match="most"):
        await patiently(client.call({"text": "t", "most": "x"}))


async def test_an_annotated_item_passes_a_typed_handler(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        yield Annotated(2, "event")  # type: ignore[misc]

    client = await cluster.connect(handler)
    items = await patiently(drained(client.generate(1)))
    assert [(each.data(), each.event()) for each in items] == [(1, None), (2, "event")]


async def test_without_annotations_everything_passes(cluster: Cluster) -> None:
    async def handler(request):  # type: ignore[no-untyped-def]
        yield request

    client = await cluster.connect(handler)
    for value in (1, "a", None, [1, {}]):
        found = await patiently(drained(client.generate(value)))
        assert [each.data() for each in found] == [value]


async def test_an_annotation_that_cannot_be_resolved_is_not_held(cluster: Cluster) -> None:
    async def handler(request: Nowhere) -> AsyncIterator[Nowhere]:  # type: ignore[name-defined]  # noqa: F821
        yield request

    client = await cluster.connect(handler)
    assert len(await patiently(drained(client.generate(1)))) == 1


# --- triton_endpoint -------------------------------------------------------------------------------------------------


class Answer(pydantic.BaseModel):
    text: str


class Service:
    @triton_endpoint(Chat, Answer)
    async def generate(self, request: Any) -> AsyncIterator[Any]:
        assert isinstance(request, Chat)
        yield {"text": request.prompt}
        yield Answer(text="end").model_dump()

    @triton_endpoint(Chat, str)
    async def words(self, request: Any) -> AsyncIterator[Any]:
        yield request.prompt
        if request.tokens:
            yield 5


@triton_endpoint(Prompt, str)
async def unary(request: Prompt) -> str:
    return request.text


@triton_endpoint(Options, float)
def plain(request: Options) -> float:
    return request.temperature


@pytest.mark.any_loop
async def test_a_decorated_method_takes_json_text_and_dicts(cluster: Cluster) -> None:
    client = await cluster.connect(Service().generate)
    for request in (Chat(prompt="p").model_dump_json(), {"prompt": "p"}, Chat(prompt="p"), b'{"prompt": "p"}'):
        found = await patiently(drained(client.generate(request, annotated=False)))
        assert found == [{"text": "p"}, {"text": "end"}]


async def test_other_kinds_of_handlers_and_models(cluster: Cluster) -> None:
    await cluster.worker(unary, "t.c.unary")
    await cluster.worker(plain, "t.c.plain")
    assert await patiently((await cluster.client("t.c.unary")).call('{"text": "t"}')) == "t"
    assert await patiently((await cluster.client("t.c.plain")).call({"temperature": 1.5})) == 1.5


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"prompt": 5}, "prompt"), ({}, "prompt"), ("not json", "Invalid request"), ("[1]", "Invalid request")],
)
async def test_a_bad_request_is_a_value_error_that_says_so(bad: Any, words: str, cluster: Cluster) -> None:
    client = await cluster.connect(Service().generate)
    with pytest.raises(ValueError, match=words) as caught:
        await patiently(drained(client.generate(bad)))
    assert "Invalid request" in str(caught.value)


async def test_a_bad_answer_is_told(cluster: Cluster) -> None:
    client = await cluster.connect(Service().words)
    assert await patiently(drained(client.generate({"prompt": "p"}, annotated=False))) == ["p"]
    with pytest.raises(TypeError):
        await patiently(drained(client.generate({"prompt": "p", "tokens": [1]})))


async def test_a_decorated_function_can_be_called_directly() -> None:
    assert await unary('{"text": "t"}') == "t"
    assert [item async for item in Service().words({"prompt": "p"})] == ["p"]
    with pytest.raises(ValueError, match="Invalid request"):
        await unary("{}")
    assert plain({"temperature": 2.0}) == 2.0
    assert unary.__name__ == "unary"
