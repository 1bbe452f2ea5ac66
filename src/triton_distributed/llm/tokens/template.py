"""Chat templates: messages to the text of a prompt, in a sandbox with limits of time and size."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from triton_distributed.llm.contract.errors import InvalidParameter, LLMError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2 import nodes as jinja_nodes

_log = logging.getLogger(__name__)

_MOST_CHARACTERS = 16 << 20
"""Of a prompt, and of each value that a template makes on the way."""

_MOST_ITEMS = 1 << 20
"""Of each list that a template makes on the way."""

_LARGE = 10_000
"""The clock is read after each step that makes a larger value."""

_TICKS = 32
"""The clock is read once in this many steps of loops."""

_NEVER = float("inf")

_OF_DICT = frozenset(dir(dict))

_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5}|\*)|\{[^{}]*:[^{}]*(?:[0-9]{5}|\{)")
"""A width in a pattern of `%` or `format` that has five digits or comes from an argument."""

_REFUSED = {
    "image_url": "an image",
    "input_image": "an image",
    "image": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "a video",
    "video": "a video",
    "file": "a file",
    "input_file": "a file",
}


class TemplateTimeout(InvalidParameter):
    """A template used up its time."""


class _Limits(threading.local):
    """What a template may still use in this thread.

    The limit is one of CPU time: a busy machine does not end a template. That clock is a system call, so it is first
    read when half of the limit has passed on the wall, and the template then gets the other half.
    """

    half_s = wall = cpu = _NEVER

    def begin(self, limit_s: float) -> None:
        self.half_s = limit_s / 2
        self.wall, self.cpu = time.perf_counter() + self.half_s, _NEVER

    def test(self) -> None:
        if time.perf_counter() < self.wall:
            return
        used = time.thread_time()
        if self.cpu == _NEVER:
            self.cpu = used + self.half_s
        if used > self.cpu:
            raise _TimeUsedUp

    def end(self) -> None:
        self.wall = _NEVER


class _TimeUsedUp(Exception):
    """Ends a template."""


_limits = _Limits()
_next_tick = count().__next__  # One count for all threads: reading a variable of a thread takes longer than the rest.


def _tick() -> None:
    if not _next_tick() % _TICKS:
        _limits.test()


class ChatTemplate:
    """A compiled chat template. It may be rendered from several threads at once.

    Args:
        source: the template, in Jinja.
        values: further variables, e.g. `{"bos_token": "<s>"}`.

    Raises:
        LLMError: the source is not a Jinja template. The error names the line.
        ImportError: Jinja is not installed.
    """

    def __init__(self, source: str, values: Mapping[str, Any] | None = None) -> None:
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("chat templates need Jinja: pip install 'triton-distributed[llm]'") from error
        try:
            self._template, self._iterates_parts, self._takes_texts = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise LLMError(f"the model's chat template is invalid, line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError) as error:
            raise LLMError(f"the model's chat template is invalid: {error}") from error
        self._values = {**self._template.globals, **(values or {})}
        self._noted: set[str] = set()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        limit_s: float = 1.0,
    ) -> str:
        """Make the text of a prompt.

        Args:
            messages: as the OpenAI API defines them. They are not changed.
            tools: as the OpenAI API defines them; None for no tools.
            values: further variables of this request.
            add_generation_prompt: end with the beginning of the assistant's message.
            limit_s: the most CPU time that the template may use.

        Raises:
            TemplateTimeout: it used up that time.
            InvalidParameter: the template refuses the messages, or a message has a form that the model cannot take.
        """
        variables = self._values.copy()
        if values:
            variables.update(values)
        variables["messages"] = [self._prepared(at, message) for at, message in enumerate(messages)]
        variables["tools"] = tools
        variables["add_generation_prompt"] = add_generation_prompt
        template = self._template
        # As `Template.generate`, which copies the globals for each text, one by one.
        context = template.environment.context_class(template.environment, variables, template.name, template.blocks)
        _limits.begin(limit_s)
        try:
            size, pieces = 0, []
            for piece in template.root_render_func(context):
                size += len(piece)
                if size > _MOST_CHARACTERS:
                    text = f"the prompt has more than {_MOST_CHARACTERS:,} characters"
                    raise InvalidParameter("messages", text, "context_length_exceeded")
                pieces.append(piece)
            return "".join(pieces)
        except _TimeUsedUp:
            raise TemplateTimeout("messages", f"the chat template took more than {limit_s:g} s") from None
        except InvalidParameter:
            raise
        except Exception as error:  # A template can fail in any way that an expression can.
            words = str(error) or type(error).__name__
            raise InvalidParameter("messages", f"the model's chat template refuses them: {words}") from error
        finally:
            _limits.end()

    def _prepared(self, at: int, message: Any) -> dict[str, Any]:
        if not isinstance(message, (dict, Mapping)) or not isinstance(message.get("role"), str):
            raise InvalidParameter(f"messages[{at}]", "a message is an object with a role")
        found = dict(message)
        content = found.get("content")
        if isinstance(content, str):
            pass
        elif content is None:
            found["content"] = ""
        elif isinstance(content, list):
            parts = list(self._parts(f"messages[{at}].content", content))
            found["content"] = parts if self._iterates_parts else "\n".join(part["text"] for part in parts)
        else:
            raise InvalidParameter(f"messages[{at}].content", "it is neither a text nor a list of parts")
        if not self._takes_texts and isinstance(text := found["content"], str):
            found["content"] = [{"type": "text", "text": text}] if text else []
        if found.get("tool_calls"):
            found["tool_calls"] = [_with_arguments(each) for each in found["tool_calls"]]
        return found

    def _parts(self, where: str, content: list[Any]) -> Iterator[dict[str, Any]]:
        for at, part in enumerate(content):
            if isinstance(part, str):
                yield {"type": "text", "text": part}
                continue
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str):
                raise InvalidParameter(f"{where}[{at}]", "a part is an object with a type")
            if kind in ("text", "input_text", "output_text", "refusal"):
                text = part.get("refusal" if kind == "refusal" else "text")
                if not isinstance(text, str):
                    raise InvalidParameter(f"{where}[{at}].text", "it is not a text")
                yield {"type": "text", "text": text}
            elif kind in _REFUSED:
                raise InvalidParameter(
                    f"{where}[{at}]", f"the model takes text only, and this part is {_REFUSED[kind]}"
                )
            elif kind not in self._noted and len(self._noted) < 20:
                self._noted.add(kind)
                _log.warning("chat messages have parts of type %.40r, which are left out of the prompt", kind)


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: templates print them as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _compiled(source: str) -> tuple[Template, bool, bool]:
    """A template whose loops, calls and filters test the limits.

    Returns:
        The template; whether it goes through the parts of a content; whether a content may be a text for it.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training. It changes nothing here."""

        tags = {"generation"}  # noqa: RUF012  (so declared by the base)

        def parse(self, parser: Parser) -> list[jinja_nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def getattr(self, obj: Any, attribute: str) -> Any:
            # What the base would return, which first looks for an attribute of the dict and fails: 1 µs.
            if type(obj) is dict and attribute in obj and attribute not in _OF_DICT:
                return obj[attribute]
            return super().getattr(obj, attribute)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= _LARGE:
                return left + right
            _test_operation(operator, left, right)
            return _bounded(super().call_binop(context, operator, left, right))

        def call(self, __context: Any, __obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            _tick()
            _test_arguments(args, kwargs)
            if isinstance(owner := getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None), str):
                _test_format(owner)
            return _bounded(super().call(__context, __obj, *args, **kwargs))

    class Limited(NodeTransformer):  # Jinja finds the methods by the names of its nodes.
        def visit_For(self, node: jinja_nodes.For) -> jinja_nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.iter = _filtered(cast("jinja_nodes.Expr", node.iter), "_each")
            return node

        def visit_Concat(self, node: jinja_nodes.Concat) -> jinja_nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return _filtered(node, "_bounded")

        def visit_Filter(self, node: jinja_nodes.Filter) -> jinja_nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return _filtered(node, "_bounded")

        def visit_AssignBlock(self, node: jinja_nodes.AssignBlock) -> jinja_nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.filter = _filtered(node.filter, "_bounded")
            return node

    def _filtered(node: jinja_nodes.Expr | None, name: str) -> jinja_nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=getattr(node, "lineno", 1))

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals.pop("lipsum", None)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    for name in ("center", "indent", "truncate", "wordwrap", "batch", "slice", "join", "replace", "format"):
        environment.filters[name] = _guarded(environment.filters[name])
    environment.filters.update(tojson=_tojson, _each=_each, _bounded=_bounded)
    tree = environment.parse(source)
    iterates = any(_names_content(cast("jinja_nodes.Expr", each.iter)) for each in tree.find_all(nodes.For))
    tells_apart = any(each.name in ("string", "iterable", "sequence", "mapping") for each in tree.find_all(nodes.Test))
    limited = Limited().visit(tree)
    limited.set_environment(environment)
    code = environment.compile(limited)
    return (
        environment.template_class.from_code(environment, code, environment.make_globals(None)),
        iterates,
        tells_apart or not iterates,
    )


def _names_content(iterated: jinja_nodes.Expr) -> bool:
    """Whether a loop goes through `message['content']`, or a variable that is called so."""
    from jinja2 import nodes

    while isinstance(iterated, nodes.Filter) and iterated.node is not None:
        iterated = iterated.node
    if isinstance(iterated, nodes.Name):
        return iterated.name == "content"
    if isinstance(iterated, nodes.Getattr):
        return iterated.attr == "content"
    return (
        isinstance(iterated, nodes.Getitem)
        and isinstance(iterated.arg, nodes.Const)
        and iterated.arg.value == "content"
    )


def _each(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _tick()
        yield item


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _test_size(value, len(value))
    return value


def _test_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it is made."""
    _tick()
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                _test_size(sequence, len(sequence) * count)
        if isinstance(left, int) and isinstance(right, int):
            _test_size(left, left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            _test_size(left, left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _test_format(left)


def _test_size(value: Any, size: int) -> None:
    """Refuse a size that is too large for a value of the same kind."""
    if size > (_MOST_ITEMS if isinstance(value, list | tuple) else _MOST_CHARACTERS):
        raise ValueError(f"it makes a value of {size} characters or items")
    if size > _LARGE:
        _limits.test()


def _test_format(form: str) -> None:
    """Refuse a pattern of `%` or `format` with a large width."""
    if ("%" in form or "{" in form) and _WIDE.search(form):
        raise ValueError("it formats a text with a large or a variable width")


def _test_arguments(arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse numbers that are sizes of texts, e.g. of `ljust`."""
    for each in (*arguments, *named.values()):
        if isinstance(each, int):
            _test_size(each, each)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its arguments tested."""
    from functools import wraps

    from jinja2.filters import do_format

    @wraps(function)  # It copies what Jinja has noted about the filter's first argument, too.
    def tested(*arguments: Any, **named: Any) -> Any:
        _tick()
        _test_arguments(arguments, named)
        if function is do_format and isinstance(arguments[0], str):
            _test_format(arguments[0])
        return function(*arguments, **named)

    return tested


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    if isinstance(indent, int) and indent > 32:
        raise ValueError("it indents JSON by more than 32 places")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
