"""Text to tokens and back, also while streaming, and the model's chat template.

Only the coordinator imports this module, because it needs ``tokenizers``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.bounded import read_json
from model.errors import FieldsUnused, TemplateRefused, TokenizerError
from model.generation import SamplingDefaults, read_sampling_defaults, sampling_defaults
from model.given import gguf_of, kind_of_file
from model.template_process import template_process
from model.template_values import MAX_PROMPT_CHARS as MAX_PROMPT_CHARS
from model.template_values import FieldsIgnored, TemplateFailed, one_line
from model.tokenizer_files import has_tokenizer, is_fault, load_backend

MAX_TEMPLATE_CHARS = 1 << 20
"""Ten times the longest known chat template."""
_MAX_FILE_BYTES = 256 << 20

_SPECIAL_KEYS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_PLAIN, _TOOLS = "default", "tool_use"
"""The names of templates: for conversations without tools, and with them."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model directory's tokenizer. Use ``load`` to get one. Threads may share it.

    defaults: what the directory recommends for requests that do not say how to draw tokens.
    tool_template: the template for conversations with tools, if it is another one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None,
        directory: Path,
        defaults: SamplingDefaults | None = None,
        tool_template: ChatTemplate | None = None,
    ) -> None:
        self.defaults = SamplingDefaults() if defaults is None else defaults
        self._backend = backend
        # A file may truncate or pad prompts. transformers ignores both settings.
        backend.no_truncation()
        backend.no_padding()
        self._longest_token_bytes = _longest_token_bytes(backend)
        self._special_tokens = special_tokens
        self._template = template
        self._tool_template = tool_template or template
        self._directory = directory
        added = backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: number for number, token in added if token.special}

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Read the tokenizer, its chat template, and what generation_config.json recommends.

        model.tokenizer_files says from which files the tokenizer comes.

        directory: a model's folder, or a GGUF file, which has its own tokenizer.

        Raises TokenizerError that names the file and what to do.
        """
        gguf = gguf_of(directory)
        if gguf is not None and (gguf == directory or not has_tokenizer(directory)):
            return _of_gguf(gguf, directory)
        settings = _read_object(directory / "tokenizer_config.json")
        own = _read_object(directory / "special_tokens_map.json")
        if "added_tokens_decoder" not in settings:  # Then this file wins, as in transformers.
            settings |= own
        special = _special_tokens(own) | _special_tokens(settings)
        backend = load_backend(directory, settings, special)
        found = {
            name: ChatTemplate(text, source)
            for name, (source, text) in _templates(directory, settings).items()
        }
        defaults = read_sampling_defaults(directory)
        plain, tools = found.get(_PLAIN), found.get(_TOOLS)
        return Tokenizer(backend, special, plain, directory, defaults, tools)

    @property
    def template_text(self) -> str:
        """The chat template for conversations with tools, or an empty text if there is none."""
        return "" if self._tool_template is None else self._tool_template.text

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that this template takes from outside."""
        return frozenset() if self._tool_template is None else self._tool_template.variables

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of the special tokens by their texts."""
        return self._special_ids

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, which must not be changed."""
        return self._backend

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the tokens of a text. ``add_special`` adds those that the model expects (bos).

        Pass False for the result of ``apply_chat_template``, which has its special tokens. Other
        threads run meanwhile, however long the text is. Raises TokenizerError.
        """
        with self._reading():
            # Only the batch call releases the interpreter's lock. The fast one leaves out offsets.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
        return list(encoding.ids)

    def encode_text(self, text: str, second: str | None = None) -> EncodedText:
        """Return the tokens of a text, or of a pair of texts, as an encoder takes them.

        Raises TokenizerError.
        """
        with self._reading():
            (encoding,) = self._backend.encode_batch([text if second is None else (text, second)])
        types = list(encoding.type_ids)
        parts = [-1 if part is None else part for part in encoding.sequence_ids]
        return EncodedText(
            tuple(encoding.ids),
            types.index(1) if 1 in types else len(types),
            tuple(parts),
            tuple(encoding.offsets),
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the model whose tokenizer a text is too hard for, such as an expression in it."""
        try:
            yield
        except BaseException as error:  # The library's own is no Exception.
            if not is_fault(error):
                raise
            raise TokenizerError(
                f"{self._directory}: the tokenizer cannot read this text: {one_line(error)}"
            ) from None

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on a text's tokens without tokenizing it, or 0 if none is known."""
        if self._longest_token_bytes is None:
            return 0
        return len(text.encode()) // self._longest_token_bytes

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of tokens. Bytes that are not UTF-8 become replacement characters."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special)

    def stream(self, markers: Collection[str] = ()) -> StreamDecoder:
        """Return a decoder for one sequence whose tokens arrive one by one.

        markers: the special tokens whose texts are kept. Others are left out.
        """
        shown = {self._special_ids[text] for text in markers if text in self._special_ids}
        if not shown:
            return StreamDecoder(self.decode)
        hidden = set(self._special_ids.values()) - shown

        def decode(tokens: Sequence[int]) -> str:
            kept = [token for token in tokens if token not in hidden]
            return self.decode(kept, skip_special=False)

        return StreamDecoder(decode)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation, special tokens included.

        messages: ``{"role": ..., "content": ...}`` as in the OpenAI API. If they are
            WatchedMessages, the template must read them.
        variables: further ones (tools, documents) for the template.

        Raises TokenizerError if the model has no template, TemplateRefused if the template rejects
        the messages, and FieldsUnused if it ignores a part of watched ones.
        """
        template = self._tool_template if variables.get("tools") else self._template
        if template is None:
            raise TokenizerError(
                f"{self._directory}: no chat template; use plain completions, "
                "or put a chat_template.jinja there"
            )
        values = {"tools": None, "documents": None} | dict(self._special_tokens) | variables
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return template.render(values)

    def doubts(self, vocab: int) -> Iterator[str]:
        """Yield a line for each thing that will not work with a model of ``vocab`` tokens."""
        largest = max(self._backend.get_vocab().values(), default=0)
        if largest >= vocab:
            yield (
                f"{self._directory}: the tokenizer has tokens up to {largest}, the model only "
                f"{vocab}; prompts with the others are refused: do their files belong together?"
            )
        if self._template is not None:
            try:
                self.apply_chat_template([{"role": "user", "content": "Hello"}])
            except TokenizerError as error:
                yield f"chat completions will fail, plain ones work: {error}"


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The tokens of a text or of a pair.

    second: where the second part begins for the model's table of token types: the number of tokens
        if it is not told apart.
    parts: for each token 0 or 1, the text it comes from, or -1 for a token that is of none.
    offsets: for each token the characters of that text that it stands for, half-open.
    """

    tokens: tuple[int, ...]
    second: int
    parts: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class StreamDecoder:
    """Turns tokens into pieces of text whose concatenation is the text of all tokens.

    No piece ends inside a character, because bytes are held back until they complete one. Each
    token is decoded with the ones before it, so spaces at token borders come out as in one decode.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The tokens after the border before last, and the length of their text that was given out.
        self._window: list[int] = []
        self._border = 0
        self._emitted_chars = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = text.rstrip(_REPLACEMENT)
        piece = complete[self._emitted_chars :]
        self._emitted_chars = max(self._emitted_chars, len(complete))
        if piece and complete == text:
            # No bytes are held back, so the next token needs only this piece's tokens as context.
            self._window = self._window[self._border :]
            self._border = len(self._window)
            self._emitted_chars = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """Return the text that is held back. An incomplete character is a replacement character."""
        text = self._decode(self._window)
        piece = text[self._emitted_chars :]
        self._emitted_chars = len(text)
        return piece


class ChatTemplate:
    """A jinja template from a stranger, bounded in time, memory, steps and size."""

    def __init__(self, text: str, source: Path) -> None:
        """Compile the template. Raises TokenizerError if it is invalid."""
        self.text = text
        self._source = source
        if len(text) > MAX_TEMPLATE_CHARS:
            raise TokenizerError(f"{source}: chat template larger than any; is it the right file?")
        try:
            self.variables = template_process().check(text)
        except TemplateFailed as error:
            raise TokenizerError(f"{source}: not a valid chat template: {error}") from error

    def render(self, values: Mapping[str, Any]) -> str:
        """Render with these variables. Raises TemplateRefused with the template's own message.

        Raises FieldsUnused if it ignores fields of watched messages.
        """
        try:
            return template_process().render(self.text, values)
        except FieldsIgnored as error:
            raise FieldsUnused(f"{self._source}: chat template {error}", error.fields) from error
        except TemplateFailed as error:
            raise TemplateRefused(f"{self._source}: chat template failed: {error}") from error


def _of_gguf(path: Path, given: Path) -> Tokenizer:
    """Make the tokenizer of a GGUF file, or of a folder that it is alone in.

    A generation_config.json in that folder wins over the file's own recommendations.
    """
    from model.gguf_tokenizer import gguf_sampling, gguf_tokenizer  # Slow to import, seldom used.

    backend, settings = gguf_tokenizer(path)
    plain, tools = (
        None if text is None else ChatTemplate(text, path)
        for text in (settings.get("chat_template"), settings.get("tool_template"))
    )
    defaults = read_sampling_defaults(given)
    if defaults == SamplingDefaults():
        defaults = sampling_defaults(gguf_sampling(path), str(path))
    return Tokenizer(backend, _special_tokens(settings), plain, path, defaults, tools)


def _longest_token_bytes(backend: tokenizers.Tokenizer) -> int | None:
    """Return the most bytes of text in one token, or None if no such bound is certain.

    It is certain only if each byte of a text is in some token: byte-level BPE that drops nothing.
    """
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    vocab = backend.get_vocab()
    parts = [*_parts(backend.normalizer, "normalizers")]
    parts += _parts(backend.pre_tokenizer, "pretokenizers")
    byte_level = {part["type"] for part in parts} & {"ByteLevel"}
    alphabet = (
        tokenizers.pre_tokenizers.ByteLevel.alphabet()
        if byte_level
        else [f"<0x{byte:02X}>" for byte in range(256)]
    )
    certain = (
        isinstance(model, tokenizers.models.BPE)
        and (byte_level or model.byte_fallback)
        and all(token in vocab for token in alphabet)
        and all(map(_keeps_all, parts))
        and not any(token.lstrip or token.rstrip for token in added)
    )
    # A token's text in UTF-8 is never shorter than the bytes of its text.
    return max(len(token.encode()) for token in vocab) if certain else None


def _parts(component: Any, list_name: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer's or pre-tokenizer's steps, in their order."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    return list(settings.get(list_name) or [settings])


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a step before the model keeps every byte of the text, or adds some."""
    kind = step["type"]
    if kind == "Replace":
        old = step["pattern"].get("String")
        return old is not None and len(step["content"].encode()) >= len(old.encode())
    if kind in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return kind in ("ByteLevel", "Digits", "Metaspace", "Prepend")


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """Return the file and the text of the template, and of another one for tools, by their names.

    Files of their own win over the config. chat_template.json, which models with a processor have,
    comes last.
    """
    files = {
        _PLAIN: directory / "chat_template.jinja",
        _TOOLS: directory / "additional_chat_templates" / f"{_TOOLS}.jinja",
    }
    found = {name: (path, _template_of(path)) for name, path in files.items() if path.exists()}
    if _PLAIN in found:
        return found
    path = directory / "tokenizer_config.json"
    value = settings.get("chat_template")
    if value is None:
        path = directory / "chat_template.json"
        value = _read_object(path).get("chat_template")
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        value = {item.get("name"): item.get("template") for item in items}
    named = value if isinstance(value, dict) else {_PLAIN: value}
    if value is not None and not isinstance(named.get(_PLAIN), str):
        raise TokenizerError(
            f"{path}: chat_template must be a string, or a list with one named {_PLAIN}"
        )
    texts = {name: (path, text) for name in files if isinstance(text := named.get(name), str)}
    return texts | found


def _template_of(path: Path) -> str:
    """Read a template's own file. Raises TokenizerError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: larger than any template; is it the right file?")
        kind = kind_of_file(path)
        if kind is not None:
            raise TokenizerError(f"{path}: it is {kind}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Map names to texts. Each text is a string, or an object with its content."""
    others = [key for key in settings if key.endswith("_token") and key not in _SPECIAL_KEYS]
    named = {key: settings.get(key) for key in (*_SPECIAL_KEYS, *others)}
    own = settings.get("extra_special_tokens")
    named |= own if isinstance(own, dict) else {}
    tokens: dict[str, str] = {}
    for key, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[key] = text
    return tokens


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Empty if the optional file is absent."""
    if not path.exists():
        return {}
    try:
        value = read_json(path, _MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        wrong = kind_of_file(path) or f"{error}; fetch it again"
        raise TokenizerError(f"{path}: cannot be read: {wrong}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object; fetch it again")
    return value
