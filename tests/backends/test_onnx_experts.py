"""Experts in ONNX Runtime: sessions of their own, threads, prepared weights."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime")

from backends import onnx_cpu, onnx_experts
from backends.base import BackendError, StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from backends.onnx_experts import ExpertThreads, pieces
from backends.onnx_session import container_bits, mixes_experts
from backends.onnx_share import PROMPT_ROWS
from model.experts import busiest, by_expert, route
from model.quantize import Format
from model.reference import ReferenceModel
from model.spec import ExpertSpec, ModelSpec
from tests.backends.test_conformance import Artifacts, random_model, stored
from tests.backends.test_onnx_cpu import LAYER, assert_similar

EXPERTS = ExpertSpec(count=6, active=2, shared_ffn=64, shared_gate=True)
ROUTED = replace(LAYER, ffn=64, experts=EXPERTS)
OPTIONS = StageOptions(slots=4, context_tokens=64, threads=2)
ALONE = replace(OPTIONS, team_sum=lambda rows: rows)

Model = tuple[ModelSpec, Artifacts]


def results(model: Model, options: StageOptions) -> npt.NDArray[np.float32]:
    """Logits of a prompt, of the token behind it, and of that token with another sequence."""
    spec, artifacts = model
    rows = np.random.default_rng(1).standard_normal((40, spec.hidden), np.float32)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        prompt = stage.forward(1, 0, rows[:PROMPT_ROWS])
        one = stage.forward(1, PROMPT_ROWS, rows[-1:])
        return np.concatenate([prompt, one, stage.decode([2, 1], [0, 17], rows[:2])])


@pytest.mark.parametrize("options", [OPTIONS, ALONE], ids=["whole", "share"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
def test_prepared_experts_give_the_same(bits: int, options: StageOptions, tmp_path: Path) -> None:
    spec, tensors = random_model(ROUTED)
    model = spec, stored(tmp_path / "blocks", tensors, Format.of(bits, group_size=32))[1:]
    expected = results(model, options)
    kept = replace(options, prepared_dir=tmp_path / "prepared")
    for _ in range(2):
        np.testing.assert_array_equal(results(model, kept), expected)
    with closing(OnnxCpuBackend().load(*model, kept)) as stage:
        graphs = [path for path in stage.kept_files if path.suffix == ".onnx"]
    apart = bits in (2, 16) or not mixes_experts(container_bits()[bits])
    assert (len(graphs) >= len(spec.layers) * (1 + EXPERTS.count)) == apart


MIXTURES = {
    "softmax": replace(EXPERTS, normalized=False),
    "normalized": EXPERTS,
    "best": replace(EXPERTS, scoring="topk_softmax", shared_ffn=0, shared_gate=False),
    "clipped": ExpertSpec(6, 3, "topk_softmax", bias=True, limit=0.5),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("held", [0, 1, 4])
@pytest.mark.parametrize("kind", list(MIXTURES))
def test_one_operator_for_all_experts_gives_what_sessions_give(
    kind: str, held: int, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mixes_experts(bits):
        pytest.skip("the runtime's operator for experts is slow")
    experts = replace(MIXTURES[kind], first=1 if held else 0, held=held)
    spec, tensors = random_model(replace(ROUTED, ffn=96, experts=experts))
    model = spec, stored(tmp_path, tensors, Format.of(bits, group_size=32))[1:]
    for options in (OPTIONS, ALONE):
        mixed = results(model, options)
        with monkeypatch.context() as patch:
            patch.setattr(onnx_cpu, "mixes_experts", lambda bits: False)
            apart = results(model, options)
        assert_similar(mixed, apart)


def test_experts_stay_apart_where_packing_them_together_takes_too_much_memory(
    tmp_path: Path,
) -> None:
    if not mixes_experts(4):
        pytest.skip("the runtime's operator for experts is slow")
    spec, tensors = random_model(ROUTED)
    model = spec, stored(tmp_path / "blocks", tensors, Format.of(4, group_size=32))[1:]
    layer_bytes = model[1][0][1].stat().st_size
    kept = []
    for room_bytes in (layer_bytes, 8 * layer_bytes):
        options = replace(OPTIONS, prepared_dir=tmp_path / "prepared", memory_bytes=room_bytes)
        OnnxCpuBackend().load(*model, options).close()
        kept.append(len(list((tmp_path / "prepared").iterdir())))
    # Layers and head, first also experts.
    assert kept == [3, 2]


def test_layers_with_and_without_experts_take_turns(tmp_path: Path) -> None:
    """Qwen2-MoE may leave experts out of any layer."""
    spec, tensors = random_model(ROUTED)
    _, others = random_model(LAYER)
    layers = [LAYER if index % 2 == 0 else ROUTED for index in range(len(spec.layers))]
    spec = replace(spec, layers=tuple(layers))
    blocks = [
        others[block]
        if spec.block_kind(block) == "layer" and spec.layer(block).experts is None
        else tensors[block]
        for block in range(spec.block_count)
    ]
    artifacts = stored(tmp_path, blocks, Format.of(32))
    tokens = np.arange(9) % spec.vocab
    expected = ReferenceModel.from_artifacts(spec, artifacts).forward(tokens)[-1:]
    with closing(OnnxCpuBackend().load(spec, artifacts, replace(OPTIONS, exact=True))) as stage:
        np.testing.assert_allclose(stage.forward(0, 0, tokens), expected, atol=1e-4)


def test_wide_experts_are_cut_to_occupy_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = replace(ROUTED, ffn=1088, experts=replace(EXPERTS, active=2, bias=True))
    assert [pieces(layer, threads) for threads in (1, 2, 4)] == [1, 1, 2]
    monkeypatch.setattr(onnx_experts, "LEAST_COLUMNS", 128)
    assert pieces(layer, 3) == 3
    spec, tensors = random_model(layer)
    model = spec, stored(tmp_path, tensors, Format.of(8))[1:]
    one = results(model, replace(OPTIONS, threads=1))
    assert_similar(results(model, replace(OPTIONS, threads=4)), one)


def test_a_failing_expert_fails_the_pass() -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    threads = ExpertThreads(3)
    with pytest.raises(RuntimeError, match="out of memory"):
        threads.run([lambda: None, broken, lambda: None])
    done: list[int] = []
    threads.run([lambda: done.append(1)] * 8)
    assert len(done) == 8
    threads.close()


def test_threads_end_with_their_stage(tmp_path: Path) -> None:
    spec, tensors = random_model(ROUTED)
    artifacts = stored(tmp_path, tensors, Format.of(4))[1:]
    before = set(threading.enumerate())
    stage = OnnxCpuBackend().load(spec, artifacts, OPTIONS)
    stage.forward(0, 0, np.ones((1, spec.hidden), np.float32))
    mine = [one for one in threading.enumerate() if one not in before and one.name == "expert"]
    assert mine
    stage.close()
    for one in mine:
        one.join(timeout=60)
        assert not one.is_alive()
    with pytest.raises(BackendError, match="closed"):
        stage.forward(0, 0, np.ones((1, spec.hidden), np.float32))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax"])
def test_routing(scoring: str, normalized: bool) -> None:
    spec = ExpertSpec(8, 3, scoring, normalized)  # type: ignore[arg-type]  # The two literals.
    scores = np.random.default_rng(0).standard_normal((5, 8)) * 3
    chosen, weights = route(spec, scores)
    all_weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for row in range(5):
        best = np.argsort(scores[row])[-3:]
        assert set(chosen[row]) == set(best)
        expected = all_weights[row, chosen[row]]
        if normalized or scoring == "topk_softmax":
            expected = expected / expected.sum()
        np.testing.assert_allclose(weights[row], expected)
    found = {
        (row, expert): weight
        for expert, rows, factors in by_expert(replace(spec, first=2, held=4), chosen, weights)
        for row, weight in zip(rows.tolist(), factors, strict=True)
    }
    assert found == {
        (row, expert): weight
        for row in range(5)
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True)
        if 2 <= expert < 6
    }


def test_the_busiest_of_several_devices() -> None:
    """Two devices with a coin's choice of one expert: one works, the other does not."""
    assert busiest((64,), 8, 1) == 1
    assert busiest((64, 64), 1, 1) == 2
    assert 1.2 < busiest((64, 64), 8, 1) < 1.4
    assert busiest((64, 64), 8, 64) < 1.1
