"""Text to tokens and back, also while streaming, and the model's chat template.

Only the coordinator imports this module: it needs ``tokenizers`` and ``jinja2``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import TokenizerError
from model.given import kind_of_file

MAX_PROMPT_CHARS = 4_000_000
"""Longest text a template may produce, and the largest value inside one: beyond any context."""
MAX_TEMPLATE_STEPS = 200_000
"""Loop rounds and calls of one rendering; real templates need some dozens per message."""
_MAX_FILE_BYTES = 256 << 20

_SPECIAL_KEYS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model directory's tokenizer. ``load`` is the way to get one; safe to share by threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None,
        directory: Path,
    ) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._template = template
        self._directory = directory

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Read tokenizer.json (or GPT-2's vocab.json and merges.txt) and the chat template.

        Raises TokenizerError that names the file and what to do.
        """
        settings = _read_object(directory / "tokenizer_config.json")
        special = _special_tokens(_read_object(directory / "special_tokens_map.json"))
        special |= _special_tokens(settings)
        backend = _load_backend(directory, settings, special)
        source, text = _find_template(directory, settings)
        template = None if text is None else ChatTemplate(text, source)
        return Tokenizer(backend, special, template, directory)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokens of a text; ``add_special`` puts in what the model expects around it (bos).

        Pass False for the result of ``apply_chat_template``, which has its special tokens.
        """
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of tokens; bytes that are no UTF-8 become replacement characters."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special)

    def stream(self) -> StreamDecoder:
        """A decoder for one sequence whose tokens arrive one by one."""
        return StreamDecoder(self.decode)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, special tokens included.

        messages: ``{"role": ..., "content": ...}`` as the OpenAI API has them. Further variables
        (tools, documents) go to the template. Raises TokenizerError where the model has no
        template or it rejects the messages.
        """
        if self._template is None:
            raise TokenizerError(
                f"{self._directory}: no chat template; use plain completions, "
                "or put a chat_template.jinja there"
            )
        values = {"tools": None, "documents": None} | dict(self._special_tokens) | variables
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._template.render(values)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Tokens of a conversation: the template's text, with no special token added twice."""
        return self.encode(self.apply_chat_template(messages, **variables), add_special=False)


class StreamDecoder:
    """Turns tokens into pieces of text whose concatenation is the text of all of them.

    No piece ends inside a character: bytes are held back until they complete one. Spaces at
    token borders come out as in one decode, since each token is decoded with the ones before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # Tokens from the border before last on, and how much of their text was given out.
        self._window: list[int] = []
        self._border = 0
        self._emitted_chars = 0

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = text.rstrip(_REPLACEMENT)
        piece = complete[self._emitted_chars :]
        self._emitted_chars = max(self._emitted_chars, len(complete))
        if piece and complete == text:
            # Nothing is pending: the next token needs only the context of this piece's tokens.
            self._window = self._window[self._border :]
            self._border = len(self._window)
            self._emitted_chars = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What is still held back: an incomplete character shows as replacement characters."""
        text = self._decode(self._window)
        piece = text[self._emitted_chars :]
        self._emitted_chars = len(text)
        return piece


class ChatTemplate:
    """A jinja template from a stranger: sandboxed, and bounded in steps and size.

    Rendered as transformers does: trimmed blocks, loop controls, ``raise_exception``,
    ``strftime_now``, ``tojson`` without HTML escapes, ``{% generation %}`` markers ignored.
    """

    def __init__(self, text: str, source: Path) -> None:
        """Raises TokenizerError where it is no valid template."""
        self._source = source
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
        except (TemplateError, RecursionError) as error:
            raise TokenizerError(
                f"{source}: not a valid chat template: {_one_line(error)}"
            ) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for these variables. Raises TokenizerError with what the template says."""
        # An overlay per rendering, since it carries the count of steps.
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
            message = _one_line(error)
            raise TokenizerError(f"{self._source}: chat template failed: {message}") from error
        return "".join(pieces)


# What expressions of a template can raise, besides jinja's own errors.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
# Their result may be far larger than their arguments, and chat templates have no use for them.
_UNBOUNDED_FILTERS = frozenset(
    ("batch", "center", "filesizeformat", "format", "slice", "urlize", "wordwrap", "xmlattr")
)
_LONG_NUMBER = re.compile(r"\d{5}")


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox keeps templates from Python; this also keeps them from hogging it."""

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
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and value > MAX_PROMPT_CHARS:
                raise SecurityError(f"calls with the number {value}")
        # The sandbox hands out str.format in a wrapper.
        method = getattr(obj, "__name__", "")
        text = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(text, str) and method in ("format", "format_map"):
            _check_format(text, (*args, *kwargs.values()))
        if isinstance(text, str) and method == "replace":
            return _replace(text, *args, **kwargs)
        if isinstance(text, str) and method == "join":
            return _join(args[0], text)
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
    """``{% generation %}``: marks the assistant's text for training; means nothing here."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pass_environment
def _bounded(environment: _Environment, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        environment.step()
        yield value


def _join(parts: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise SecurityError("joins by attribute")
    texts = []
    size_chars = 0
    for part in parts:
        texts.append(str(part))
        size_chars += len(texts[-1]) + len(separator)
        _check_size(size_chars)
    return str(separator).join(texts)


def _check_size(size: int) -> None:
    if size > MAX_PROMPT_CHARS:
        raise SecurityError(f"builds a value of {size} items")


def _check_format(text: str, values: Iterable[Any]) -> None:
    if _LONG_NUMBER.search(text):
        raise SecurityError("formats with a huge width")
    # Each field takes two characters at least, and may name any of the values.
    _check_size(len(text) // 2 * max((len(str(value)) for value in values), default=0))


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    _check_size(len(text) + (found if count < 0 else min(found, count)) * len(new))
    return text.replace(old, new, count)


def _replace_filter(text: str, old: str, new: str, count: int | None = None) -> str:
    return _replace(str(text), old, new, -1 if count is None else count)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    _check_size(len(text) + (text.count("\n") + 1) * width)
    prefix = " " * width
    lines = text.split("\n")
    return "\n".join(
        prefix + line if (number or first) and (line or blank) else line
        for number, line in enumerate(lines)
    )


def _is_sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple | bytes)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= 16:
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
    "_concat": _join,
    "indent": _indent,
    "join": _join,
    "replace": _replace_filter,
    "tojson": _to_json,
}


def _load_backend(
    directory: Path, settings: Mapping[str, Any], special: Mapping[str, str]
) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    gpt2 = str(settings.get("tokenizer_class", "")).startswith("GPT2")
    if not path.exists() and gpt2 and vocab.exists() and merges.exists():
        path = vocab
    if not path.exists():
        raise TokenizerError(
            f"{path}: missing; load the tokenizer with transformers and save_pretrained it there"
        )
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: larger than any tokenizer; is it the right file?")
    # The library reports every defect of a file as a bare Exception.
    try:
        if path == vocab:
            return _gpt2(vocab, merges, settings, special)
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        kind = kind_of_file(path)
        wrong = kind or f"{_one_line(error)}; fetch it again"
        raise TokenizerError(f"{path}: not a valid tokenizer: {wrong}") from error


def _gpt2(
    vocab: Path, merges: Path, settings: Mapping[str, Any], special: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Byte-level BPE from the two files that OPT checkpoints come with."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(vocab), str(merges), unk_token=special.get("unk_token"))
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_prefix_space") is True
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(sorted(set(special.values())))
    bos = special.get("bos_token")
    if settings.get("add_bos_token") is True and bos is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _find_template(directory: Path, settings: Mapping[str, Any]) -> tuple[Path, str | None]:
    """The template's text and where it is from; a file of its own wins over the config."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise TokenizerError(f"{path}: larger than any template; is it the right file?")
            return path, path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path}: cannot be read: {error}") from error
    path = directory / "tokenizer_config.json"
    value = settings.get("chat_template")
    if value is None or isinstance(value, str):
        return path, value
    named = {
        item.get("name"): item.get("template")
        for item in (value if isinstance(value, list) else [])
        if isinstance(item, dict)
    }
    text = named.get("default")
    if not isinstance(text, str):
        raise TokenizerError(
            f"{path}: chat_template must be a string, or a list with one named default"
        )
    return path, text


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts; each is written as a string or as an object with its content."""
    tokens: dict[str, str] = {}
    for key in _SPECIAL_KEYS:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[key] = text
    return tokens


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the optional file is absent."""
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: absurdly large; is it the right file?")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        wrong = kind_of_file(path) or f"{error}; fetch it again"
        raise TokenizerError(f"{path}: cannot be read: {wrong}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object; fetch it again")
    return value
