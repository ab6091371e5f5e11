"""What fewer bits lose, measured while planning: as the full measurement, kept, and refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.registry import backend_class
from benchmarks.default_widths import Comparison, heavy_tailed
from calibration.quality.blocks import measure_plan_kl, measure_quality
from calibration.quality.students import Options
from calibration.shapes import SHAPES
from model import loss_store as losses_module
from model import reference
from model.checkpoint import Checkpoint
from model.errors import Cancelled
from model.experts import route
from model.loss_estimate import (
    LEAST_TOKENS,
    MEASURED_BITS,
    MOST_FLOPS,
    LossEstimate,
    LossUnknown,
    affordable_tokens,
    estimate_losses,
    needed_bytes,
    plan_loss,
)
from model.loss_store import Form, LossStore
from model.memory import memory_bytes
from model.passages import built_in_text, split_passages
from model.quantize import BITS, Format
from model.spec import ExpertSpec
from model.tokenizer import Tokenizer
from planning.losses import assumed, estimated, keep_measured
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.sensitivity import ASSUMED_KL_AT_4_BITS, DEFAULT_QUALITY_BUDGET
from tests.planning.test_advice import BLOCKS, problem_of
from tests.system.cluster import FIXTURES

MODELS = sorted(path.name for path in FIXTURES.iterdir() if (path / "tokenizer.json").exists())
DEMO = Path("examples/tiny-opt/model")


def tokens_of(checkpoint: Checkpoint, count: int = 64) -> list[list[int]]:
    tokenizer = Tokenizer.load(checkpoint.directory)
    encoded = map(tokenizer.encode, built_in_text())
    return split_passages(encoded, min(32, checkpoint.spec.max_context), count)


def estimate(checkpoint: Checkpoint, count: int = 64) -> LossEstimate:
    sequences = tokens_of(checkpoint, count)
    return estimate_losses(checkpoint, sequences, "rtn", 64, lambda *_: None, lambda: False)


@pytest.mark.parametrize("name", MODELS)
def test_the_measured_width_is_what_the_full_measurement_finds(name: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    found = estimate(checkpoint)
    sequences = tokens_of(checkpoint)
    for one in measure_quality(checkpoint, (MEASURED_BITS,), sequences):
        assert found.blocks[one.block][MEASURED_BITS] == pytest.approx(one.kl, rel=1e-2, abs=1e-9)
    assert found.tokens == sum(map(len, sequences))
    assert found.margin >= 1.25
    mixed = [Format.of((3, 5, 8)[block % 3]) for block in range(checkpoint.spec.block_count)]
    kl = plan_loss(checkpoint, mixed, sequences, lambda *_: None, lambda: False)
    assert kl == pytest.approx(measure_plan_kl(checkpoint, mixed, sequences), rel=1e-2)


def test_other_widths_follow_from_the_weight_errors() -> None:
    checkpoint = Checkpoint.open(DEMO)
    found = estimate(checkpoint, 128)
    full = dict.fromkeys((3, 8), 0.0)
    backend = backend_class("onnx_cpu")()
    for one in measure_quality(checkpoint, (3, 8), tokens_of(checkpoint, 128), Options(backend)):
        full[one.bits] += one.kl
    for bits, total in full.items():
        # Errors of single blocks have directions, which a ratio of sizes does not know.
        assert 0.4 < math.fsum(row[bits] for row in found.blocks) / total < 2.5, bits
    for row in found.blocks:
        assert set(row) == set(BITS)
        assert row[3] > row[4] > row[5] > row[6] > row[8] > row[16] >= row[32] == 0


def copied(tmp_path: Path, name: str = "llama") -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


ROUTED = FIXTURES.parent / "families" / "qwen3_moe"


def test_the_tokens_of_each_expert_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(ROUTED)
    spec = checkpoint.spec
    sequences = [[(7 * token + start) % spec.vocab for token in range(20)] for start in range(3)]
    found = estimate_losses(checkpoint, sequences, "rtn", 64, lambda *_: None, lambda: False)
    assert found.experts is not None
    expected = [np.zeros(layer.experts.count, int) for layer in spec.layers if layer.experts]
    turns = itertools.cycle(expected)

    def counting(experts: ExpertSpec, scores: Any) -> Any:
        places, weights = route(experts, scores)
        np.add.at(next(turns), places.ravel(), 1)
        return places, weights

    monkeypatch.setattr(reference, "route", counting)
    for sequence in sequences:
        reference.ReferenceModel.from_checkpoint(checkpoint).forward(sequence)
    assert len(expected) > 1
    assert [list(row) for row in found.experts.layers] == [row.tolist() for row in expected]


def test_counts_of_experts_are_kept(tmp_path: Path) -> None:
    model = Path(shutil.copytree(ROUTED, tmp_path / "model"))
    for file in (FIXTURES / "llama").glob("tokenizer*"):
        shutil.copy(file, model)
    form = Form(Checkpoint.open(model), "rtn", 64)
    found = LossStore(tmp_path).losses(form, lambda *_: None, lambda: False).experts
    kept = LossStore(tmp_path).known(form)
    assert found is not None
    assert kept is not None
    assert kept.experts is not None
    assert kept.experts.layers == found.layers
    assert estimated(kept, []).experts is kept.experts
    (path,) = (tmp_path / "losses").iterdir()
    content = json.loads(path.read_text())
    for other, is_known in ((None, True), ([[-1]], False), ([["x"]], False), (3, False)):
        path.write_text(json.dumps(content | {"experts": other}))
        now = LossStore(tmp_path).known(form)
        assert (now is not None) == is_known
        assert now is None or now.experts is None
    del content["experts"]  # As earlier versions wrote it.
    path.write_text(json.dumps(content))
    assert LossStore(tmp_path).known(form) is not None


class Reports:
    """Counts steps; a measurement that was made before has none."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_what_was_measured_is_kept_until_the_model_changes(tmp_path: Path) -> None:
    model = copied(tmp_path)
    form = Form(Checkpoint.open(model), "rtn", 64)
    store = LossStore(tmp_path)
    first = Reports()
    found = store.losses(form, first, lambda: False)
    count = form.checkpoint.spec.block_count
    assert first.steps == [(block + 1, count) for block in range(count)]
    bits = (4,) * count
    kl = store.plan_loss(form, bits, lambda *_: None, lambda: False)
    again = Reports()
    kept = LossStore(tmp_path)
    assert kept.losses(form, again, lambda: False) == replace(found, plans={bits: kl})
    assert kept.plan_loss(form, bits, again, lambda: False) == kl
    assert not again.steps
    # Another kind of format, and other weights, are other measurements.
    assert kept.known(Form(form.checkpoint, "rtn", 32)) is None
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert kept.known(Form(Checkpoint.open(model), "rtn", 64)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: text.replace('"margin": ', '"margin": -'),
        lambda text: json.dumps(json.loads(text) | {"blocks": []}),
        lambda text: json.dumps(json.loads(text) | {"tokens": float("inf")}),
        lambda text: json.dumps(json.loads(text) | {"plans": [[[4], "x"]]}),
    ],
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, spoil: Any) -> None:
    form = Form(Checkpoint.open(FIXTURES / "llama"), "rtn", 64)
    store = LossStore(tmp_path)
    found = store.losses(form, lambda *_: None, lambda: False)
    (file,) = (tmp_path / "losses").iterdir()
    file.write_text(spoil(file.read_text()))
    assert store.known(form) is None
    anew = store.losses(form, lambda *_: None, lambda: False)
    assert anew.blocks == found.blocks


def test_a_stop_keeps_nothing_half_done(tmp_path: Path) -> None:
    form = Form(Checkpoint.open(FIXTURES / "llama"), "rtn", 64)
    store, steps = LossStore(tmp_path), Reports()
    with pytest.raises(Cancelled):
        store.losses(form, steps, lambda: len(steps.steps) >= 1)
    assert 1 <= len(steps.steps) < form.checkpoint.spec.block_count
    assert store.known(form) is None


def test_no_text_no_memory_and_wild_weights_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(tmp_path)
    store = LossStore(tmp_path)

    def why() -> str:
        form = Form(Checkpoint.open(model), "rtn", 64)
        with pytest.raises(LossUnknown) as caught:
            store.losses(form, lambda *_: None, lambda: False)
        return str(caught.value)

    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    # Infinite or absurd numbers in the last tensor, whatever it is.
    data[-64:] = b"\x7f\x7f" * 32
    weights.write_bytes(data)
    assert "the weights cannot be measured" in why() or "not finite" in why()
    shutil.rmtree(model)
    copied(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(losses_module, "memory_bytes", lambda: (1000, 1000))
        assert "measuring needs" in why()
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "there is no text to measure with" in why()


def test_tokens_shrink_with_the_model_until_it_is_too_large() -> None:
    spec = Checkpoint.open(FIXTURES / "llama").spec
    assert affordable_tokens(spec) == 256
    wide = replace(spec.layers[0], hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128)
    large = replace(spec, hidden=4096, embed_dim=4096, vocab=128_256, layers=(wide,) * 32)
    assert affordable_tokens(large) == LEAST_TOKENS
    assert MOST_FLOPS < 1e14
    with pytest.raises(LossUnknown, match="too large"):
        affordable_tokens(replace(large, layers=(wide,) * 80))


def test_what_is_assumed_is_the_rule_and_bears_its_reason() -> None:
    spec = Checkpoint.open(FIXTURES / "llama").spec
    raw = assumed(spec, "there are no weights", ["", "tflite_cpu"])
    assert math.fsum(row[4] for row in raw.rows) == pytest.approx(ASSUMED_KL_AT_4_BITS)
    assert math.fsum(row[8] for row in raw.rows) < DEFAULT_QUALITY_BUDGET < ASSUMED_KL_AT_4_BITS
    assert raw.source.kind == "assumed"
    assert raw.source.why == "there are no weights"
    assert raw.own["tflite_cpu"][1][8] == pytest.approx(10 * raw.rows[1][8])
    assert raw.hops[8] == max(row[8] for row in raw.rows)
    measured = estimated(LossEstimate(tuple(raw.rows), 1.3, 64, 1.0), [])
    assert (measured.source.kind, measured.source.tokens, measured.margin) == ("estimated", 64, 1.3)


def tight() -> PlanningProblem:
    """Each block at 4 bits takes a fifth of the budget."""
    rows = [{4: 0.01, 8: 0.0001} for _ in BLOCKS]
    return problem_of(sensitivities=rows, quality_budget=0.05)


def test_a_plan_that_loses_more_than_predicted_is_made_again() -> None:
    problem, seen = tight(), []

    async def measured(bits: tuple[int, ...]) -> float:
        seen.append(bits)
        return 0.02 * bits.count(4)  # Twice what was predicted.

    async def again(tighter: PlanningProblem) -> Plan:
        return solve(tighter)

    plan, kl = asyncio.run(keep_measured(problem, solve(problem), measured, again))
    assert len(seen) >= 2
    assert kl <= 0.05
    bits = tuple(placement.bits for placement in plan.placements)
    assert bits == seen[-1]
    assert bits.count(4) >= 1
    with pytest.raises(PlanError, match="above the budget"):
        asyncio.run(keep_measured(problem, solve(problem), measured, None))


def test_a_budget_that_no_measured_plan_keeps_is_named_as_it_was_given() -> None:
    """Plans with a tighter budget are made for it. Advice on that one would be too low."""
    problem = tight()

    async def measured(bits: tuple[int, ...]) -> float:
        return 0.07

    async def again(tighter: PlanningProblem) -> Plan:
        return solve(replace(tighter, quality_budget=1e-9))

    with pytest.raises(
        PlanError, match=r"0\.07 with its hops, above the budget of 0\.05"
    ) as caught:
        asyncio.run(keep_measured(problem, solve(problem), measured, again))
    assert not isinstance(caught.value, InfeasiblePlan)


def test_sequences_together_are_as_one_at_a_time() -> None:
    from model.reference import ReferenceModel

    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    model = ReferenceModel.from_checkpoint(checkpoint)
    sequences = [[1, 5, 9, 2], [3, 3], [7, 1, 4]]
    together = model.forward_sequences(np.concatenate(sequences), [4, 2, 3])
    apart = np.concatenate([model.forward(sequence) for sequence in sequences])
    assert together == pytest.approx(apart, rel=1e-4, abs=1e-5)


def test_the_default_of_a_heavy_tailed_model_lies_between_uniform_ones(tmp_path: Path) -> None:
    small = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    }
    model = heavy_tailed(tmp_path / "model", dict(SHAPES["llama-1b"]) | small)
    comparison = Comparison(model, tmp_path / "state")
    default = comparison.by_default()
    wide, narrow = comparison.uniform(8), comparison.uniform(4)
    assert default.plan is not None
    assert default.kl is not None
    assert default.kl <= DEFAULT_QUALITY_BUDGET
    assert narrow.decode_s <= default.plan.decode_s < wide.decode_s
    if comparison.measured(narrow) <= 0.5 * DEFAULT_QUALITY_BUDGET:
        assert default.plan.decode_s == pytest.approx(narrow.decode_s)
    faster = comparison.at_equal_loss("all 4", narrow)
    assert faster.plan is not None
    assert faster.plan.decode_s <= narrow.decode_s * (1 + 1e-9)


def test_page_cache_of_a_control_group_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A service that has just read the weights has them in its cache."""
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    needed = needed_bytes(checkpoint.spec)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.max").write_text(f"{2 * needed}\n")
    (group / "memory.current").write_text(f"{2 * needed}\n")
    (group / "memory.stat").write_text(f"anon {needed}\ninactive_file {needed}\n")
    monkeypatch.setattr(losses_module, "memory_bytes", partial(memory_bytes, tmp_path))
    assert losses_module._text(checkpoint)
    (group / "memory.stat").write_text(f"anon {needed + 1}\ninactive_file {needed - 1}\n")
    with pytest.raises(LossUnknown, match="measuring needs"):
        losses_module._text(checkpoint)
