"""The sandbox that renders a model's chat template, which is a stranger's program.

It renders as transformers does: trimmed blocks, loop controls, ``raise_exception``,
``strftime_now``, ``tojson`` without HTML escapes, and ``{% generation %}`` markers. The
sandbox bounds steps and sizes. The process around it (model.template_process) bounds time and
memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinFunctionType, CodeType
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_format, do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.template_values import (
    MAX_PROMPT_CHARS,
    FieldsIgnored,
    TemplateFailed,
    ignored_fields,
    one_line,
)

MAX_TEMPLATE_STEPS = 200_000
"""Loop rounds and calls of one rendering. Real templates need a few dozen per message."""


class Sandbox:
    """A compiled template."""

    def __init__(self, text: str) -> None:
        """Compile the template. Raises TemplateFailed if it is invalid."""
        self._environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationMarker],
        )
        self._environment.filters = {
            name: function
            for name, function in self._environment.filters.items()
            if name not in _UNBOUNDED_FILTERS
        } | _BOUNDED_FILTERS
        del self._environment.globals["lipsum"]
        self._environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            self._code: CodeType = self._environment.compile(text, filename="chat template")
            self.variables = meta.find_undeclared_variables(self._environment.parse(text))
            """The variables that the template takes from outside."""
        except (TemplateError, *_COMPILE_ERRORS) as error:
            raise TemplateFailed(one_line(error)) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """Render with these variables. Raises TemplateFailed with the template's own message.

        Raises FieldsIgnored if the template ignores fields of watched messages.
        """
        # Each rendering has an overlay, because that carries the count of steps.
        environment = self._environment.overlay()
        environment.steps = 0
        template = Template.from_code(environment, self._code, dict(environment.globals))
        pieces: list[str] = []
        size_chars = 0
        try:
            for piece in template.generate(dict(values)):
                size_chars += len(piece)
                if size_chars > MAX_PROMPT_CHARS:
                    raise SecurityError(f"produces more than {MAX_PROMPT_CHARS} characters")
                pieces.append(piece)
        except _RENDER_ERRORS as error:
            raise TemplateFailed(one_line(error)) from error
        ignored = ignored_fields(values.get("messages") or ())
        if ignored:
            raise FieldsIgnored(ignored)
        return "".join(pieces)


# The errors that expressions of a template raise, besides jinja's own.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_COMPILE_ERRORS = (ArithmeticError, RecursionError, TypeError, ValueError)
# Their results may be far larger than their arguments, and chat templates do not need them.
_UNBOUNDED_FILTERS = frozenset(
    ("batch", "center", "filesizeformat", "slice", "urlize", "wordwrap", "xmlattr")
)
_ADDED_BY_JINJA = frozenset(("_loop_vars", "_block_vars"))
_LONG_NUMBER = re.compile(r"\d{5}")
_GIVEN_WIDTH = re.compile(r"%[-+ #0-9.]*\*|\{[^{}]*\{")
"""A width that is not in the text, but among the values: ``%*d``, ``{:{}}``."""
MAX_WIDTH = 9999


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which keeps templates from Python, with bounds on steps and sizes."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    steps = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = self._filtered("_bounded", loop.iter)
        self._bound_concatenations(tree)
        return tree

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.step()
        # jinja adds the variables of a surrounding loop or block for functions of its own.
        own = {name: value for name, value in kwargs.items() if name not in _ADDED_BY_JINJA}
        if isinstance(obj, BuiltinFunctionType):  # Macros may take any number.
            _check_numbers((*args, *own.values()), MAX_PROMPT_CHARS)
        # The sandbox returns str.format in a wrapper.
        method = getattr(obj, "__name__", "")
        text = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(text, str) and method in ("format", "format_map"):
            _check_format(text, (*args, *own.values()))
        if isinstance(text, str) and method == "replace":
            return _replace(text, *args, **own)
        if isinstance(text, str) and method == "join" and len(args) == 1 and not own:
            return _join_texts(args[0], text)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        if operator == "**":
            raise SecurityError("uses powers")
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        if operator == "*" and (_is_sized(left) or _is_sized(right)):
            sequence, count = (left, right) if _is_sized(left) else (right, left)
            if isinstance(count, int):
                _check_size(len(sequence) * count)
        if operator == "+" and _is_sized(left) and _is_sized(right):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_TEMPLATE_STEPS:
            raise SecurityError(f"needs more than {MAX_TEMPLATE_STEPS} steps")

    def _filtered(self, name: str, value: nodes.Node) -> nodes.Node:
        call = nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
        return call.set_environment(self)

    def _bound_concatenations(self, node: nodes.Node) -> None:
        """Replace each ``a ~ b`` by a call that checks the size of the result."""
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [self._bounded_node(item) for item in value])
            else:
                setattr(node, field, self._bounded_node(value))

    def _bounded_node(self, value: Any) -> Any:
        if not isinstance(value, nodes.Node):
            return value
        self._bound_concatenations(value)
        if not isinstance(value, nodes.Concat):
            return value
        parts = nodes.List(value.nodes, lineno=value.lineno).set_environment(self)
        return self._filtered("_concat", parts)


class _GenerationMarker(Extension):
    """``{% generation %}`` marks the assistant's text for training. Here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("text_of"), [], [], body).set_lineno(line)

    def text_of(self, caller: Callable[[], str]) -> str:
        return caller()


@pass_environment
def _bounded(environment: _Environment, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        environment.step()
        yield value


@pass_environment
def _join(
    environment: Environment,
    parts: Iterable[Any],
    d: Any = "",  # jinja's name of the separator.
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        parts = map(make_attrgetter(environment, attribute), parts)
    return _join_texts(map(str, parts), str(d))


def _concat(parts: Iterable[Any]) -> str:
    return _join_texts(map(str, parts), "")


def _join_texts(parts: Iterable[str], separator: str) -> str:
    texts = []
    size_chars = 0
    for part in parts:
        texts.append(part)
        size_chars += len(part) + len(separator)
        _check_size(size_chars)
    return separator.join(texts)


def _check_size(size: int) -> None:
    if size > MAX_PROMPT_CHARS:
        raise SecurityError(f"builds a value of {size} items")


def _check_numbers(values: Iterable[Any], most: int) -> None:
    for value in values:
        if isinstance(value, int) and value > most:
            raise SecurityError(f"calls with the number {value}")


def _check_format(text: str, values: Collection[Any]) -> None:
    if _LONG_NUMBER.search(text):
        raise SecurityError("formats with a huge width")
    if _GIVEN_WIDTH.search(text):
        _check_numbers(values, MAX_WIDTH)
    # Each field takes at least two characters, and may name any of the values.
    _check_size(len(text) // 2 * max((len(str(value)) for value in values), default=0))


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    _check_size(len(text) + (found if count < 0 else min(found, count)) * len(new))
    return text.replace(old, new, count)


def _replace_filter(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replace(str(text), str(old), str(new), -1 if count is None else count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    width_chars = len(width) if isinstance(width, str) else width
    _check_size(len(text) + (len(text.splitlines()) + 1) * width_chars)
    return do_indent(text, width, first, blank)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(text), kwargs.values() if kwargs else args)
    return do_format(str(text), *args, **kwargs)


def _is_sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple | bytes)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    width = len(indent) if isinstance(indent, str) else indent
    if width is not None and not 0 <= width <= 16:
        raise SecurityError("indents JSON by a huge width")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_BOUNDED_FILTERS: dict[str, Callable[..., Any]] = {
    "_bounded": _bounded,
    "_concat": _concat,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace_filter,
    "tojson": _to_json,
}
