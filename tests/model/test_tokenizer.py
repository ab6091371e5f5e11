from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from model.errors import FieldsUnused, TokenizerError
from model.template_values import WatchedMessage
from model.tokenizer import MAX_PROMPT_CHARS, Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENCODERS = FIXTURES.parent / "encoders"
DOUBLING = (
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = TWICE %}{% endfor %}"
)
USER = [{"role": "user", "content": "hi"}]
BYTES = Tokenizer.load(FIXTURES / "llama")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))


def with_template(directory: Path, template: object, **settings: object) -> Tokenizer:
    values = {"chat_template": template, "bos_token": "<s>", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer.load(directory)


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(token) for token in tokens), decoder.finish()]


@pytest.mark.parametrize("directory", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_prompts_of_the_fixtures(directory: Path) -> None:
    prompt = np.load(directory / "golden.npz")["prompt"].tolist()
    assert Tokenizer.load(directory).encode("The quick brown fox jumps.") == prompt


def test_encode_adds_bos_and_decode_drops_it() -> None:
    tokens = BYTES.encode("Hi there")
    assert tokens[0] == 256
    assert BYTES.decode(tokens) == "Hi there"
    assert BYTES.decode(tokens, skip_special=False) == "<s>Hi there"
    assert BYTES.encode("Hi there", add_special=False) == tokens[1:]


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    """Heartbeats among them: held for seconds, they would be missed."""
    ended = threading.Event()
    gaps_s = [0.0]

    def watch() -> None:
        last_s = time.monotonic()
        while not ended.wait(0.001):
            now_s = time.monotonic()
            gaps_s.append(now_s - last_s)
            last_s = now_s

    watcher = threading.Thread(target=watch)
    watcher.start()
    started_s = time.monotonic()
    tokens = BYTES.encode("word " * 200_000)
    took_s = time.monotonic() - started_s
    ended.set()
    watcher.join()
    assert len(tokens) == 1_000_001
    # Bound to the time that it took, as the machine may be slow or busy.
    assert max(gaps_s) < took_s / 2


@given(st.text())
@settings(max_examples=80, deadline=None)
def test_no_text_has_fewer_tokens_than_is_known_beforehand(text: str) -> None:
    assert BYTES.least_tokens(text) <= len(BYTES.encode(text, add_special=False))


def test_how_many_tokens_a_text_has_at_least() -> None:
    # "<pad>" is the longest of the fixture's tokens.
    assert BYTES.least_tokens("<pad>" * 1000) == 1000
    assert len(BYTES.encode("<pad>" * 1000, add_special=False)) == 1000


SPLIT_OFF_SPACES = {
    "type": "Split",
    "pattern": {"Regex": r"\s+"},
    "behavior": "Removed",
    "invert": False,
}
SHORTEN = {"type": "Replace", "pattern": {"String": "aaaa"}, "content": "a"}


@pytest.mark.parametrize(
    ("field", "step"),
    [
        ("pre_tokenizer", SPLIT_OFF_SPACES),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT_OFF_SPACES]}),
        ("normalizer", SHORTEN),
        ("normalizer", {"type": "NFKC"}),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
    ],
)
def test_nothing_is_known_of_tokenizers_that_may_drop_text(
    model: Path, field: str, step: object
) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: step}))
    assert Tokenizer.load(model).least_tokens("a" * 1000) == 0


def test_a_tokenizer_file_neither_cuts_nor_fills_up_a_prompt(model: Path) -> None:
    path = model / "tokenizer.json"
    expected = Tokenizer.load(model).encode("The quick brown fox jumps.")
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    filled = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    settings = {"truncation": cut, "padding": filled}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert Tokenizer.load(model).encode("The quick brown fox jumps.") == expected


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語のテキスト", "🐟🐟 a 👩‍👩‍👧 b", "  two  ", "\n\n"]
)
def test_streaming_gives_whole_characters(text: str) -> None:
    tokens = BYTES.encode(text)
    pieces = streamed(BYTES, tokens)
    assert "".join(pieces) == BYTES.decode(tokens) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.text())
@settings(max_examples=80, deadline=None)
def test_streaming_equals_decoding(text: str) -> None:
    tokens = BYTES.encode(text)
    assert "".join(streamed(BYTES, tokens)) == BYTES.decode(tokens)


@given(st.lists(st.integers(0, 259)))
@settings(max_examples=80, deadline=None)
def test_streaming_any_tokens_equals_decoding(tokens: list[int]) -> None:
    assert "".join(streamed(BYTES, tokens)) == BYTES.decode(tokens)


def test_an_unfinished_character_is_held_back_until_the_end() -> None:
    tokens = BYTES.encode("ok🐟")[:-1]
    pieces = streamed(BYTES, tokens)
    assert "".join(pieces[:-1]) == "ok"
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("fallback", [False, True])
def test_sentence_pieces_keep_their_leading_spaces(tmp_path: Path, fallback: bool) -> None:
    """Llama 2 style: the word mark becomes a space, but not at the start of the text."""
    words = ["<unk>", "\u2581Hello", "\u2581world", "\u2581", "!", "s"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    if not fallback:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    tokens = [1, 2, 5, 3, 3, 2, 4, 1, 1]
    if fallback:
        tokens += [6 + byte for byte in "é🐟".encode()] + [2]
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).startswith("Hello worlds   world! Hello Hello")


def test_vocabulary_files_of_gpt2_suffice(tmp_path: Path) -> None:
    """OPT checkpoints come without tokenizer.json."""
    vocab = dict(json.loads((FIXTURES / "llama/tokenizer.json").read_text())["model"]["vocab"])
    vocab |= {"</s>": 256, "<pad>": 257, "th": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    special = {"content": "</s>", "lstrip": False}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = Tokenizer.load(tmp_path)
    tokens = tokenizer.encode("the é</s>")
    assert (tokens[0], tokens[1], tokens[-1]) == (256, 258, 256)
    assert tokenizer.decode(tokens) == "the é"


@pytest.mark.parametrize(
    ("settings", "normalized"),
    [
        ({"do_lower_case": False}, " 日  Été"),
        ({"do_lower_case": True}, " 日  ete"),
        ({"do_lower_case": True, "strip_accents": False}, " 日  été"),
        ({"do_lower_case": False, "strip_accents": True}, " 日  Ete"),
        ({"tokenize_chinese_chars": False}, "日 ete"),
        ({"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}, " 日  Été"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, "日 été"),
    ],
)
def test_the_settings_of_word_pieces_count_and_not_their_file(
    tmp_path: Path, settings: dict[str, object], normalized: str
) -> None:
    """transformers 5.24 gives the same, and takes a file of no class of its own as it is."""
    model = Path(shutil.copytree(ENCODERS / "minilm", tmp_path / "model"))
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    values["normalizer"] |= {"lowercase": True, "strip_accents": False}
    values["normalizer"] |= {"handle_chinese_chars": False}
    path.write_text(json.dumps(values))
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = Tokenizer.load(model).backend
    assert backend.normalizer.normalize_str("日 Été") == normalized


def test_another_normalizer_of_word_pieces_stays(tmp_path: Path) -> None:
    model = Path(shutil.copytree(ENCODERS / "minilm", tmp_path / "model"))
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    (model / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert Tokenizer.load(model).backend.normalizer.normalize_str("É") == "É"


MERGES_NOTHING = b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}'
"""At these the library panics."""


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b'{"model": {"type": "Magic"}}', MERGES_NOTHING]
)
def test_broken_tokenizers_are_named(model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a valid tokenizer"):
        Tokenizer.load(model)


@pytest.mark.parametrize("pair", [False, True])
def test_a_text_that_is_too_hard_for_an_expression_is_refused(model: Path, pair: bool) -> None:
    """The library ends a search that goes on and on by an error that is no Exception."""
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    pattern = {"Regex": r"(?=(a+)+b)a"}
    values["pre_tokenizer"] = {
        "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    path.write_text(json.dumps(values))
    tokenizer = Tokenizer.load(model)
    assert tokenizer.encode("ab")
    with pytest.raises(TokenizerError, match=r"the tokenizer cannot read this text: .*retry-limit"):
        tokenizer.encode_text("a" * 64) if pair else tokenizer.encode("a" * 64)


def test_missing_and_malformed_files_are_named(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: missing; load the tokenizer"):
        Tokenizer.load(model)
    (model / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(model)
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read"):
        Tokenizer.load(model)


def test_chat_of_the_fixture_has_each_special_token_once() -> None:
    text = BYTES.apply_chat_template(USER)
    assert text == "<s>user\nhi</s>\n<s>assistant\n"
    tokens = BYTES.encode(text, add_special=False)
    assert (tokens[0], tokens.count(256), tokens.count(257)) == (256, 2, 1)
    assert BYTES.apply_chat_template(USER, add_generation_prompt=False) == "<s>user\nhi</s>\n"


def test_no_template_is_an_error_with_advice(model: Path) -> None:
    tokenizer = with_template(model, None)
    with pytest.raises(TokenizerError, match=r"no chat template; .*put a chat_template\.jinja"):
        tokenizer.apply_chat_template(USER)


def test_a_template_for_tools_serves_conversations_with_tools(model: Path) -> None:
    named = [
        {"name": "default", "template": "plain {{ mood }}"},
        {"name": "tool_use", "template": "tools {{ tools | length }}{{ enable_thinking }}"},
    ]
    for stored in (named, {item["name"]: item["template"] for item in named}):
        tokenizer = with_template(model, stored)
        assert tokenizer.apply_chat_template(USER) == "plain "
        assert tokenizer.apply_chat_template(USER, tools=[{}]) == "tools 1"
        assert tokenizer.template_variables == {"tools", "enable_thinking"}
        assert "length" in tokenizer.template_text


def test_a_template_for_tools_may_be_a_file_of_its_own(model: Path) -> None:
    """As save_pretrained of transformers 4.50 and later writes several templates."""
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools {{ tools | length }}")
    (folder / "rag.jinja").write_text("documents")
    for text in ("of the config", "of a file"):
        tokenizer = with_template(model, "of the config")
        assert tokenizer.apply_chat_template(USER) == text
        assert tokenizer.apply_chat_template(USER, tools=[{}]) == "tools 1"
        assert tokenizer.template_variables == {"tools"}
        (model / "chat_template.jinja").write_text("of a file")
    (folder / "tool_use.jinja").write_text("{% nonsense %}")
    with pytest.raises(TokenizerError, match=r"tool_use\.jinja: not a valid chat template"):
        with_template(model, "plain")


def test_chosen_special_tokens_are_shown_while_streaming() -> None:
    tokens = BYTES.encode("Hé")
    decoder = BYTES.stream({"</s>", "no token"})
    shown = [decoder.push(token) for token in (*tokens, 257, *tokens)]
    assert "".join([*shown, decoder.finish()]) == "Hé</s>Hé"
    assert shown[:3] == ["", "H", ""]
    assert "".join(streamed(BYTES, [*tokens, 257, *tokens])) == "HéHé"
    assert dict(BYTES.special_ids) == {"<s>": 256, "</s>": 257, "<pad>": 258, "<unk>": 259}


def test_a_watched_message_tells_what_a_template_left_out(model: Path) -> None:
    tokenizer = with_template(model, "{% for m in messages %}{{ m.content }}{% endfor %}")
    fields = {"role": "user", "content": "hi", "name": "Ann", "empty": None}
    watched = WatchedMessage(fields, may_ignore=("role",))
    with pytest.raises(FieldsUnused, match=r"does not use messages\[0\]\.name") as unused:
        tokenizer.apply_chat_template([watched])
    assert unused.value.fields == ("messages[0].name",)
    assert tokenizer.apply_chat_template([watched.again(without=("name",))]) == "hi"
    assert tokenizer.apply_chat_template([fields]) == "hi"


def test_named_templates_and_the_file_of_its_own(model: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert with_template(model, named).apply_chat_template(USER) == "d"
    with pytest.raises(TokenizerError, match="must be a string, or a list with one named default"):
        with_template(model, [{"name": "tool_use", "template": "t"}])
    (model / "chat_template.json").write_text('{"chat_template": "json {{ bos_token }}"}')
    assert with_template(model, named).apply_chat_template(USER) == "d"
    assert with_template(model, None).apply_chat_template(USER) == "json <s>"
    (model / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert with_template(model, named).apply_chat_template(USER) == "file <s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n {% if 1 %}\n{{ m.role }}\n {% endif %}{% endfor %}", "user\n"),
        ("{{ messages[0]['content'] | trim | upper }}", "HI"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ 'a' ~ 1 ~ 'b' + 'c' * 3 }}", "a1bccc"),
        ("{{ '%s-%05d' % ('x', 7) }}", "x-00007"),
        ("{{ [1, 2] | join(', ') }}{{ '+'.join(['a', 'b']) }}", "1, 2a+b"),
        ("{{ 'a\n\nb' | indent(2) }}{{ 'aa' | replace('a', 'b') }}", "a\n\n  bbb"),
        ("{{ 'aa'.replace('a', 'c') }}{{ '{}-{}'.format(1, 2) }}", "cc1-2"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.last }}{% endfor %}", "TrueTrue"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.index0 }}{% endfor %}", "10"),
        ("{% set n = namespace(i=1) %}{% for i in [5] %}{% set n.i=i %}{% endfor %}{{ n.i }}", "5"),
        ("{% generation %}{{ 'x' }}{% endgeneration %}", "x"),
        ("{{ tools is none }}{{ undefined_thing is defined }}", "TrueFalse"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(3) }}", "<3>"),
        ("{{ '12345678'.strip() }}{{ '123456'.split('3')[0] }}", "1234567812"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)  # fmt: skip
def test_templates_render_as_models_expect(model: Path, template: str, expected: str) -> None:
    assert with_template(model, template).apply_chat_template(USER) == expected


def test_templates_can_reject_messages(model: Path) -> None:
    tokenizer = with_template(model, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="chat template failed: roles must alternate"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize("template", ["{% for %}", "{{", "{% include 'x' %}{% nope %}"])
def test_invalid_templates_are_refused_at_load(model: Path, template: str) -> None:
    with pytest.raises(TokenizerError, match="not a valid chat template"):
        with_template(model, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}{{ 1/0 }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
    ],
)
def test_templates_cannot_escape(model: Path, template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template failed"):
        with_template(model, template).apply_chat_template(USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 999999999999 }}",
        "{{ [0] * 999999999999 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a' | indent(999999999) }}",
        "{{ range(99999) | join('a' * 99999) }}",
        "{{ ('a' * 99999).join(range(99999)) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('{0}' * 99999).format('b' * 99999) }}",
        "{{ ('%(a)s' * 99999) % {'a': 'b' * 99999} }}",
        "{{ [1] | batch(999999999, 0) | list }}",
        "{{ lipsum(999999) }}",
        "{{ {} | tojson(indent=999999999) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        DOUBLING.replace("TWICE", "ns.s ~ ns.s"),
        DOUBLING.replace("TWICE", "ns.s + ns.s"),
        DOUBLING.replace("TWICE", "[ns.s, ns.s] | join"),
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(64) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)  # fmt: skip
def test_templates_cannot_hog_the_coordinator(model: Path, template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template"):
        with_template(model, template).apply_chat_template(USER)


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user", "content": "12345 words. " * 500}] * 300
    assert len(BYTES.apply_chat_template(messages)) < MAX_PROMPT_CHARS


def test_what_will_not_work_is_known_at_load(model: Path) -> None:
    assert list(BYTES.doubts(10_000)) == []
    (line,) = BYTES.doubts(200)
    assert "the model only 200" in line
    (line,) = with_template(model, "{{ nothing.at.all }}").doubts(10_000)
    assert "chat completions will fail" in line
    assert "tokenizer_config.json: chat template failed" in line
