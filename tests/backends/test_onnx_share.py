"""Shares of layers in ONNX Runtime: sessions between the cuts, and what they keep."""

from __future__ import annotations

import gc
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest

pytest.importorskip("onnxruntime")

from backends import onnx_cpu
from backends.base import StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from backends.onnx_share import KEPT_PASSES, PROMPT_ROWS, ShareLayers
from model.quantize import Format
from model.spec import ModelSpec
from tests.backends.test_conformance import LAYERS, Artifacts, random_model, stored
from tests.backends.test_onnx_cpu import LAYER, assert_similar

OPTIONS = StageOptions(slots=4, context_tokens=64, threads=1)
ALONE = replace(OPTIONS, team_sum=lambda rows: rows)
"""The options of a team of one."""

Model = tuple[ModelSpec, Artifacts]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Layers and head, at 4 bits."""
    spec, tensors = random_model(replace(LAYER, hidden=256, ffn=512))
    return spec, stored(tmp_path_factory.mktemp("model"), tensors, Format.of(4))[1:]


def results(model: Model, options: StageOptions) -> npt.NDArray[np.float32]:
    """Logits of a prompt, of the token behind it, and of that token with another sequence."""
    spec, artifacts = model
    rows = np.random.default_rng(1).standard_normal((40, spec.hidden), np.float32)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        prompt = stage.forward(1, 0, rows[:PROMPT_ROWS])
        one = stage.forward(1, PROMPT_ROWS, rows[-1:])
        return np.concatenate([prompt, one, stage.decode([2, 1], [0, 17], rows[:2])])


@pytest.mark.parametrize("name", ["rmsnorm-post", "wide-heads-window", "gelu"])
@pytest.mark.parametrize("bits", [2, 4, 6, 16])
def test_a_team_of_one_gives_what_whole_layers_give(name: str, bits: int, tmp_path: Path) -> None:
    spec, tensors = random_model(LAYERS[name])
    model = spec, stored(tmp_path, tensors, Format.of(bits))[1:]
    assert_similar(results(model, ALONE), results(model, OPTIONS))


def test_prepared_weights_of_a_share_are_kept(model: Model, tmp_path: Path) -> None:
    options = replace(ALONE, prepared_dir=tmp_path / "prepared")
    expected = results(model, ALONE)
    for kept in (False, True):
        with closing(OnnxCpuBackend().load(*model, options)) as stage:
            assert bool(stage.kept_files) is kept
            if kept:
                graphs = [path for path in stage.kept_files if path.suffix == ".onnx"]
                assert len(graphs) == 2 * len(model[0].layers) + 1
        np.testing.assert_array_equal(results(model, options), expected)
    # The same artifacts as whole layers are something else.
    whole = replace(OPTIONS, prepared_dir=options.prepared_dir)
    np.testing.assert_array_equal(results(model, whole), results(model, OPTIONS))
    np.testing.assert_array_equal(results(model, options), expected)


@pytest.mark.parametrize("name", ["graph-2.onnx", "facts.json", "weights-1.bin"])
def test_damaged_files_of_a_share_are_made_again(model: Model, name: str, tmp_path: Path) -> None:
    options = replace(ALONE, prepared_dir=tmp_path / "prepared")
    expected = results(model, options)
    (path,) = tmp_path.glob(f"prepared/*/{name}")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    np.testing.assert_array_equal(results(model, options), expected)
    assert path.stat().st_size == len(content)
    with closing(OnnxCpuBackend().load(*model, options)) as stage:
        assert {kept.parent for kept in stage.kept_files} == {path.parent}


def test_a_share_without_room_on_disk_runs_from_memory(model: Model, tmp_path: Path) -> None:
    options = replace(ALONE, prepared_dir=tmp_path / "prepared", prepared_bytes=1000)
    np.testing.assert_array_equal(results(model, options), results(model, ALONE))
    assert list((tmp_path / "prepared").glob("*/*")) == []


@pytest.mark.parametrize("prepared", [False, True])
def test_prompts_of_a_share_run_through_a_copy_where_memory_has_room(
    model: Model, prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_cpu, "sums_bytes_exactly", lambda: True)
    prepared_dir = tmp_path / "prepared" if prepared else None
    roomy = replace(ALONE, memory_bytes=1 << 40, fast_prompts=True, prepared_dir=prepared_dir)
    plain, copied = results(model, ALONE), results(model, roomy)
    assert not np.array_equal(plain[0], copied[0])
    assert np.linalg.norm(plain - copied) < 0.06 * np.linalg.norm(plain)
    with closing(OnnxCpuBackend().load(*model, ALONE)) as stage:
        stated = stage.memory_bytes
    with closing(OnnxCpuBackend().load(*model, roomy)) as stage:
        assert stage.memory_bytes > 1.3 * stated
    with closing(OnnxCpuBackend().load(*model, replace(roomy, memory_bytes=stated))) as stage:
        assert stage.memory_bytes == stated


def test_bound_memory_is_kept_for_few_sets_of_slots(model: Model) -> None:
    spec, artifacts = model
    options = replace(ALONE, slots=KEPT_PASSES + 3)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        row = np.ones((1, spec.hidden), np.float32)
        first = [stage.forward(slot, 0, row) for slot in range(options.slots)]
        layers = stage._chain
        assert isinstance(layers, ShareLayers)
        assert len(layers._passes) == KEPT_PASSES
        for slot, expected in enumerate(first):
            np.testing.assert_array_equal(stage.forward(slot, 0, row), expected)


@pytest.fixture
def half(tmp_path: Path) -> Model:
    """Half of layers whose weights are much larger than what sessions take."""
    layer = replace(LAYER, hidden=768, heads=6, kv_heads=6, head_dim=64, ffn=1536)
    spec, tensors = random_model(layer)
    spec = replace(spec, max_context=1024)
    return spec, stored(tmp_path, tensors, Format.of(16))[1:-1]


@pytest.mark.parametrize("prepared", [False, True])
def test_memory_of_a_share_is_what_the_process_grows_by(
    half: Model, prepared: bool, tmp_path: Path
) -> None:
    spec, artifacts = half
    options = replace(
        ALONE, slots=2, context_tokens=1024, prepared_dir=tmp_path / "kept" if prepared else None
    )
    # What the first stage of a process costs is the library's.
    OnnxCpuBackend().load(spec, artifacts, options).close()
    gc.collect()
    before = psutil.Process().memory_info().rss
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        stage.forward(0, 0, np.zeros((64, spec.hidden), np.float32))
        grown = psutil.Process().memory_info().rss - before
        stated = stage.memory_bytes
    assert 0.6 * stated < grown < 1.25 * stated
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 0.3 * stated


@pytest.mark.parametrize("threads", [1, 3])
def test_closing_ends_the_threads_of_a_share(model: Model, threads: int) -> None:
    before = psutil.Process().num_threads()
    stage = OnnxCpuBackend().load(*model, replace(ALONE, threads=threads))
    stage.forward(0, 0, np.ones((20, model[0].hidden), np.float32))
    stage.close()
    assert psutil.Process().num_threads() <= before
