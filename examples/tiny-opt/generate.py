#!/usr/bin/env python3
"""Seeded generator of extractive questions about a smart home and a smart city (SQuAD v1.1 JSON).

Every passage states a few facts in short English sentences, in random order. Every question has its
answer as a span of the passage. There are five kinds of question:

    one-fact    the passage holds several facts and the question asks about one of them
    distractor  a similar or a misleading sentence stands in the same passage (the old lamp and the
                new lamp, another meter in another room, "is not in", another property of the
                thing)
    count       "There are 7 lamps in the attic." - the number is found by thing and room together
    two-hop     two sentences have to be joined ("The nurse has the key. The nurse is in the attic.
                Where is the key?")
    three-hop   the same with three sentences ("... The attic is on floor 3. Which floor is the key
                on?")

A hash of its sentences assigns a passage to the dev set or the training set. The hash does not
depend on the order of the sentences. So no dev passage, nor a reordering of one, is ever a training
passage.

    python generate.py --out dev.json                    # the committed dev set
    python generate.py --split train --per-kind 50 --seed 5 --out -
    python generate.py --items 8 8 --sentences 20 --out /tmp/long.json    # longer than in training
    python generate.py --check dev.json                  # spans, split and overlap with training
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

KINDS = ("one-fact", "distractor", "count", "two-hop", "three-hop")
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in the published OPT models
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
DEV_SEED = 2024
DEV_SHARE = 16  # one passage in 16 is a dev passage
MAX_SENTENCES = 7
LONG_SENTENCES = 10  # in the dev passages of all kinds but one-fact
MAX_BRIDGES = 2


def _words(text: str) -> list[str]:
    """Return the words of the text."""
    return text.split()


OBJECTS = _words(
    "lamp heater fan camera speaker printer radio router plug kettle toaster oven clock phone "
    "tablet laptop key bag bottle book blanket chair robot drone charger cable pump valve "
    "motor ladder hammer drill bicycle scooter guitar umbrella"
)
ROOMS = _words(
    "attic cellar kitchen bedroom bathroom garage hall office garden pantry library nursery "
    "lounge laundry studio workshop den cloakroom corridor lobby shed greenhouse basement gym"
)
PEOPLE = _words(
    "nurse baker guard pilot teacher doctor farmer painter plumber gardener driver clerk cook "
    "student tailor singer"
)
COLOURS = _words("red blue green yellow black white brown grey orange purple pink silver")
ADJECTIVES = _words("old new big small cheap heavy round square broken spare long quiet")
DEVICES = _words("meter sensor gauge counter thermometer scale barometer detector")
VEHICLES = _words("tram bus ferry train taxi shuttle truck van")
STOPS = _words(
    "harbour museum station market stadium hospital school airport bridge park church theatre "
    "castle factory zoo university"
)
NUMBERS = [str(n) for n in range(100)]
POOLS: dict[str, list[str]] = {
    "o": OBJECTS,
    "O": [o + "s" for o in OBJECTS],  # plural of the same index as "o"
    "r": ROOMS,
    "p": PEOPLE,
    "c": COLOURS,
    "a": ADJECTIVES,
    "d": DEVICES,
    "v": VEHICLES,
    "s": STOPS,
    "n": NUMBERS,
}
PER_ITEM = {"o": 2, "O": 2, "r": 3, "p": 1, "c": 2, "a": 2, "d": 1, "v": 1, "s": 2, "n": 3}


@dataclass(frozen=True)
class Item:
    """One to three fact sentences with one question; {x0} is the item's first word of pool x."""

    kind: str
    facts: tuple[str, ...]
    question: str
    answer: str
    bridges: tuple[str, ...] = ()  # the words that join the sentences, in the order of the hops


ITEMS = (
    Item("one-fact", ("the {o0} is in the {r0} .",), "where is the {o0} ?", "in the {r0}"),
    Item("one-fact", ("the {p0} is in the {r0} .",), "where is the {p0} ?", "in the {r0}"),
    Item(
        "one-fact",
        ("the {d0} in the {r0} reads {n0} .",),
        "what does the {d0} in the {r0} read ?",
        "{n0}",
    ),
    Item("one-fact", ("the {o0} is {c0} .",), "what colour is the {o0} ?", "{c0}"),
    Item("one-fact", ("the {o0} belongs to the {p0} .",), "who owns the {o0} ?", "the {p0}"),
    Item(
        "one-fact",
        ("the {v0} stops at the {s0} .",),
        "where does the {v0} stop ?",
        "at the {s0}",
    ),
    Item(
        "one-fact",
        ("the {o0} is set to {n0} degrees .",),
        "what is the {o0} set to ?",
        "{n0} degrees",
    ),
    Item(
        "one-fact",
        ("the {o0} uses {n0} watts .",),
        "how many watts does the {o0} use ?",
        "{n0}",
    ),
    Item(
        "distractor",
        ("the {a0} {o0} is in the {r0} .", "the {a1} {o0} is in the {r1} ."),
        "where is the {a0} {o0} ?",
        "in the {r0}",
    ),
    Item(
        "distractor",
        ("the {a0} {o0} is {c0} .", "the {a1} {o0} is {c1} ."),
        "what colour is the {a0} {o0} ?",
        "{c0}",
    ),
    Item(
        "distractor",
        ("the {d0} in the {r0} reads {n0} .", "the {d0} in the {r1} reads {n1} ."),
        "what does the {d0} in the {r0} read ?",
        "{n0}",
    ),
    Item(
        "distractor",
        ("the {o0} is in the {r0} .", "the {o0} is not in the {r1} ."),
        "where is the {o0} ?",
        "in the {r0}",
    ),
    Item(
        "distractor",
        ("the {o0} is in the {r0} .", "the {o0} belongs to the {p0} ."),
        "where is the {o0} ?",
        "in the {r0}",
    ),
    Item(
        "distractor",
        ("the {o0} uses {n0} watts .", "the {o0} is set to {n1} degrees ."),
        "how many watts does the {o0} use ?",
        "{n0}",
    ),
    Item(
        "distractor",
        ("the {o0} belongs to the {p0} .", "the {o0} is {c0} .", "the {o1} is {c1} ."),
        "what colour is the {o0} ?",
        "{c0}",
    ),
    Item(
        "count",
        ("there are {n0} {O0} in the {r0} .", "there are {n1} {O0} in the {r1} ."),
        "how many {O0} are in the {r0} ?",
        "{n0}",
    ),
    Item(
        "count",
        ("there are {n0} {O0} in the {r0} .", "there are {n1} {O1} in the {r0} ."),
        "how many {O0} are in the {r0} ?",
        "{n0}",
    ),
    Item(
        "count",
        (
            "there are {n0} {O0} in the {r0} .",
            "there are {n1} {O1} in the {r0} .",
            "there are {n2} {O0} in the {r1} .",
        ),
        "how many {O0} are in the {r0} ?",
        "{n0}",
    ),
    Item(
        "two-hop",
        ("the {p0} has the {o0} .", "the {p0} is in the {r0} ."),
        "where is the {o0} ?",
        "in the {r0}",
        bridges=("{p0}",),
    ),
    Item(
        "two-hop",
        ("the {o0} is in the {r0} .", "the {r0} is on floor {n0} ."),
        "which floor is the {o0} on ?",
        "floor {n0}",
        bridges=("{r0}",),
    ),
    Item(
        "two-hop",
        ("the {o0} is in the {r0} .", "the {r0} is above the {r1} ."),
        "which room is below the {o0} ?",
        "the {r1}",
        bridges=("{r0}",),
    ),
    Item(
        "three-hop",
        ("the {p0} has the {o0} .", "the {p0} is in the {r0} .", "the {r0} is on floor {n0} ."),
        "which floor is the {o0} on ?",
        "floor {n0}",
        bridges=("{p0}", "{r0}"),
    ),
    Item(
        "three-hop",
        ("the {p0} has the {o0} .", "the {p0} is in the {r0} .", "the {r0} is above the {r1} ."),
        "which room is below the {o0} ?",
        "the {r1}",
        bridges=("{p0}", "{r0}"),
    ),
)


def _vocabulary() -> list[str]:
    """Return all words, special tokens first, then the fixed words, then the pools; no repeats."""
    words = [*SPECIAL_TOKENS, ".", "?"]
    for item in ITEMS:
        for text in (*item.facts, item.question, item.answer):
            words += [w for w in text.split() if not w.startswith("{")]
    for pool in POOLS.values():
        words += pool
    return list(dict.fromkeys(words))


VOCABULARY = _vocabulary()
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}

_MAX_FACTS = max(len(item.facts) for item in ITEMS)
_SLOTS = [(name, i) for name, count in PER_ITEM.items() for i in range(count)]
_SLOT_ID = {f"{{{name}{i}}}": s for s, (name, i) in enumerate(_SLOTS)}
_NONE = -1  # no token here


def _codes(text: str, length: int) -> list[int]:
    """Return word ids of a template, slot s as -2 - s, filled up with _NONE to the length."""
    row = [-2 - _SLOT_ID[w] if w.startswith("{") else WORD_ID[w] for w in text.split()]
    return row + [_NONE] * (length - len(row))


_FACT_LENGTH = max(len(f.split()) for item in ITEMS for f in item.facts)
QUESTION_LENGTH = max(len(f"{i.question} {i.answer}".split()) for i in ITEMS)
_FACT_TABLE = np.array(
    [
        [
            _codes(item.facts[f] if f < len(item.facts) else "", _FACT_LENGTH)
            for f in range(_MAX_FACTS)
        ]
        for item in ITEMS
    ],
    dtype=np.int64,
)
_QA_TABLE = np.array([_codes(f"{i.question} {i.answer}", QUESTION_LENGTH) for i in ITEMS])
_BRIDGE_SLOTS = np.array(
    [[_SLOT_ID[b] for b in i.bridges] + [_NONE] * (MAX_BRIDGES - len(i.bridges)) for i in ITEMS]
)
_QUESTION_TOKENS = np.array([len(i.question.split()) for i in ITEMS])
_FACT_COUNT = np.array([len(i.facts) for i in ITEMS])
_ITEM_KIND = np.array([KINDS.index(i.kind) for i in ITEMS])
_OF_KIND = [np.flatnonzero(np.equal(_ITEM_KIND, k)) for k in range(len(KINDS))]


def _word_codes() -> npt.NDArray[np.uint64]:
    """Return one odd 64-bit code per word, independent of the word's position in the list."""
    digests = [hashlib.blake2b(w.encode(), digest_size=8).digest() for w in VOCABULARY]
    return np.array([int.from_bytes(d, "little") | 1 for d in digests], dtype=np.uint64)


_WORD_CODE = _word_codes()


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return x with its bits mixed (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def sentences_hash(facts: IntArray) -> npt.NDArray[np.uint64]:
    """Return a hash for each row of sentences [rows, sentences, tokens], whatever their order."""
    total = np.zeros(facts.shape[:2], dtype=np.uint64)
    for j in range(facts.shape[2]):
        word = np.where(facts[..., j] >= 0, _WORD_CODE[facts[..., j]], np.uint64(0))
        total = np.where(facts[..., j] >= 0, total * np.uint64(0x100000001B3) + word, total)
    each = np.where(facts[..., 0] >= 0, _mix(total), np.uint64(0))
    return _mix(each.sum(axis=1, dtype=np.uint64))


@dataclass(frozen=True)
class Batch:
    """Passages [rows, tokens] and the questions with answers of each row, padded with -1."""

    passages: IntArray  # [rows, passage tokens]
    questions: IntArray  # [rows, items, QUESTION_LENGTH]: question tokens, then answer tokens
    question_tokens: IntArray  # [rows, items]: length of the question part
    kinds: IntArray  # [rows, items]: index into KINDS
    bridges: IntArray  # [rows, items, MAX_BRIDGES]: the words that join the sentences


def _draw(
    rng: np.random.Generator,
    rows: int,
    items: int,
    kind_weights: npt.NDArray[np.float64],
    max_sentences: int,
    same: float,
) -> tuple[Batch, npt.NDArray[np.uint64]]:
    """Return one batch, not yet split into train and dev, with the hash of each passage."""
    row_kind = rng.choice(len(KINDS), size=rows, p=kind_weights)
    types = np.empty((rows, items), dtype=np.int64)
    sentences = np.zeros(rows, dtype=np.int64)
    alike = rng.random(rows) < same
    for k in range(items):
        kind = row_kind if k == 0 else np.where(rng.random(rows) < 0.5, row_kind, 0)
        pick = np.empty(rows, dtype=np.int64)
        for which, choices in enumerate(_OF_KIND):
            here = kind == which
            pick[here] = rng.choice(choices, size=int(here.sum()))
        pick = np.where(alike & (k > 0), types[:, 0], pick)
        plain = rng.choice(_OF_KIND[0], size=rows)
        full = sentences + _FACT_COUNT[pick] + (items - 1 - k) > max_sentences
        types[:, k] = np.where(full & (k > 0), plain, pick)
        sentences += _FACT_COUNT[types[:, k]]

    values = np.empty((rows, items, len(_SLOTS)), dtype=np.int64)
    for name, pool in POOLS.items():
        if name == "O":
            continue
        per = PER_ITEM[name]
        order = np.argsort(rng.random((rows, len(pool))), axis=1)
        picked = np.resize(order.T, (items * per, rows)).T  # starts again if a pool is too short
        for i in range(per):
            chosen = picked[:, i::per]
            values[..., _SLOT_ID[f"{{{name}{i}}}"]] = WORD_ID[pool[0]] + chosen
            if name == "o":
                values[..., _SLOT_ID[f"{{O{i}}}"]] = WORD_ID[POOLS["O"][0]] + chosen

    codes = _FACT_TABLE[types].reshape(rows, items, -1)
    slot = np.maximum(-2 - codes, 0)
    facts = np.where(codes <= -2, np.take_along_axis(values, slot, axis=2), codes)
    facts = facts.reshape(rows, items * _MAX_FACTS, _FACT_LENGTH)
    keys = rng.random(facts.shape[:2]) + 10.0 * (facts[..., 0] == _NONE)
    facts = np.take_along_axis(facts, np.argsort(keys, axis=1)[..., None], axis=1)
    flat = facts.reshape(rows, -1)
    flat = np.take_along_axis(flat, np.argsort(flat == _NONE, axis=1, kind="stable"), axis=1)
    flat = flat[:, : int((flat != _NONE).sum(axis=1).max())]

    qa_codes = _QA_TABLE[types]
    slot = np.maximum(-2 - qa_codes, 0)
    qa = np.where(qa_codes <= -2, np.take_along_axis(values, slot, axis=2), qa_codes)
    bridge = _BRIDGE_SLOTS[types]
    words = np.take_along_axis(values, np.maximum(bridge, 0), axis=2)
    bridges = np.where(bridge >= 0, words, _NONE)
    batch = Batch(flat, qa, _QUESTION_TOKENS[types], _ITEM_KIND[types], bridges)
    return batch, sentences_hash(facts)


def draw_batch(
    rng: np.random.Generator,
    rows: int,
    items: int,
    split: str = "train",
    kind_weights: tuple[float, ...] = (0.2, 0.2, 0.2, 0.2, 0.2),
    max_sentences: int = MAX_SENTENCES,
    same: float = 0.0,
) -> Batch:
    """Return `rows` passages with `items` questions each that belong to the split.

    In a share `same` of the rows all items have one template, so that only the lookup helps.
    """
    weights = np.asarray(kind_weights, dtype=np.float64)
    parts: list[Batch] = []
    missing = rows
    while missing > 0:
        ask = missing + missing // 8 + 8 if split == "train" else missing * DEV_SHARE + 64
        batch, hashes = _draw(rng, ask, items, weights / weights.sum(), max_sentences, same)
        dev = hashes % np.uint64(DEV_SHARE) == 0
        keep = np.flatnonzero(dev if split == "dev" else ~dev)[:missing]
        parts.append(
            Batch(
                batch.passages[keep],
                batch.questions[keep],
                batch.question_tokens[keep],
                batch.kinds[keep],
                batch.bridges[keep],
            )
        )
        missing -= len(keep)
    if len(parts) == 1:
        return parts[0]
    width = max(p.passages.shape[1] for p in parts)
    padded = [
        np.pad(p.passages, ((0, 0), (0, width - p.passages.shape[1])), constant_values=_NONE)
        for p in parts
    ]
    return Batch(
        np.concatenate(padded),
        np.concatenate([p.questions for p in parts]),
        np.concatenate([p.question_tokens for p in parts]),
        np.concatenate([p.kinds for p in parts]),
        np.concatenate([p.bridges for p in parts]),
    )


def to_text(ids: IntArray) -> str:
    """Return the words of the ids as English: capitals at sentence starts, punctuation attached."""
    out = ""
    start = True
    for word in (VOCABULARY[i] for i in ids if i >= 0):
        if word in ".?":
            out += word
            start = True
        else:
            out += (" " if out else "") + (word.capitalize() if start else word)
            start = False
    return out


def text_hash(passage: str) -> int:
    """Return the split hash of a passage given as text."""
    sentences = [[*s.lower().split(), "."] for s in passage.rstrip(".").split(".")]
    width = max(len(s) for s in sentences)
    ids = [[WORD_ID[w] for w in s] + [_NONE] * (width - len(s)) for s in sentences]
    return int(sentences_hash(np.array([ids], dtype=np.int64))[0])


def squad(
    split: str,
    per_kind: int,
    seed: int,
    items: tuple[int, int] = (2, 5),
    longest: int = LONG_SENTENCES,
) -> dict[str, Any]:
    """Return a SQuAD v1.1 data set with `per_kind` questions of every kind.

    A passage has a number of items in the range `items` and at most `longest` sentences.
    """
    rng = np.random.default_rng(seed)
    seen: set[int] = set()
    articles = []
    for k, kind in enumerate(KINDS):
        weights = tuple(float(i == k) for i in range(len(KINDS)))
        paragraphs: list[dict[str, Any]] = []
        count = 0
        while count < per_kind:
            count_items = int(rng.integers(items[0], items[1] + 1))
            same = 0.0 if kind == "one-fact" else 0.5
            batch = draw_batch(rng, 1, count_items, split, weights, longest, same)
            context = to_text(batch.passages[0])
            if text_hash(context) in seen:
                continue
            seen.add(text_hash(context))
            qas = []
            chosen = [i for i in range(count_items) if batch.kinds[0, i] == k][:2]
            for i in chosen[: per_kind - count]:
                tokens = int(batch.question_tokens[0, i])
                question = to_text(batch.questions[0, i, :tokens])
                answer = to_text(batch.questions[0, i, tokens:]).lower()
                qas.append(_qa(context, question, answer, kind, f"{split}-{kind}-{count}"))
                count += 1
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": kind, "paragraphs": paragraphs})
    return {"version": "1.1", "data": articles}


def _qa(context: str, question: str, answer: str, kind: str, name: str) -> dict[str, Any]:
    """Return one SQuAD question; its span is the answer in the sentence that supports it."""
    content = [w for w in question.lower().rstrip("?").split() if w in _SUBJECT_WORDS]
    best, start = -1, -1
    offset = 0
    for sentence in context.split(". "):
        lower = sentence.lower()
        at = _find_words(lower, answer)
        if at >= 0:
            score = sum(w in lower.rstrip(".").split() for w in content)
            score -= 10 * (" not " in lower)
            if score > best:
                best, start = score, offset + at
        offset += len(sentence) + 2
    if start < 0:
        raise ValueError(f"the answer {answer!r} is not in the passage {context!r}")
    text = context[start : start + len(answer)]
    return {
        "id": name,
        "question": question,
        "answers": [{"text": text, "answer_start": start}],
        "kind": kind,
    }


_SUBJECT_WORDS = frozenset(w for name in "oOrdav" for w in POOLS[name])


def _find_words(text: str, words: str) -> int:
    """Return the position of `words` in the text between word boundaries, or -1."""
    at = text.find(words)
    while at >= 0:
        before = at == 0 or not text[at - 1].isalnum()
        end = at + len(words)
        if before and (end == len(text) or not text[end].isalnum()):
            return at
        at = text.find(words, at + 1)
    return -1


def iterate(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (context, qa) for every question of a SQuAD data set."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield paragraph["context"], qa


def check(data: dict[str, Any], train_passages: int, seed: int) -> list[str]:
    """Return the faults of a dev set: spans, split, and overlap with drawn training data."""
    faults = []
    passages: dict[int, str] = {}
    for context, qa in iterate(data):
        passages[text_hash(context)] = context
        if text_hash(context) % DEV_SHARE != 0:
            faults.append(f"{qa['id']}: the passage belongs to the training set")
        for answer in qa["answers"]:
            at, text = answer["answer_start"], answer["text"]
            if context[at : at + len(text)] != text:
                faults.append(f"{qa['id']}: the answer is not at its offset")
    rng = np.random.default_rng(seed)
    drawn = 0
    while drawn < train_passages:
        longest = LONG_SENTENCES if drawn % 4000 else MAX_SENTENCES
        batch = draw_batch(rng, 2000, int(rng.integers(1, 6)), max_sentences=longest)
        drawn += 2000
        for row in batch.passages[:200]:
            if text_hash(to_text(row)) in passages:
                faults.append(f"a training passage is in the dev set: {to_text(row)}")
        for row in batch.passages[200:]:
            if to_text(row) in passages.values():
                faults.append(f"a training passage is in the dev set: {to_text(row)}")
    return faults


def dump(data: dict[str, Any]) -> str:
    """Return the data set as JSON, one paragraph a line."""
    articles = []
    for article in data["data"]:
        lines = [json.dumps(p, separators=(",", ":")) for p in article["paragraphs"]]
        title = json.dumps(article["title"])
        articles.append(f'{{"title":{title},"paragraphs":[\n' + ",\n".join(lines) + "\n]}")
    return f'{{"version":"{data["version"]}","data":[\n' + ",\n".join(articles) + "\n]}\n"


def main(argv: list[str] | None = None) -> int:
    """Write or check a data set; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("train", "dev"), default="dev")
    parser.add_argument("--per-kind", type=int, default=150, help="questions per kind")
    parser.add_argument("--seed", type=int, default=DEV_SEED)
    parser.add_argument(
        "--items", type=int, nargs=2, default=(2, 5), metavar=("LEAST", "MOST"), help="per passage"
    )
    parser.add_argument("--sentences", type=int, default=LONG_SENTENCES, help="longest passage")
    parser.add_argument("--out", default="-", help="file to write, - for standard output")
    parser.add_argument("--check", metavar="FILE", help="check a dev set instead of writing one")
    parser.add_argument("--train-passages", type=int, default=20000, help="drawn by --check")
    args = parser.parse_args(argv)
    if args.check:
        data = json.loads(Path(args.check).read_text(encoding="utf-8"))
        faults = check(data, args.train_passages, args.seed + 1)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{sum(1 for _ in iterate(data))} questions, {len(faults)} faults")
        return 1 if faults else 0
    text = dump(squad(args.split, args.per_kind, args.seed, tuple(args.items), args.sentences))
    if args.out == "-":
        sys.stdout.write(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
