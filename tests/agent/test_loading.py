"""A stage with a draft model beside it: how long it takes to load, and whose files are checked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import integrity
from agent.blocks import BlockCache
from agent.loading import Source, StageLoader
from agent.stages import Stages
from backends.base import Artifacts, BackendError, Stage, StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from model.artifact import file_sha256
from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from tests.agent.test_relay import LLAMA, blocks_at
from wire.messages import BlockRef, DraftModel, Endpoint, LoadStage

SLOW_S = 0.2


class Backend(OnnxCpuBackend):
    """Loads a stage slowly, and a draft model unless ``fails``. ``after`` follows the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0
        self.fails = False
        self.after: Callable[[], object] = lambda: None

    def stage(self, spec: ModelSpec, blocks: Artifacts, options: StageOptions) -> Stage:
        self.loads += 1
        if self.loads == 1:
            time.sleep(SLOW_S)  # What a large stage takes.
            self.after()
        elif self.fails:
            raise BackendError("no room")
        return super().stage(spec, blocks, options)


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    (tmp_path / "cache").mkdir()
    return BlockCache(tmp_path / "cache", 1 << 30)


def kept(cache: BlockCache, bits: Any, directory: Path) -> tuple[BlockRef, ...]:
    """The blocks of the test's model, which the cache has."""
    directory.mkdir()
    refs = []
    for block, path in blocks_at(bits, directory):
        sha256 = file_sha256(path)
        shutil.copy(path, cache.path(sha256))
        refs.append(BlockRef(sha256, path.stat().st_size, block))
    return tuple(refs)


def request_of(cache: BlockCache, directory: Path) -> LoadStage:
    spec = Checkpoint.open(LLAMA).spec.to_dict()
    blocks = kept(cache, 32, directory / "blocks")
    draft = DraftModel(spec, kept(cache, 4, directory / "coarse"), 32, 0)
    return LoadStage(1, 7, spec, blocks, 1, 32, "other", b"key", draft=draft)


def load(cache: BlockCache, backend: Backend, request: LoadStage) -> tuple[Any, Stages]:
    stages = Stages(cast("Any", SimpleNamespace()))
    loader = StageLoader(
        cast("Any", SimpleNamespace(threads=1, exact=True, fast_prompts=False)),
        "device",
        cast("Any", SimpleNamespace(profile=SimpleNamespace(memory_bytes=1 << 30))),
        cast("Any", SimpleNamespace(require=lambda *_: None)),
        cache,
        cast("Any", SimpleNamespace(to_coordinator=lambda _: None)),
        stages,
        lambda _: None,
    )
    source = Source(Endpoint("127.0.0.1", 1), lambda *_: None, lambda: None)
    return loader.load(request, backend, source), stages


def test_the_time_of_a_load_has_the_stage_and_its_draft_model(
    cache: BlockCache, tmp_path: Path
) -> None:
    answer, stages = load(cache, Backend(), request_of(cache, tmp_path))
    stages.keep()
    assert answer.load_s >= SLOW_S
    assert answer.draft_memory_bytes > 0


def test_a_draft_model_that_fails_takes_no_file_from_under_the_stage(
    cache: BlockCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "CHECK_FIRST_BYTES", 0)
    request, backend = request_of(cache, tmp_path), Backend()
    damaged = cache.path(request.blocks[0].sha256)
    backend.fails = True
    backend.after = lambda: damaged.write_bytes(damaged.read_bytes()[:-1] + b"X")
    with pytest.raises(BackendError, match="the draft model: no room"):
        load(cache, backend, request)
    assert damaged.exists()


@pytest.mark.parametrize("wrong", [{"rows_at_once": (1, 0)}, {"weight": 0.0}])
def test_what_no_stage_can_work_with_is_refused(
    wrong: dict[str, Any], cache: BlockCache, tmp_path: Path
) -> None:
    request = replace(request_of(cache, tmp_path), **wrong)
    with pytest.raises(BackendError, match="the coordinator sent"):
        load(cache, Backend(), request)
