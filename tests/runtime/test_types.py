"""Annotations of handlers are held, both ways, and a mismatch names the field."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TYPE_CHECKING, Any
from typing import Annotated as WithNotes

import msgspec
import pydantic
import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.errors import InvalidRequest
from triton_distributed.runtime import Annotated, Context, triton_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nowhere import Nowhere  # type: ignore[import-not-found]


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

    async def handler(request):
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
    async def handler(request):
        yield request

    client = await cluster.connect(handler)
    for value in (1, "a", None, [1, {}]):
        found = await patiently(drained(client.generate(value)))
        assert [each.data() for each in found] == [value]


class Unsendable:
    """A class that no message holds."""


def local_dataclass() -> Any:
    @dataclasses.dataclass
    class Local:
        n: int

    async def handler(request: Local) -> None: ...

    return handler


def local_model() -> Any:
    class Local(pydantic.BaseModel):
        n: int

    async def handler(request: dict[str, Local]) -> None: ...

    return handler


async def only_for_the_type_checker(request: Nowhere) -> None: ...


async def only_for_the_type_checker_inside(request: list[Nowhere | None]) -> None: ...


async def unsendable(request: list[Unsendable]) -> None: ...


async def stream_of_unsendable(request: AsyncIterator[Unsendable]) -> None: ...


async def unresolved_answer(request: int) -> Nowhere: ...


async def unresolved_stream(request: int) -> AsyncGenerator[int]:
    yield request


async def no_stream(request: int) -> int:  # type: ignore[misc]
    yield request


def no_iterator(request: int) -> list[int]:  # type: ignore[misc]
    yield request


class Methods:
    async def method(self, request: Nowhere) -> None: ...

    async def __call__(self, request: Nowhere) -> None: ...


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return await function(*args)

    return wrapper


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (
            local_dataclass(),
            r"`request` is annotated with 'Local', which cannot be resolved .*module level.* or use Any",
        ),
        (local_model(), r"`request` is annotated with 'dict\[str, Local\]', which cannot be resolved"),
        (only_for_the_type_checker, r"`request` is annotated with 'Nowhere', which .*outside `if TYPE_CHECKING`"),
        (only_for_the_type_checker_inside, "`request` is annotated with .*Nowhere.*, which cannot be resolved"),
        (
            unsendable,
            r"`request` is list\[.*Unsendable\], which cannot be checked: a message cannot hold a .* Any for no check",
        ),
        (stream_of_unsendable, "`request` is Unsendable, which cannot be checked"),
        (unresolved_answer, "its return value is annotated with 'Nowhere', which cannot be resolved"),
        (unresolved_stream, r"its return value is annotated with 'AsyncGenerator\[int\]', which cannot be resolved"),
        (no_stream, r"its return value is int, but it is a generator: annotate it with AsyncIterator\[int\]"),
        (no_iterator, r"its return value is list\[int\], but it is a generator: annotate it with Iterator\["),
        (Methods().method, r"Methods\.method: its parameter `request` is annotated with 'Nowhere'"),
        (Methods(), "its parameter `request` is annotated with 'Nowhere'"),
        (functools.partial(only_for_the_type_checker), "its parameter `request` is annotated with 'Nowhere'"),
        (
            wrapped(only_for_the_type_checker),
            "only_for_the_type_checker: its parameter `request` is annotated with 'Nowhere'",
        ),
    ],
)
async def test_an_annotation_that_cannot_be_checked_is_refused(handler: Any, text: str, cluster: Cluster) -> None:
    with pytest.raises(TypeError, match=f"^handler .*{text}"):
        cluster.runtime().endpoint("t.c.e").serve_endpoint(handler)


async def unresolved_context(request: int, context: Nowhere) -> int:
    return request + 1


def closed_over() -> Any:
    @dataclasses.dataclass
    class Local:
        n: int

    async def handler(request: Local) -> int:
        assert isinstance(request, Local)
        return request.n

    return handler


def awaitable(request: int) -> Awaitable[int]:
    return unresolved_context(request, None)


async def annotated_items(request: int) -> AsyncIterator[Annotated]:
    yield Annotated(request, "event")


class Numbers(AsyncIterator[int]):
    def __init__(self) -> None:
        self.left = 2

    async def __anext__(self) -> int:
        self.left -= 1
        if self.left < 0:
            raise StopAsyncIteration
        return self.left


def own_stream(request: int) -> Numbers:
    return Numbers()


def stream_or_number(request: int) -> AsyncIterator[int] | int:
    return Numbers() if request else 5


async def stream_with_notes(request: WithNotes[AsyncIterator[int], "a note"]) -> WithNotes[int, "another"]:
    return sum([each async for each in request])


@pytest.mark.parametrize(
    ("handler", "request_", "answer"),
    [
        (unresolved_context, 1, [2]),
        (closed_over(), {"n": 3}, [3]),
        (awaitable, 1, [2]),
        (annotated_items, 1, [1]),
        (own_stream, 1, [1, 0]),
        (stream_or_number, 1, [1, 0]),
        (stream_or_number, 0, [5]),
    ],
)
async def test_other_annotations_that_can_be_kept(handler: Any, request_: Any, answer: Any, cluster: Cluster) -> None:
    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(request_, annotated=False))) == answer


async def test_notes_in_annotations_change_nothing(cluster: Cluster) -> None:
    client = await cluster.connect(stream_with_notes)

    async def requests() -> AsyncIterator[int]:
        yield 1
        yield 2

    assert await patiently(client.call(requests())) == 3


async def few(request: WithNotes[int, pydantic.Field(lt=3)]) -> WithNotes[int, msgspec.Meta(gt=1)]:
    return request + 1


async def test_constraints_are_kept(cluster: Cluster) -> None:
    client = await cluster.connect(few)
    assert await patiently(client.call(1)) == 2
    with pytest.raises(InvalidRequest, match="less than 3"):
        await patiently(client.call(3))
    with pytest.raises(TypeError, match="response"):
        await patiently(client.call(0))


class Strict(pydantic.BaseModel):
    """A model of which what it writes is not what it reads."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")
    id: uuid.UUID = pydantic.Field(validation_alias="idIn", serialization_alias="idOut")
    sizes: set[int] = set()

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def count(self) -> int:
        return len(self.sizes)


STRICT = Strict(idIn=uuid.UUID(int=1), sizes={3})  # type: ignore[call-arg]
WRITTEN = {"idOut": str(uuid.UUID(int=1)), "sizes": [3], "count": 1}


async def one_strict(request: Strict) -> Strict:
    assert request == STRICT
    return request


async def strict_or_text(request: list[Strict | str]) -> AsyncIterator[Strict | str]:
    for each in request:
        yield each


async def untyped(request):
    return request


async def strict_stream(request: AsyncIterator[Strict]) -> AsyncIterator[Strict]:
    async for each in request:
        assert each == STRICT
        yield each


@pytest.mark.any_loop
async def test_a_model_arrives_at_its_class_and_its_answer_as_plain_values(cluster: Cluster) -> None:
    client = await cluster.connect(one_strict)
    assert await patiently(client.call(STRICT)) == WRITTEN
    await cluster.worker(strict_or_text, "t.c.union")
    client = await cluster.client("t.c.union")
    assert await patiently(drained(client.generate([STRICT, "x"], annotated=False))) == [WRITTEN, "x"]
    await cluster.worker(strict_stream, "t.c.stream")
    client = await cluster.client("t.c.stream")

    async def requests() -> AsyncIterator[Strict]:
        yield STRICT
        yield STRICT

    assert await patiently(drained(client.generate(requests(), annotated=False))) == [WRITTEN, WRITTEN]
    await cluster.worker(untyped, "t.c.untyped")
    client = await cluster.client("t.c.untyped")
    assert await patiently(client.call({"a": [STRICT]})) == {"a": [WRITTEN]}


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


@triton_endpoint(Strict, Strict)
async def strict(request: Any) -> Any:
    assert request == STRICT
    return request.model_dump()


@triton_endpoint(list[Strict | Chat], str)
async def strict_or_chat(request: Any) -> Any:
    return ",".join(type(each).__name__ for each in request)


async def test_a_decorated_function_takes_models_that_only_their_class_reads(cluster: Cluster) -> None:
    client = await cluster.connect(strict)
    json = '{"idIn": "00000000-0000-0000-0000-000000000001", "sizes": [3]}'
    for request in (STRICT, {"idIn": uuid.UUID(int=1), "sizes": {3}}, json, json.encode()):
        found = await patiently(client.call(request))
        assert found == {"id": str(uuid.UUID(int=1)), "sizes": [3], "count": 1}
    with pytest.raises(ValueError, match="Invalid request: .*request: idIn: Field required"):
        await patiently(client.call({"idOut": 5}))
    assert client.stats.outcomes()["invalid"] == 1
    assert (await strict(json))["count"] == 1
    await cluster.worker(strict_or_chat, "t.c.either")
    client = await cluster.client("t.c.either")
    assert await patiently(client.call([STRICT, Chat(prompt="p")])) == "Strict,Chat"
    assert await strict_or_chat([STRICT, {"prompt": "p"}]) == "Strict,Chat"


async def test_a_decorated_function_may_be_decorated_again(cluster: Cluster) -> None:
    seen: list[Any] = []

    @functools.wraps(unary)
    async def outer(request: Any) -> Any:
        seen.append(request)
        return await unary(request)

    client = await cluster.connect(outer)
    assert await patiently(client.call(Prompt("t"))) == "t"
    assert seen == [{"text": "t", "most": 10}]


@pytest.mark.parametrize(("request_model", "response_model"), [("Unresolved", str), (list[Unsendable], str), (str, 3)])
def test_a_model_that_cannot_be_checked_is_refused(request_model: Any, response_model: Any) -> None:
    with pytest.raises(TypeError, match=r"^triton_endpoint: re\w+_model is .*, which cannot be checked: "):
        triton_endpoint(request_model, response_model)


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
    assert await unary('{"text": "t"}') == "t"  # type: ignore[arg-type]
    assert [item async for item in Service().words({"prompt": "p"})] == ["p"]
    with pytest.raises(ValueError, match="Invalid request"):
        await unary("{}")  # type: ignore[arg-type]
    assert plain({"temperature": 2.0}) == 2.0  # type: ignore[arg-type]
    assert unary.__name__ == "unary"
