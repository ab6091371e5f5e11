"""Described testbeds: what a file means, and one exact line for each way to get it wrong."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from paper.study import opt_350m
from planning.labs.lab import ASSUMED_SUM_S, LabError, times_of
from planning.labs.lab_file import LEAST, MOST, parse_lab, read_lab
from planning.plan import verify
from planning.planner import solve
from planning.problem import DEFAULT_HOPS
from tests.planning.described import described_problem
from tests.planning.shapes import llama_8b

LABS = sorted((Path(__file__).parents[2] / "examples" / "labs").glob("*.yaml"))

LAB = """\
templates:
  pi: &pi
    memory: 1G
    storage: 8G
    bits: [4, 8]
    layer_ms:
      decode: {4: 2, 8: 3.5}
      prefill_per_token: {4: 0.5, 8: 0.6}
    embed_ms: 0.1
    head_ms: {4: 5, 8: 9}
devices:
  - {<<: *pi, name: pi-1, watts: 6}
  - <<: *pi
    name: pi-2
    memory: 500M
    container: {4: 8}
    call_ms: 0.2
  - {<<: *pi, name: pi-3}
links:
  - {from: pi-1, to: pi-2, rtt_ms: 0.4, mbit_per_s: 80}
  - {from: pi-1, to: pi-3, rtt_ms: 7, mbit_per_s: 8, one_way: true}
default_link: {rtt_ms: 1, mbit_per_s: 800}
"""


def test_devices_share_layers_unless_the_file_says_otherwise() -> None:
    lab = parse_lab(LAB, "lab.yaml")
    assert [device.shares for device in lab.devices] == [True, True, True]
    assert lab.devices[0].share_times == {}
    assert lab.devices[0].sum_s == ASSUMED_SUM_S
    described = LAB.replace("watts: 6", "watts: 6, shares: false").replace(
        "call_ms: 0.2",
        "call_ms: 0.2\n    shares: {0.5: 0.56, 0.25: 0.33, 1: 1.1}\n    sum_ms: 0.15",
    )
    first, second, third = parse_lab(described, "lab.yaml").devices
    assert (first.shares, second.shares, third.shares) == (False, True, True)
    assert list(second.share_times.items()) == [(0.25, 0.33), (0.5, 0.56), (1.0, 1.1)]
    assert second.sum_s == pytest.approx(1.5e-4)
    # An accelerator of its own arithmetic runs no shares, unless the file says so.
    own = LAB.replace("watts: 6", "watts: 6, arithmetic: tflite_cpu")
    assert not parse_lab(own, "lab.yaml").devices[0].shares
    willing = own.replace("watts: 6", "watts: 6, shares: true")
    assert parse_lab(willing, "lab.yaml").devices[0].shares


def test_a_description_means_what_it_says() -> None:
    lab = parse_lab(LAB, "lab.yaml")
    first, second, third = lab.devices
    assert (first.name, first.memory_bytes, first.bits) == ("pi-1", 1 << 30, (4, 8))
    assert second.memory_bytes == 500 << 20
    assert second.container == {4: 8, 8: 8}
    assert second.call_s == pytest.approx(2e-4)
    assert third.layer_decode_s == {4: pytest.approx(0.002), 8: pytest.approx(0.0035)}
    assert third.embed_s == {4: pytest.approx(1e-4), 8: pytest.approx(1e-4)}
    assert [device.watts for device in lab.devices] == [6.0, None, None]
    links = {(link.source, link.target): link for link in lab.links}
    assert len(links) == 6
    assert links["pi-2", "pi-1"].bytes_per_s == links["pi-1", "pi-2"].bytes_per_s == 10e6
    assert links["pi-1", "pi-3"].rtt_s == pytest.approx(0.007)
    assert links["pi-3", "pi-1"].rtt_s == pytest.approx(0.001)


def test_its_problem_has_the_described_times() -> None:
    problem = described_problem(parse_lab(LAB, "lab.yaml"), opt_350m(4), context_tokens=64)
    assert [device.name for device in problem.devices] == ["pi-1", "pi-2", "pi-3"]
    assert problem.bits == (4, 8)
    layer = problem.devices[0].option(1, 4)
    head = problem.devices[0].option(5, 8)
    assert layer is not None
    assert head is not None
    assert (layer.decode_s, layer.prefill_s_per_token) == (0.002, 0.0005)
    # Only the last of a prompt's rows goes through the head: a chunk has 64.
    assert head.prefill_s_per_token == pytest.approx(0.009 / 64)
    narrow, wide = (problem.devices[i].option(1, 4) for i in (0, 1))
    assert narrow is not None
    assert wide is not None
    assert wide.executed_bytes > narrow.executed_bytes
    plan = solve(problem)
    verify(plan, problem)


def test_pairs_may_have_no_link() -> None:
    text = LAB.replace("default_link: {rtt_ms: 1, mbit_per_s: 800}", "default_link: none")
    links = {(link.source, link.target) for link in parse_lab(text, "lab.yaml").links}
    assert links == {("pi-1", "pi-2"), ("pi-2", "pi-1"), ("pi-1", "pi-3")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hops: [16, 8, 32]", [(8, None), (16, 0.0), (32, 0.0)]),
        ("hops: {8: 4e-3, 16: 0}", [(8, 0.004), (16, 0.0)]),
    ],
)
def test_widths_of_hops(text: str, expected: list[tuple[int, float | None]]) -> None:
    lab = parse_lab(f"{LAB}\n{text}\n", "lab.yaml")
    assert [(form.bits, form.sensitivity) for form in lab.hop_formats] == expected
    assert described_problem(lab, opt_350m(2), context_tokens=64).hop_formats == (
        lab.hop_formats or DEFAULT_HOPS
    )


def test_prefill_defaults_to_decode() -> None:
    text = LAB.replace("      prefill_per_token: {4: 0.5, 8: 0.6}\n", "")
    device = parse_lab(text, "lab.yaml").devices[0]
    assert device.layer_prefill_s_per_token == device.layer_decode_s


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("watts: 6", "shares: maybe", "12: shares: expected true or false, found 'maybe'"),
        ("watts: 6", "shares: {}", "12: shares: expected true, false, or times like"),
        ("watts: 6", "shares: {2: 1}", "12: shares: 2 is more than a whole layer"),
        ("watts: 6", "shares: {0.5: -1}", "12: shares at 0.5: expected a number above 0"),
        ("watts: 6", "sum_ms: -1", "12: sum_ms: expected a number from 0 up"),
        ("watts: 6", "wats: 6", "12: unknown key 'wats' in a device: known are name, memory"),
        ("rtt_ms: 0.4", "rtt_ms: -1", "20: rtt_ms: expected a number from 0 up, found -1"),
        ("mbit_per_s: 80}", "mbit_per_s: 0}", "20: mbit_per_s: expected a number above 0, found 0"),
        ("mbit_per_s: 80}", "mbit_per_s: .nan}", "20: mbit_per_s: expected a number, found '.nan'"),
        ("mbit_per_s: 80}", "mbit_per_s: 1e999}", "expected a number above 0, found 1e999"),
        ("mbit_per_s: 80}", "mbit_per_s: 1e-320}", "20: mbit_per_s: 1e-320 is not between 1e-12"),
        ("rtt_ms: 0.4", "rtt_ms: 1e308", "20: rtt_ms: 1e308 is not between 1e-12 and 1e+12"),
        ("watts: 6", "call_ms: 1e300", "12: call_ms: 1e300 is not between 1e-12 and 1e+12"),
        ("to: pi-2", "to: pi-9", "20: to: unknown device pi-9: known are pi-1, pi-2, pi-3"),
        ("to: pi-2", "to: pi-1", "20: a link from pi-1 to itself: drop it"),
        ("to: pi-3,", "to: pi-2,", "21: the link from pi-1 to pi-2 is described twice (first in"),
        ("default_link: {rtt_ms: 1, mbit_per_s: 800}", "", "no link from pi-2 to pi-3 (3 links"),
        ("default_link: {rtt_ms: 1,", "default_link: {", "22: default_link has no rtt_ms: add it"),
        ("name: pi-2", "name: pi-1", "13: device pi-1 is described twice (first in line 12)"),
        ("memory: 500M", "memory: lots", "15: memory: size 'lots': expected a number and a unit"),
        ("memory: 500M", "memory: 0", "15: memory: expected more than 0 bytes"),
        ("bits: [4, 8]", "bits: [4, 7]", "5: bits: '7' is no width: known are 2, 3, 4"),
        ("bits: [4, 8]", "bits: [4, 4]", "5: bits: expected each width once"),
        ("bits: [4, 8]", "bits: [4, 8, 16]", "7: layer_ms.decode has no 16 bit, which pi-1 runs"),
        ("bits: [4, 8]", "bits: [4]", "7: layer_ms.decode has 8 bit, which pi-1 does not run"),
        ("{4: 0.5, 8: 0.6}", "{4: 0.5}", "8: layer_ms.prefill_per_token has no 8 bit: add it"),
        ("{4: 5, 8: 9}", "{4: 5, 8: 9, 16: 1}", "10: head_ms has 16 bit, which is not in bits"),
        ("{4: 5, 8: 9}", "{4: 5, 8: x}", "10: head_ms at 8 bit: expected a number, found 'x'"),
        (
            "container: {4: 8}",
            "container: {8: 4}",
            "16: container: 8-bit weights do not fit 4 bits",
        ),
        ("one_way: true", "one_way: yes", "21: one_way: expected true or false, found 'yes'"),
        ("embed_ms: 0.1", "storage: 1G", "9: storage is there twice in a device: drop one"),
        ("    embed_ms: 0.1\n", "", "a device has no embed_ms: add it"),
        ("links:", "links: 5", "not YAML"),
        (
            "links:",
            "hops: [8, 4]\nlinks:",
            "19: hops: '4': expected each width once, out of 32, 16, 8",
        ),
        ("links:", "hops: [8, 8]\nlinks:", "19: hops: '8': expected each width once"),
        ("links:", "hops: []\nlinks:", "19: hops: expected widths like [16, 8]"),
        ("links:", "hops: 8\nlinks:", "19: hops: expected a list"),
        ("links:", "hops: {8: -1}\nlinks:", "19: hops at 8 bit: expected a number from 0 up"),
        ("    name: pi-2", "    name: [pi-2]", "14: expected a plain word or number"),
    ],
)
def test_mistakes_get_a_line_and_advice(old: str, new: str, message: str) -> None:
    assert old in LAB
    with pytest.raises(LabError) as caught:
        parse_lab(LAB.replace(old, new, 1), "lab.yaml")
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert re.match(r"lab\.yaml:\d+: ", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lab.yaml: empty"),
        ("[1, 2]", "lab.yaml:1: the file: expected `key: value` pairs"),
        ("devices: []", "lab.yaml:1: devices: describe at least one"),
        ("devices: {a: 1}", "lab.yaml:1: devices: expected a list"),
        ("devices: [*unknown]", "lab.yaml:1: not YAML"),
        ("a: &a {<<: *a}", "lab.yaml:1: "),
        ("devices: &d [*d]", "lab.yaml:1: a device: expected `key: value` pairs"),
        ("devices: " + "[" * 5000, "lab.yaml"),
        (b"\xff\xfe\x00", "lab.yaml"),
    ],
)
def test_other_files_are_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(LabError) as caught:
        parse_lab(text, "lab.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("figures", [*itertools.product((LEAST, MOST), repeat=3)])
def test_numbers_at_their_bounds_are_planned_with(figures: tuple[float, float, float]) -> None:
    own, rtt, speed = (f"{figure:g}" for figure in figures)
    text = LAB.replace("call_ms: 0.2", f"call_ms: {own}\n    sum_ms: {own}\n    watts: {own}")
    text = text.replace("embed_ms: 0.1", f"embed_ms: {own}").replace("{4: 5,", f"{{4: {own},")
    text = text.replace("rtt_ms: 1,", f"rtt_ms: {rtt},").replace("800}", f"{speed}}}")
    problem = described_problem(parse_lab(text, "lab.yaml"), opt_350m(4), context_tokens=64)
    pinned = replace(problem, pins={0: 0, problem.spec.head_block: 1})
    assert solve(pinned, time_limit_s=5).stages


def test_a_file_that_is_missing_or_huge(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no such file"):
        read_lab(tmp_path / "lab.yaml")
    huge = tmp_path / "huge.yaml"
    huge.write_text("#" * (1 << 20) + "#")
    with pytest.raises(LabError, match="larger than 1 MiB"):
        read_lab(huge)


MODEL = "model: {name: opt-350m, hidden: 1024, ffn: 4096, heads: 16, vocab: 50272, gated: false}\n"


def test_times_of_the_named_model_are_taken_as_they_are() -> None:
    lab = parse_lab(MODEL + LAB, "lab.yaml")
    spec = opt_350m(4)
    times = times_of(lab, spec)
    assert (times.model, times.assumed) == ("opt-350m", False)
    assert times.text == "those that lab.yaml describes for opt-350m"
    layer = described_problem(lab, spec, context_tokens=64).devices[0].option(1, 4)
    assert layer is not None
    assert layer.decode_s == 0.002


def test_times_of_shares_that_the_file_lacks_are_assumed() -> None:
    lab = read_lab(LABS[1])
    described, others = times_of(lab, llama_8b(), ["pi-1", "pi-2"]), read_lab(LABS[2])
    assert lab.source.endswith("four-pis-8b.yaml")
    assert not described.assumed
    assert not times_of(others, llama_8b()).text.endswith("(docs/labs.md)")
    with_team = times_of(others, llama_8b(), ["pi-1", "pi-2"])
    assert with_team.assumed
    assert with_team.text.endswith("; times of shares are assumed: a tenth is fixed (docs/labs.md)")


def test_times_of_another_model_are_scaled_by_weights_and_say_so() -> None:
    spec = opt_350m(4)
    smaller = replace(spec.layers[0], ffn=1024, heads=8, kv_heads=8)
    other = replace(spec, layers=(spec.layers[0], smaller), vocab=25136)
    lab = parse_lab(MODEL + LAB, "lab.yaml")
    # 4 x 1024 x 1024 + 2 x 4096 x 1024 weights; 4 x 512 x 1024 + 2 x 1024 x 1024.
    times = times_of(lab, other)
    assert (times.model, times.assumed) == ("opt-350m", True)
    assert times.text == (
        "scaled from opt-350m by weights (layers x 0.333 to 1, head x 0.5): assumed"
    )
    device = described_problem(lab, other, context_tokens=64).devices[0]
    same, scaled, head = (device.option(block, 4) for block in (1, 2, 3))
    assert same is not None
    assert scaled is not None
    assert head is not None
    assert same.decode_s == pytest.approx(0.002)
    assert scaled.decode_s == pytest.approx(0.002 / 3)
    assert scaled.prefill_s_per_token == pytest.approx(0.0005 / 3)
    assert head.decode_s == pytest.approx(0.005 / 2)


def test_times_of_no_model_are_assumed() -> None:
    times = times_of(parse_lab(LAB, "lab.yaml"), opt_350m(4))
    assert times.model is None
    assert times.assumed
    assert "lab.yaml does not say which model its times are for" in times.text
    assert "add `model:`" in times.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden: 1024, ", "", "1: model has no hidden: add it"),
        (
            "hidden: 1024",
            "hidden: 0",
            "1: model.hidden: expected a whole number above 0, found '0'",
        ),
        ("ffn: 4096", "ffn: 1e3", "1: model.ffn: expected a whole number above 0, found '1e3'"),
        ("heads: 16", "heads: 48", "1: model.heads: 48 do not divide hidden: say head_dim"),
        ("gated: false", "gated: no", "1: model.gated: expected true or false"),
        ("vocab: 50272", "size: 50272", "1: unknown key 'size' in model"),
    ],
)
def test_mistakes_in_the_model_get_a_line(old: str, new: str, message: str) -> None:
    with pytest.raises(LabError, match=re.escape(f"lab.yaml:{message}")):
        parse_lab(MODEL.replace(old, new) + LAB, "lab.yaml")


def test_widths_that_nobody_runs_are_named() -> None:
    with pytest.raises(LabError, match="no device runs 2, 16 bit: the described widths are 4, 8"):
        described_problem(parse_lab(LAB, "lab.yaml"), opt_350m(2), bits=[16, 2], context_tokens=64)


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_the_shipped_labs_plan(path: Path) -> None:
    assert "ASSUMED" in path.read_text()
    lab = read_lab(path)
    assert lab.model is not None
    problem = described_problem(lab, opt_350m(4), bits=(8,), context_tokens=256)
    assert len(problem.links) == len(lab.devices) * (len(lab.devices) - 1)
    verify(solve(problem, time_limit_s=20), problem)


def test_eight_labs_are_shipped() -> None:
    assert [path.stem for path in LABS] == [
        "coral-and-pi",
        "four-pis-8b",
        "four-pis",
        "home-4-pis",
        "jetson-pis-coral",
        "mixed-32",
        "smart-city-16",
        "wifi-3",
    ]
