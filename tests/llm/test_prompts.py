"""Prompts: chat templates in their limits, and tokenizing that the loop does not wait for."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from triton_distributed.errors import Overloaded
from triton_distributed.llm import InvalidParameter, LLMError, ModelCard, unpacked
from triton_distributed.llm.models import prompts as prompts_module
from triton_distributed.llm.models.prompts import Prompt, Prompts, TokenizerThreads
from triton_distributed.llm.tokens.template import ChatTemplate, TemplateTimeout
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer

HI = [{"role": "user", "content": "hi"}]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def rendered(source: str, messages: list[dict[str, Any]] = HI, **options: Any) -> str:
    return ChatTemplate(source).render(messages, **options)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (CHAT, "[user]hi>"),
        ("{{ {'a': '<é>'}|tojson }}", '{"a": "<é>"}'),  # Jinja's own filter escapes for HTML.
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{{ loop.last }}{% endfor %}", "1False"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ '%s-%3d' % ('a', 1) }}{{ '{}'.format(2) }}{{ 'x\ny'|indent(1) }}", "a-  12x\n y"),
        ("{{ strftime_now('%%') }}{{ 'a,b'.split(',')|join('+') }}", "%a+b"),
        ("{{ {'items': 1, 'a': 2}.a }}{{ {'items': 1}.items is callable }}", "2True"),
        ("{% macro f(m) %}({{ m.role }}){% endmacro %}{{ f(messages[0]) }}", "(user)"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)
def test_a_template_is_rendered_as_transformers_renders_it(source, text):
    assert rendered(source) == text


def test_variables_of_the_model_and_of_the_request_reach_the_template():
    template = ChatTemplate("{{ bos }}{{ thinking }}{{ tools[0].name }}{{ add_generation_prompt }}", {"bos": "<s>"})
    text = template.render(HI, tools=[{"name": "f"}], values={"thinking": "yes"}, add_generation_prompt=False)
    assert text == "<s>yesfFalse"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = (range(99999)|list) * 10 %}" + "{% set y = x|map('string')|list %}" * 20,
        "{% set x = namespace() %}{% for a in range(99999) recursive %}{{ loop([]) }}"
        "{% for b in range(99999) %}{% set x.y = a %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(source):
    with pytest.raises(TemplateTimeout, match="took more than 0.05 s"):
        rendered(source, limit_s=0.05)


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = namespace(y='aaaa') %}{% for a in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
        "{% set x = namespace(y='aaaa') %}{% for a in range(99) %}{% set x.y = x.y + x.y %}{% endfor %}",
        "{% set x = namespace(y='aaaa') %}{% for a in range(99) %}{% set y %}{{ x.y }}{{ x.y }}{% endset %}"
        "{% set x.y = y %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 2**(10**9) }}",
        "{{ [1] * 10**7 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'|center(1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ().__class__.__bases__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ none.x.y }}",
    ],
)
def test_a_template_that_goes_too_far_is_refused(source):
    with pytest.raises(InvalidParameter, match="^messages: the model's chat template refuses them: .") as caught:
        rendered(source)
    assert not isinstance(caught.value, TemplateTimeout)


def test_a_template_refuses_messages_in_its_own_words():
    with pytest.raises(InvalidParameter) as caught:
        rendered("{{ raise_exception('Roles must alternate') }}")
    assert caught.value.reason == "the model's chat template refuses them: Roles must alternate"


def test_a_source_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(LLMError, match="chat template is invalid, line 2"):
        ChatTemplate("\n{% if %}")


def test_parts_become_text_unless_the_template_goes_through_them(caplog):
    parts = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "x"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    assert rendered("{{ messages[0].content }}", messages) == "a\nb"
    assert "thinking" in caplog.text
    for loop in ("m.content", "m['content']", "m.content|list"):
        source = "{% for m in messages %}{% for p in " + loop + " %}<{{ p.text }}>{% endfor %}{% endfor %}"
        assert rendered(source, messages) == "<a><b>"
    assert messages[0]["content"] is parts
    assert len(parts) == 3


def test_a_text_becomes_a_part_for_a_template_that_takes_nothing_else():
    loop = "{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}"
    assert rendered(loop) == "<hi>"
    assert rendered(loop, [{"role": "user", "content": None}]) == ""
    assert (
        rendered("{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + loop + "{% endif %}")
        == "hi"
    )


def test_no_content_is_an_empty_text_and_arguments_of_tools_become_objects():
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert rendered("{{ messages[0].content + messages[0].tool_calls[0].function.arguments|tojson }}", messages) == (
        '{"x": 1}'
    )
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (5, "messages[0]", "an object with a role"),
        ({"content": "x"}, "messages[0]", "an object with a role"),
        ({"role": "user", "content": 5}, "messages[0].content", "neither a text nor a list"),
        ({"role": "user", "content": [3]}, "messages[0].content[0]", "an object with a type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "not a text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]", "this part is an image"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]", "this part is audio"),
    ],
)
def test_a_message_of_another_form_is_refused_by_name(message, param, words):
    with pytest.raises(InvalidParameter, match=words) as caught:
        rendered(CHAT, [message])
    assert caught.value.param == param


@pytest.fixture
def threads():
    found = TokenizerThreads()
    yield found
    found.close()


class Named(ByteTokenizer):
    """Notes the threads that it encodes in."""

    vocabulary = 300

    def __init__(self) -> None:
        self.threads: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        self.threads.append(threading.current_thread().name)
        return super().encode(text, add_special_tokens=add_special_tokens)


def prompts(threads: TokenizerThreads, template: str | None = CHAT, **card: Any) -> tuple[Prompts, Named]:
    tokenizer = Named()
    made = None if template is None else ChatTemplate(template)
    return Prompts(ModelCard(name="m", **card), tokenizer, made, threads), tokenizer


async def test_a_prompt_has_its_ids_and_their_number(threads):
    made, _ = prompts(threads)
    assert await made.chat(HI) == Prompt(ids=ByteTokenizer().encode("[user]hi>", add_special_tokens=False), tokens=9)
    assert list(unpacked((await made.text("ab")).ids)) == [97, 98]
    assert made.ids([1, 299]) == Prompt(ids=b"\1\0\0\0\x2b\1\0\0", tokens=2)


async def test_short_prompts_are_made_on_the_loop_and_long_ones_in_threads(threads):
    made, tokenizer = prompts(threads)
    await made.text("x" * 3_999)
    await made.chat(HI)
    assert set(tokenizer.threads) == {threading.current_thread().name}
    tokenizer.threads.clear()
    await made.text("x" * 4_000)
    await made.chat([{"role": "user", "content": "x" * 4_000}])
    assert all(each.startswith("trd-tokenizer") for each in tokenizer.threads)
    assert len(tokenizer.threads) == 2


async def test_many_short_texts_do_not_keep_the_loop(threads):
    made, tokenizer = prompts(threads)
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            passes += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for _ in range(50):
        assert (await made.text("x" * 3_000)).tokens == 3_000
    assert passes > 5
    counting.cancel()
    here = threading.current_thread().name
    assert 25 < tokenizer.threads.count(here) < 50


async def test_a_template_that_makes_a_short_chat_long_is_tokenized_in_a_thread(threads):
    made, tokenizer = prompts(threads, "{{ 'x' * 4000 }}")
    assert (await made.chat(HI)).tokens == 4_000
    assert [each.startswith("trd-tokenizer") for each in tokenizer.threads] == [True]


async def test_threads_that_are_closed_do_not_start_again():
    threads = TokenizerThreads()
    assert await threads.run(lambda: 1) == 1
    threads.close()
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(lambda: 1)


async def test_a_slow_template_leaves_the_loop(threads):
    slow = "{% for a in range(99999) %}{% endfor %}{% for a in range(99999) %}{% endfor %}x"
    made, tokenizer = prompts(threads, slow)
    for _ in range(4):
        assert (await made.chat(HI)).tokens == 1
    assert all(each.startswith("trd-tokenizer") for each in tokenizer.threads)


async def test_a_template_that_was_paused_once_stays_on_the_loop(threads, monkeypatch):
    made, tokenizer = prompts(threads)
    render, pauses = ChatTemplate.render, [1]

    def paused(self: ChatTemplate, messages: Any, *, limit_s: float, **options: Any) -> str:
        if limit_s < 1 and pauses:
            raise TemplateTimeout("messages", f"the garbage collector ran, pass {pauses.pop()}")
        return render(self, messages, limit_s=limit_s, **options)

    monkeypatch.setattr(ChatTemplate, "render", paused)
    for _ in range(3):
        await made.chat(HI)
    assert tokenizer.threads[0].startswith("trd-tokenizer")
    assert tokenizer.threads[1:] == ["MainThread"] * 2


async def test_work_of_a_caller_that_left_does_not_begin(threads):
    gate, begun = threading.Event(), []
    busy = [asyncio.create_task(threads.run(gate.wait)) for _ in range(4)]
    left = asyncio.create_task(threads.run(lambda: begun.append(1)))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*busy)
    await threads.run(lambda: None)
    assert not begun


async def test_a_prompt_counts_until_its_thread_is_done_with_it(monkeypatch):
    monkeypatch.setattr(prompts_module, "_threads", lambda: 1)
    threads, gate = TokenizerThreads(longest_wait_s=1), threading.Event()
    threads._pace_s = 2
    running = threading.Event()

    def make() -> None:
        running.set()
        gate.wait()

    left = asyncio.create_task(threads.prompt("m", make))
    await asyncio.to_thread(running.wait, 30)
    left.cancel()
    await asyncio.wait([left])
    with pytest.raises(Overloaded, match="wait for a thread: 1"):
        await threads.prompt("m", lambda: None)
    gate.set()
    await threads.run(lambda: None)
    assert await threads.prompt("m", lambda: 5) == 5
    threads.close()


async def test_prompts_that_the_model_cannot_take_are_refused_by_field(threads):
    made, _ = prompts(threads, context_tokens=8)
    with pytest.raises(InvalidParameter, match="9 tokens, and the model's context of 8") as caught:
        await made.chat(HI)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(InvalidParameter) as caught:
        await made.text("x" * 8)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    assert (await made.text("x" * 7)).tokens == 7
    wrong: list[tuple[list[Any], str]] = [
        ([300], "300 is not in"),
        ([-1], "whole"),
        ([2**32], "whole"),
        (["a"], "whole"),
        ([], "no tokens"),
    ]
    for ids, words in wrong:
        with pytest.raises(InvalidParameter, match=words):
            made.ids(ids)
    with pytest.raises(InvalidParameter, match="8 tokens, and the model's context of 8"):
        made.ids(["not looked at"] * 8)  # type: ignore[list-item]
    with pytest.raises(InvalidParameter, match="half of a surrogate pair"):
        await made.text("a\ud800")
    with pytest.raises(InvalidParameter, match="there is no message"):
        await made.chat([])


async def test_models_without_a_template_or_a_tokenizer(threads):
    made, _ = prompts(threads, None)
    with pytest.raises(InvalidParameter, match="no chat template"):
        await made.chat(HI)
    for template, expected in ((None, Prompt(messages=HI)), (CHAT, Prompt(text="[user]hi>"))):
        made = await Prompts.load(ModelCard(name="m"), None, template, threads)
        assert await made.chat(HI) == expected
        assert await made.text("a") == Prompt(text="a")
        with pytest.raises(InvalidParameter, match="takes text"):
            made.ids([1])


async def test_loading_says_what_is_wrong(threads):
    with pytest.raises(LLMError, match="not a tokenizer.json"):
        await Prompts.load(ModelCard(name="m"), b"x", None, threads)
    made = await Prompts.load(ModelCard(name="m", template_values={"b": "<"}), "bytes", "{{ b }}", threads)
    assert (await made.chat(HI)).tokens == 1
