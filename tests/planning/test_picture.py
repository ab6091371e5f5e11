"""Drawings: valid SVG that shows every block, device and hop of a plan."""

from __future__ import annotations

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from model.quantize import BITS
from model.share import Share
from paper.study import opt_350m
from planning.insight.picture import COLOURS, Curve, curves_svg, ink_on, plan_svg
from planning.labs.lab_file import parse_lab
from planning.plan import Member, Plan, Proof, assess
from tests.planning.described import described_problem

SVG = "{http://www.w3.org/2000/svg}"
DEVICE = "name: n{}, memory: 1G, storage: 1G, layer_ms: {{decode: {{4: 2, 8: 3}}}}, embed_ms: 1"


def make_plan(stages: int, layers: int = 30) -> Plan:
    rows = "\n".join(f"  - {{{DEVICE.format(i)}, head_ms: 1}}" for i in range(stages))
    text = f"devices:\n{rows}\ndefault_link: {{rtt_ms: 1, mbit_per_s: 10}}"
    problem = described_problem(parse_lab(text, "x"), opt_350m(layers), context_tokens=64)
    blocks = layers + 2
    cuts = [blocks * i // stages for i in range(stages + 1)]
    widths = [4 if block % 3 else 8 for block in range(blocks)]
    parts = [(i, cuts[i], widths[cuts[i] : cuts[i + 1]]) for i in range(stages)]
    return assess(problem, parts, Proof("test", 0.0, 0.0))


@pytest.mark.parametrize("stages", [1, 2, 4, 5, 11])
def test_a_plan_is_drawn_whole_and_inside_the_page(stages: int) -> None:
    plan = make_plan(stages)
    root = ElementTree.fromstring(plan_svg(plan, opt_350m(30), "a plan", ["idle"]))  # noqa: S314 - our own
    texts = [item.text for item in root.iter(f"{SVG}text")]
    for stage in plan.stages:
        assert stage.device in texts
    assert {"E", "H", "0", "29"} <= set(texts)
    assert "not used: idle" in texts
    hints = [item.text for item in root.iter(f"{SVG}title")]
    assert "layer 0: 4 bit" in hints
    assert len([hint for hint in hints if hint and hint.endswith(" bit")]) == 32
    assert len([text for text in texts if text and text.endswith(" ms")]) >= 2 * stages - 1
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    corners = set()
    for box in root.iter(f"{SVG}rect"):
        left, top = float(box.attrib.get("x", 0)), float(box.attrib.get("y", 0))
        assert 0 <= left <= left + float(box.attrib["width"]) <= width
        assert 0 <= top <= top + float(box.attrib["height"]) <= height
        if box.attrib.get("rx") == "8":
            corners.add((left, top))
    assert len(corners) == stages


def with_team(plan: Plan, *names: str) -> Plan:
    """The plan with its first stage on a team: the first member has half of each layer."""
    rest = len(names) - 1
    ends = [8 + 8 * k // rest for k in range(rest + 1)]
    cuts = [(0, 8), *itertools.pairwise(ends)]
    members = tuple(
        Member(
            name,
            Share((a, b), (a * 256, b * 256), (a * 3142, b * 3142)),
            0.01, 900 << 20, 1000 << 20, 10, 20,
        )
        for name, (a, b) in zip(names, cuts, strict=True)
    )  # fmt: skip
    first = replace(plan.stages[0], device=names[0], members=members, sum_bits=16, sums_s=0.0123)
    return replace(plan, stages=(first, *plan.stages[1:]))


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_a_team_is_drawn_with_its_members_and_shares(stages: int) -> None:
    plan = with_team(make_plan(stages), "pi-1", "pi-2", "W" * 64)
    root = ElementTree.fromstring(plan_svg(plan, opt_350m(30), "a plan"))  # noqa: S314 - our own
    texts = [item.text or "" for item in root.iter(f"{SVG}text")]
    assert "team of 3" in texts
    assert "pi-1 50%: 900.0 MiB" in texts
    assert "pi-2 25%: 900.0 MiB" in texts
    assert any(text.startswith("WWW") and "25%: 900.0 MiB" in text for text in texts)
    assert "sums 12.30 ms at 16 bit" in texts
    # Nothing lies on another line, and the last block is above the line of the stage's range.
    height = float(root.attrib["height"])
    boxes = [box for box in root.iter(f"{SVG}rect") if box.attrib.get("rx") == "8"]
    blocks = [box for box in root.iter(f"{SVG}rect") if box.attrib.get("rx") == "3"]
    blocks = blocks[: len(plan.stages[0].bits)]
    first, bottom = boxes[0], max(float(box.attrib["y"]) + 20 for box in blocks)
    assert bottom < float(first.attrib["y"]) + float(first.attrib["height"]) < height
    sums = next(item for item in root.iter(f"{SVG}text") if (item.text or "").startswith("sums"))
    above = min(float(block.attrib["y"]) for block in blocks)
    assert float(sums.attrib["y"]) < above


LONG = [f"raspberry-pi-in-the-attic-{i}" for i in range(31)]
BROAD = ["W" * 64, "\u8a2d\u5099" * 32]


@pytest.mark.parametrize("stages", [1, 2, 3, 11])
@pytest.mark.parametrize("unused", [LONG, BROAD, [*LONG, *BROAD]])
def test_no_words_run_off_the_page(stages: int, unused: list[str]) -> None:
    plan = make_plan(stages)
    named = replace(
        plan, stages=tuple(replace(s, device=f"{BROAD[0]}{i}") for i, s in enumerate(plan.stages))
    )
    text = plan_svg(named, opt_350m(30), f"a plan for {BROAD[0]} on {BROAD[0]}", unused)
    root = ElementTree.fromstring(text)  # noqa: S314 - our own
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    # What a letter takes at least, as a share of the font's size.
    least = {"W": 0.9, "\u8a2d": 1.0, "\u5099": 1.0}
    for item in root.iter(f"{SVG}text"):
        size = float(item.attrib["font-size"])
        wide = size * sum(least.get(letter, 0.45) for letter in item.text or "")
        x, y = float(item.attrib["x"]), float(item.attrib["y"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[item.attrib["text-anchor"]]
        assert left >= 0, item.text
        assert left + wide <= width, item.text
        assert 0 < y < height
    shown = " ".join(item.text or "" for item in root.iter(f"{SVG}text"))
    for name in unused:
        assert name in shown or name[:30] in shown


def test_labels_are_told_apart_from_their_blocks() -> None:
    assert {ink_on(colour) for colour in (COLOURS[2], COLOURS[16], COLOURS[32])} == {"#ffffff"}
    assert ink_on("#ffffff") != "#ffffff"


def test_names_are_escaped() -> None:
    text = plan_svg(make_plan(2), opt_350m(30), "<&>", ["</svg><script>"])
    root = ElementTree.fromstring(text)  # noqa: S314 - our own
    assert "<&>" in [item.text for item in root.iter(f"{SVG}text")]
    assert not list(root.iter(f"{SVG}script"))


def test_every_width_has_its_own_colour() -> None:
    assert set(COLOURS) == set(BITS)
    assert len(set(COLOURS.values())) == len(BITS)


@pytest.mark.parametrize("from_zero", [True, False])
def test_curves(from_zero: bool) -> None:
    curve = Curve("a", ((1.0, 50.0), (10.0, 48.0), (100.0, 47.0)), ((47, 53), (46, 50), (45, 49)))
    text = curves_svg(
        [curve, Curve("b", ((1.0, 46.0), (100.0, 52.0)))],
        title="t",
        note="n",
        x_label="x",
        y_label="y",
        from_zero=from_zero,
    )
    root = ElementTree.fromstring(text)  # noqa: S314 - our own
    texts = [item.text or "" for item in root.iter(f"{SVG}text")]
    assert ("y (axis not from 0)" in texts) != from_zero
    assert ("0" in texts) == from_zero
    assert {"1", "10", "100"} <= set(texts)
    for dot in root.iter(f"{SVG}circle"):
        assert 66 <= float(dot.attrib["cy"]) <= 342


def test_a_flat_curve_of_one_point_is_drawn() -> None:
    text = curves_svg(
        [Curve("a", ((3.0, 0.0),))], title="t", note="n", x_label="x", y_label="y", from_zero=False
    )
    ElementTree.fromstring(text)  # noqa: S314 - our own
