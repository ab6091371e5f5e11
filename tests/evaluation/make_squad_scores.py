"""Writes squad_scores.jsonl: odd predictions with the scores of the official SQuAD scripts.

    python tests/evaluation/make_squad_scores.py evaluate-v1.1.py evaluate-v2.0.py

The scripts are those of the SQuAD home page, or their copies in the package of metrics
huggingface/evaluate (metrics/squad and metrics/squad_v2, compute_score.py). Each line of the result
is [prediction, answers, [exact match, F1] of 1.1 or null, [exact match, F1] of 2.0].
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

COUNT = 1200
SCORES = Path(__file__).with_name("squad_scores.jsonl")

WORDS = (
    *("the", "The", "THE", "a", "A", "an", "An", "theatre", "Ann", "a.m.", "U.S.", "U.S.A"),
    *("lamp", "Lamp", "LAMP", "lamps", "the-lamp", "lamp's", "lamp\u2019s", "lamp_post", "42"),
    *("4,200", "4200", "$42", "42%", "3.5", "-7", "1/2", "Stra\u00dfe", "STRASSE", "\u0130stanbul"),
    *(
        "istanbul",
        "caf\u00e9",
        "cafe\u0301",
        "\u00c9cole",
        "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
    ),
    *("\u6771\u4eac", "\u6771 \u4eac", "\u0627\u0644\u0642\u0627\u0647\u0631\u0629", "\U0001f600"),
    *("a\u0301", "\u201cthe\u201d", "\u2014", "-", "...", "!", "&", "no", "None", "n't", "can't"),
    *(
        "of",
        "in",
        "attic",
        "attic.",
        "(attic)",
        '"attic"',
        "a/an",
        "<unk>",
        "</s>",
        "\u00bfd\u00f3nde?",
    ),
)
SPACES = (" ", " ", " ", "  ", "\t", "\n", "\u00a0", "\u2003", "\u200b", "\x1c", "")


def main() -> None:
    first, second = (_module(Path(path)) for path in sys.argv[1:])
    draw = random.Random(1)
    lines = []
    for _ in range(COUNT):
        answers = [_text(draw) for _ in range(draw.randrange(4))]
        prediction = _changed(draw, draw.choice(answers)) if answers and draw.random() < 0.6 else ""
        if not prediction and draw.random() < 0.7:
            prediction = _text(draw)
        old = None
        if answers:
            over = first.metric_max_over_ground_truths
            names = ("exact_match_score", "f1_score")
            old = [float(over(getattr(first, name), prediction, answers)) for name in names]
        asked = {"id": "x", "answers": {"text": answers}}
        exact, f1 = second.get_raw_scores([{"paragraphs": [{"qas": [asked]}]}], {"x": prediction})
        lines.append(json.dumps([prediction, answers, old, [float(exact["x"]), float(f1["x"])]]))
    SCORES.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _text(draw: random.Random) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.choice((0, 1, 1, 2, 3, 5, 8)))]
    return "".join(word + draw.choice(SPACES) for word in words)


def _changed(draw: random.Random, answer: str) -> str:
    """An answer with some words dropped, repeated, moved, or in other case."""
    words = answer.split(" ")
    kind = draw.randrange(5)
    if kind == 0:
        draw.shuffle(words)
    elif kind == 1:
        words = [word for word in words if draw.random() < 0.6]
    elif kind == 2:
        words += [draw.choice(words), draw.choice(WORDS)]
    elif kind == 3:
        words = [draw.choice(("The ", "a ", "")) + word.upper() + "," for word in words]
    return " ".join(words)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
