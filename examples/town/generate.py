#!/usr/bin/env python3
"""Seeded generator of questions about a town: reading, remembered facts, and sums with carry.

A town has people. Every person has a number of four digits and a home in five words. These facts
are the same in every passage, but no passage states them: a model has to remember them. A passage
says which person has which thing, and how a meter changed. There are four kinds of question:

    read    "The brass key is with Ada Berg. ... Who has the brass key?" - the passage has it
    call    "... Whom to call about the brass key?" - "Ada Berg at 4815": read the name, remember
            the number
    home    "... Where is the brass key?" - "with Ada Berg in the old stone house by the river":
            read the name, remember the home
    sum     "The meter read 347 and rose by 285. ... What does the meter read?" - "632"

A hash of its sentences assigns a passage to the dev set or the training set. The hash does not
depend on the order of the sentences. So no dev passage, nor a reordering of one, is ever a training
passage. The facts about people are the same in both, because they are to be remembered.

    python generate.py --out dev.jsonl                     # the committed dev set
    python generate.py --split train --per-kind 50 --seed 5 --out -
    python generate.py --check dev.jsonl                   # split and overlap with training
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("read", "call", "home", "sum")
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
TOWN_SEED = 7
DEV_SEED = 2024
DEV_SHARE = 16  # one passage in 16 is a dev passage
MAX_FACTS = 3
FIRST_PEOPLE, PEOPLE_COUNT = 1024, 3072  # training starts with some of the people


def _words(text: str) -> list[str]:
    """Return the words of the text."""
    return text.split()


FIRST = _words(
    "ada ben carl dora emil fay greta hugo ida jan karl lena max nora otto paula quinn rosa sven "
    "tilda ursel vera willi xenia yara zeno alma bruno clara david elsa felix gerda hanna igor "
    "jonas katja lars mira nils olga peter ralf sara timo ute viktor wanda anton berta cilla dirk "
    "edda frida gustav heidi irma julia kurt lotte marta"
)
LAST = _words(
    "berg holm lind stein wald bach feld brandt vogel fuchs wolf hahn sommer winter kern roth "
    "weiss braun schwarz klein lang kurz jung alt neumann hofer maier huber gruber steiner moser "
    "bauer mayer pichler leitner fischer weber wagner koch richter becker schulz engel krause "
    "lehmann keller frank simon ludwig heinrich haas graf dietrich pohl sauer arnold busch horn "
    "voigt ernst seidel"
)
MADE_OF = _words(
    "brass copper wooden paper glass silver plastic iron leather cotton marble rubber wool steel "
    "clay straw"
)
THINGS = _words(
    "key lamp clock bottle book blanket chair drum cable pump valve hammer drill guitar umbrella "
    "basket mirror ladder kettle camera radio bell wheel box"
)
AGES = _words("old new tall low narrow wide quiet sunny")
WALLS = _words("stone brick timber white yellow green red grey")
HOUSES = _words("house mill tower barn shop inn villa farm cabin school chapel hall")
BESIDES = _words("by near behind above")
PLACES = _words(
    "river market harbour bridge park church station forest lake castle well square meadow hill "
    "quarry orchard"
)
FIXED = _words(
    ". ? the is with who has whom to call about at in where meter read and rose what does"
)
FIXED += _words("number of does live a")
DIGITS = [str(d) for d in range(10)]


@dataclass(frozen=True)
class Person:
    """A person with the two facts that a model has to remember."""

    name: tuple[str, str]
    number: str
    home: tuple[str, ...]


def _town() -> list[Person]:
    """Return the people, each with a random number and home."""
    rng = random.Random(TOWN_SEED)
    every = [(first, last) for first in FIRST for last in LAST]
    some = rng.sample(every, FIRST_PEOPLE)
    people = [_person(rng, name) for name in some]
    others = rng.sample(sorted(set(every) - set(some)), PEOPLE_COUNT - FIRST_PEOPLE)
    return people + [_person(rng, name) for name in others]


def _person(rng: random.Random, name: tuple[str, str]) -> Person:
    """Return a person with a number and a home drawn at random."""
    number = f"{rng.randrange(10000):04d}"
    house = rng.choice(AGES), rng.choice(WALLS), rng.choice(HOUSES)
    return Person(
        name, number, ("in", "the", *house, rng.choice(BESIDES), "the", rng.choice(PLACES))
    )


PEOPLE = _town()


def _vocabulary() -> list[str]:
    """Return all tokens: special ones, words, digits that begin a number, digits inside one."""
    words = [*SPECIAL_TOKENS, *FIXED, *FIRST, *LAST, *MADE_OF, *THINGS, *AGES, *WALLS, *HOUSES]
    words += [*BESIDES, *PLACES, *DIGITS, *(f"#{d}" for d in DIGITS)]
    return list(dict.fromkeys(words))


VOCABULARY = _vocabulary()
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Asked:
    """A question with its kind and answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Passage:
    """Sentences, and the questions that they answer."""

    sentences: tuple[str, ...]
    questions: tuple[Asked, ...]


def encode(text: str) -> list[int]:
    """Return the tokens of words that spaces divide. A number is one token for each digit."""
    tokens = []
    for word in text.split():
        if word[0].isdigit():
            tokens.append(WORD_ID[word[0]])
            tokens += [WORD_ID[f"#{digit}"] for digit in word[1:]]
        else:
            tokens.append(WORD_ID[word])
    return tokens


def is_dev(sentences: tuple[str, ...]) -> bool:
    """Say if the passage of these sentences belongs to the dev set, in whatever order."""
    text = "\n".join(sorted(sentences))
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % DEV_SHARE == 0


def about_person(person: Person, thing: str) -> tuple[Asked, ...]:
    """Return the three questions about a person's thing."""
    name = " ".join(person.name)
    return (
        Asked("read", f"who has {thing} ?", name),
        Asked("call", f"whom to call about {thing} ?", f"{name} at {person.number}"),
        Asked("home", f"where is {thing} ?", f"with {name} {' '.join(person.home)}"),
    )


def draw_sum(rng: random.Random) -> tuple[str, Asked]:
    """Return a sentence about the meter with its question. Both numbers and sum have 3 digits."""
    first = rng.randrange(100, 900)
    second = rng.randrange(100, 1000 - first)
    sentence = f"the meter read {first} and rose by {second} ."
    return sentence, Asked("sum", "what does the meter read ?", str(first + second))


def draw(
    rng: random.Random, facts: int, people: Sequence[Person] = PEOPLE, meter: float = 0.5
) -> Passage:
    """Return a passage of ``facts`` sentences in random order, with all questions about them.

    meter: how likely one of the sentences is about the meter.
    """
    made, things = rng.sample(MADE_OF, facts), rng.sample(THINGS, facts)
    sentences: list[str] = []
    questions: list[Asked] = []
    if rng.random() < meter:
        sentence, asked = draw_sum(rng)
        sentences.append(sentence)
        questions.append(asked)
    for adjective, noun in zip(made, things, strict=True):
        if len(sentences) == facts:
            break
        person, thing = rng.choice(people), f"the {adjective} {noun}"
        sentences.append(f"{thing} is with {' '.join(person.name)} .")
        questions += about_person(person, thing)
    rng.shuffle(sentences)
    return Passage(tuple(sentences), tuple(questions))


def draw_split(
    rng: random.Random, split: str, facts: int, people: Sequence[Person] = PEOPLE
) -> Passage:
    """Return the next passage that belongs to the split."""
    while True:
        passage = draw(rng, facts, people)
        if is_dev(passage.sentences) == (split == "dev"):
            return passage


def to_text(words: str) -> str:
    """Return words as a person would write them: no space before marks, sentences begin large."""
    text = words.replace(" .", ".").replace(" ?", "?")
    return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))


def questions(split: str, per_kind: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield ``per_kind`` prompts of each kind with their answers, kind by kind.

    A passage gives one question only, so that no two questions depend on each other.
    """
    rng = random.Random(seed)
    seen: set[tuple[str, ...]] = set()
    for kind in KINDS:
        number = 0
        while number < per_kind:
            passage = draw_split(rng, split, rng.randint(1, MAX_FACTS))
            fitting = [asked for asked in passage.questions if asked.kind == kind]
            sentences = tuple(sorted(passage.sentences))
            if not fitting or sentences in seen:
                continue
            seen.add(sentences)
            asked = rng.choice(fitting)
            prompt = to_text(" ".join((*passage.sentences, asked.question)))
            name = f"{split}-{kind}-{number}"
            yield {"id": name, "kind": kind, "prompt": prompt, "answer": asked.answer}
            number += 1


def sentences_of(prompt: str) -> tuple[str, ...]:
    """Return the sentences of a prompt, without its question, as ``draw`` makes them."""
    return tuple(f"{part.lower()} ." for part in prompt.split(". ")[:-1])


def check(lines: list[dict[str, str]], drawn: int, seed: int) -> list[str]:
    """Return the faults of a dev set: its split, and passages that training draws too."""
    faults = []
    passages = {tuple(sorted(sentences_of(line["prompt"]))) for line in lines}
    for line in lines:
        if not is_dev(sentences_of(line["prompt"])):
            faults.append(f"{line['id']}: the passage belongs to the training set")
    rng = random.Random(seed)
    for _ in range(drawn):
        sentences = draw_split(rng, "train", rng.randint(1, MAX_FACTS)).sentences
        if tuple(sorted(sentences)) in passages:
            faults.append(f"a training passage is in the dev set: {' '.join(sentences)}")
    return faults


def main(argv: list[str] | None = None) -> int:
    """Write or check a data set; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("train", "dev"), default="dev")
    parser.add_argument("--per-kind", type=int, default=200, help="questions per kind")
    parser.add_argument("--seed", type=int, default=DEV_SEED)
    parser.add_argument("--out", default="-", help="file to write, - for standard output")
    parser.add_argument("--check", metavar="FILE", help="check a dev set instead of writing one")
    parser.add_argument("--train-passages", type=int, default=20000, help="drawn by --check")
    args = parser.parse_args(argv)
    if args.check:
        lines = [json.loads(line) for line in Path(args.check).read_text().splitlines()]
        faults = check(lines, args.train_passages, args.seed + 1)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{len(lines)} questions, {len(faults)} faults")
        return 1 if faults else 0
    found = questions(args.split, args.per_kind, args.seed)
    text = "".join(json.dumps(line) + "\n" for line in found)
    if args.out == "-":
        sys.stdout.write(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
