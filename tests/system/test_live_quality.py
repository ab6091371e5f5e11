"""Sensitivities measured by an agent with streamed blocks, and plans that keep a budget by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backends.base import BackendUnavailable
from backends.registry import backend_class
from calibration.quality.blocks import measure_quality
from calibration.quality.hops import measure_hops
from calibration.quality.students import Options
from model.checkpoint import Checkpoint
from model.passages import built_in_text, split_passages
from model.tokenizer import Tokenizer
from tests.system.cluster import FIXTURES, Cluster, interrupt_at, last_json, wait_for

MODEL = FIXTURES / "llama"
MISTRAL = FIXTURES / "mistral"
WORK = ("--bits=3,8", "--max-tokens=60", "--check-plans=2")


def calibrate(cluster: Cluster, model: Path, *options: str) -> Any:
    return cluster.run("calibrate", "--quality", f"--model={model}", "--json", *options)


def kept(cluster: Cluster) -> list[dict[str, Any]]:
    """What the coordinator has on disk of each model and text."""
    files = (cluster.directory / "coordinator" / "quality").glob("*.json")
    return [json.loads(path.read_text()) for path in files]


@pytest.fixture
def shoal(cluster: Cluster) -> Cluster:
    cluster.start_coordinator()
    for name in ("pi-1", "pi-2"):
        # A cache that holds a block or two at a time, not the model.
        cluster.start_agent(
            name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--storage=64K"
        )
    cluster.wait_for_agents("pi-1", "pi-2")
    return cluster


def test_an_agent_finds_what_one_process_finds(shoal: Cluster) -> None:
    completed = calibrate(shoal, MODEL, "--on=auto", *WORK)
    answer = last_json(completed)
    assert answer["measured_on"] in ("pi-1", "pi-2")
    assert f"{answer['measured_on']} measures" in completed.stderr
    checkpoint = Checkpoint.open(MODEL)
    tokenizer = Tokenizer.load(MODEL)
    sequences = split_passages(map(tokenizer.encode, built_in_text()), 128, 60)
    expected = measure_quality(checkpoint, (3, 8), sequences)
    found = {(item["block"], item["bits"]): item for item in answer["blocks"]}
    assert len(found) == len(expected)
    for one in expected:
        item = found[one.block, one.bits]
        assert item["kl"] == pytest.approx(one.kl, rel=1e-2, abs=1e-8)
        assert item["weight_error"] == pytest.approx(one.weight_error)
    hops = measure_hops(checkpoint, sequences)
    assert [(hop["after"], hop["bits"]) for hop in answer["hops"]] == [
        (checkpoint.spec.block_name(hop.boundary), hop.bits) for hop in hops
    ]
    for item, hop in zip(answer["hops"], hops, strict=True):
        assert item["kl"] == pytest.approx(hop.kl, rel=2e-2 if hop.bits == 8 else 0.3)
    worst = max(item["kl"] for item in answer["hops"] if item["bits"] == 8)
    assert answer["worst_hops"]["8"] == worst
    assert len(answer["plans"]) == 2
    again = calibrate(shoal, MODEL, "--on=pi-2", *WORK)
    assert last_json(again)["measured_on"] is None
    assert "measured before" in again.stderr
    assert last_json(again)["blocks"] == answer["blocks"]

    # Plans use it, with its margin; a measured plan keeps its budget.
    asked = ("plan", str(MODEL), "--json", "--bits=3,8", "--max-weight-error=none")
    best = sum(item["kl"] for item in answer["blocks"] if item["bits"] == 8)
    ratios = [plan["measured_kl"] / plan["predicted_kl"] for plan in answer["plans"]]
    margin = max(1.0, *ratios)
    budget = best * margin * 3
    planned = last_json(shoal.run(*asked, f"--quality-budget={budget}"))
    assert planned["quality"]["margin"] == pytest.approx(margin)
    bits = [block["bits"] for block in planned["plan"]["blocks"]]
    total = sum(found[place]["kl"] for place in enumerate(bits))
    hop_bits = [stage["hop_bits"] for stage in planned["plan"]["stages"][:-1]]
    total += sum(answer["worst_hops"].get(str(width), 0.0) for width in hop_bits)
    assert planned["plan"]["total_sensitivity"] == pytest.approx(total * margin)
    assert total * margin <= budget
    # Split, a hop counts as the worst boundary does.
    pinned = "--pin=head:pi-1", "--pin=embedding:pi-2", "--bits=8"
    for asked_bits, kl in (("8", worst), ("32", 0.0)):
        wide = f"--quality-budget={margin * (best + kl) * 1.001}"
        split = last_json(shoal.run(*asked, wide, *pinned, f"--hop-bits={asked_bits}"))
        assert [stage["hop_bits"] for stage in split["plan"]["stages"]] == [int(asked_bits), None]
        assert split["plan"]["total_sensitivity"] == pytest.approx(margin * (best + kl))
    checked = last_json(shoal.run(*asked, f"--quality-budget={budget}", "--check-quality"))
    assert 0 < checked["quality"]["measured_kl"] <= budget
    impossible = shoal.run(*asked, f"--quality-budget={best / 2}")
    assert impossible.returncode == 1
    assert "budget" in impossible.stderr
    # What was never calibrated is measured while planning.
    first = last_json(shoal.run("plan", str(FIXTURES / "opt-pre"), "--json", "--quality-budget=1"))
    assert first["quality"]["kind"] == "estimated"
    assert 0 < first["quality"]["measured_kl"] <= 1


def test_a_device_is_charged_what_its_arithmetic_loses(cluster: Cluster) -> None:
    try:
        backend_class("tflite_cpu").probe()
    except BackendUnavailable as unavailable:
        pytest.skip(str(unavailable))
    cluster.start_coordinator()
    for name, backend in (("pi", "onnx_cpu"), ("int8", "tflite_cpu")):
        where = f"--coordinator=127.0.0.1:{cluster.control_port}"
        cluster.start_agent(name, where, f"--backend={backend}")
    cluster.wait_for_agents("int8", "pi")
    work = "--bits=4,8", "--max-tokens=60", "--check-plans=0"
    answer = last_json(calibrate(cluster, MODEL, "--on=pi", *work))
    assert answer["measured_on"] == "pi"
    common = {i["block"]: i["kl"] for i in answer["blocks"] if i["bits"] == 8 and not own(i)}
    ours = {item["block"]: item["kl"] for item in answer["blocks"] if own(item)}
    checkpoint = Checkpoint.open(MODEL)
    tokenizer = Tokenizer.load(MODEL)
    sequences = split_passages(map(tokenizer.encode, built_in_text()), 128, 60)
    tflite_cpu = backend_class("tflite_cpu")()
    for one in measure_quality(checkpoint, (8,), sequences, Options(tflite_cpu)):
        if checkpoint.spec.block_kind(one.block) == "layer":
            assert ours.pop(one.block) == pytest.approx(one.kl, rel=1e-2)
            assert one.kl > 2 * common[one.block]
    assert not ours
    assert last_json(calibrate(cluster, MODEL, "--on=auto", *work))["measured_on"] is None

    layers = range(1, checkpoint.spec.head_block)
    ours = {item["block"]: item["kl"] for item in answer["blocks"] if own(item)}
    asked = (
        "plan",
        str(MODEL),
        "--json",
        "--bits=8",
        "--max-weight-error=none",
        "--quality-budget=9",
    )
    pins = [f"--pin=layers=0-{len(layers) - 1}:int8", "--pin=head:pi"]
    planned = last_json(cluster.run(*asked, *pins))
    assert [stage["device"] for stage in planned["plan"]["stages"]][-1] == "pi"
    hop = answer["worst_hops"][str(planned["plan"]["stages"][-2]["hop_bits"])]
    hops = hop * (len(planned["plan"]["stages"]) - 1)
    expected = sum(ours[k] for k in layers) + common[0] + common[checkpoint.spec.head_block] + hops
    total = planned["plan"]["total_sensitivity"] / planned["quality"]["margin"]
    assert total == pytest.approx(expected, rel=1e-3)
    # All of it on the other device is within a budget that this one would exceed.
    budget = 1.01 * sum(common.values()) * planned["quality"]["margin"]
    within = last_json(cluster.run(*asked[:-1], f"--quality-budget={budget}", "--explain"))
    charged = within["plan"]["total_sensitivity"]
    assert charged <= budget < planned["plan"]["total_sensitivity"]


def own(item: dict[str, Any]) -> bool:
    """Whether a result is of a layer in an arithmetic of its own."""
    return bool(item.get("arithmetic") == "tflite_cpu")


def test_what_was_measured_before_ctrl_c_and_a_lost_agent_is_kept(shoal: Cluster) -> None:
    arguments = (
        "calibrate", "--quality", f"--model={MISTRAL}", "--on=pi-1", "--json",
        "--bits=2,3,4,5,6,8", "--check-plans=1", f"--url={shoal.url}",
    )  # fmt: skip
    blocks = Checkpoint.open(MISTRAL).spec.block_count

    def some(least: int) -> bool:
        return any(least < len(one["blocks"]) for one in kept(shoal))

    code, stderr, _ = interrupt_at(list(arguments), lambda: some(0))
    assert code == 130, stderr

    def measures() -> bool:  # The agent's scratch is there.
        return any((shoal.directory / "pi-1" / "blocks").glob(".quality-*"))

    wait_for(lambda: not measures(), 60, "the agent to stop")
    (before,) = kept(shoal)
    assert 0 < len(before["blocks"]) < 6 * blocks
    # Ask for another and switch the agent off meanwhile.
    done = len(before["blocks"])
    process = shoal.spawn("user", *arguments)
    # The first command's last block may come late. So the agent must have begun, too.
    wait_for(lambda: some(done) and measures(), 60, "one more block of the second command")
    shoal.kill("pi-1")
    assert process.wait(20) == 1
    assert "pi-1: device lost while it measured" in shoal.log("user")
    (between,) = kept(shoal)
    assert done < len(between["blocks"]) < 6 * blocks
    rest = last_json(
        shoal.run(*(part for part in arguments[:-1] if "--on" not in part), "--on=auto")
    )
    assert rest["measured_on"] == "pi-2"
    assert len(rest["blocks"]) == 6 * blocks
    (after,) = kept(shoal)
    assert [one for one in after["blocks"] if one in between["blocks"]] == between["blocks"]


def test_a_first_plan_measures_what_it_loses_and_the_next_one_knows(
    cluster: Cluster, tmp_path: Path
) -> None:
    shoal = cluster
    losses = shoal.directory / "coordinator" / "losses"
    losses.mkdir(parents=True)  # Of its own: nothing is known yet.
    shoal.start_coordinator()
    shoal.start_agent("pi-1", f"--coordinator=127.0.0.1:{cluster.control_port}")
    shoal.wait_for_agents("pi-1")
    planned = last_json(shoal.run("plan", str(MODEL), "--json"))
    quality = planned["quality"]
    assert quality["kind"] == "estimated"
    assert 0 < quality["measured_kl"] <= quality["budget"] == 0.03
    assert set(planned["plan"]["blocks"][0]) == {"block", "name", "device", "bits"}
    assert min(block["bits"] for block in planned["plan"]["blocks"]) < 8
    (file,) = losses.iterdir()
    before = file.stat().st_mtime_ns
    loaded = shoal.run("load", str(MODEL))
    assert f"measured on {quality['tokens']} tokens; allowed: 0.03" in loaded.stdout
    assert file.stat().st_mtime_ns == before
    assert last_json(shoal.run("ps", "--json"))["model"]["quality"] == quality
    shoal.run("unload")

    # Nobody can measure a model without text: the default assumes, and a wish is refused.
    mute = Path(shutil.copytree(MODEL, tmp_path / "mute"))
    for path in mute.glob("tokenizer*"):
        path.unlink()
    assumed = last_json(shoal.run("plan", str(mute), "--json"))["quality"]
    assert assumed["kind"] == "assumed"
    assert "there is no text to measure with" in assumed["why"]
    assert "loss not measured (there is no text" in shoal.run("plan", str(mute)).stdout
    refused = shoal.run("plan", str(mute), "--quality-budget=0.1")
    assert refused.returncode == 1
    assert "calibrate --quality --on auto" in refused.stderr
    # One width and no bound leave nothing to decide.
    for free in ("--bits=4", "--max-weight-error=none", "--quality-budget=none"):
        answer = last_json(shoal.run("plan", str(mute), "--json", free))
        assert answer["plan"]["total_sensitivity"] is None
