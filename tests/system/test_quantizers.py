"""Codes by GPTQ reach the devices, and are what sensitivities and plans were measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from calibration.quality.blocks import measure_quality
from model.checkpoint import Checkpoint
from model.passages import built_in_text, split_passages
from model.quantize import Format
from model.quantizers.prepared import quantized
from model.reference import ReferenceModel
from model.tokenizer import Tokenizer
from tests.greedy import generate_greedy
from tests.system.cluster import FIXTURES, Cluster, last_json

MODEL = FIXTURES / "llama"
WORDS = "the harbour wakes before the town does\n\nat four the first boats come in\n\n" * 4
BITS = 3


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cluster = Cluster(tmp_path_factory.mktemp("quantizers"))
    cluster.start_coordinator()
    for name in ("pi-1", "pi-2"):
        cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", "--exact")
    cluster.wait_for_agents("pi-1", "pi-2")
    yield cluster
    cluster.stop()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


def test_an_agent_measures_the_codes_that_will_be_loaded(
    shoal: Cluster, text: Path, tmp_path: Path
) -> None:
    form = f"--bits={BITS},8", "--max-tokens=60", "--scheme=gptq", f"--scheme-text={text}"
    asked = "calibrate", "--quality", f"--model={MODEL}", "--on=auto", "--json", "--check-plans=1"
    answer = last_json(shoal.run(*asked, *form))
    checkpoint = quantized(Checkpoint.open(MODEL), "gptq", tmp_path, WORDS)
    tokenizer = Tokenizer.load(MODEL)
    sequences = split_passages(map(tokenizer.encode, built_in_text()), 128, 60)
    expected = measure_quality(checkpoint, (BITS, 8), sequences, scheme="gptq")
    found = {(item["block"], item["bits"]): item for item in answer["blocks"]}
    assert len(found) == len(expected)
    for one in expected:
        item = found[one.block, one.bits]
        assert item["kl"] == pytest.approx(one.kl, rel=1e-2, abs=1e-8)
        assert item["weight_error"] == pytest.approx(one.weight_error)
    rounded = measure_quality(Checkpoint.open(MODEL), (BITS,), sequences)
    assert {one.kl for one in rounded}.isdisjoint(one.kl for one in expected)
    assert last_json(shoal.run(*asked, *form))["measured_on"] is None

    # Sensitivities of rounded codes are others: they are not taken for these.
    stored = (shoal.directory / "coordinator" / "quality").glob(f"{checkpoint.fingerprint}-*.json")
    assert [json.loads(path.read_text())["scheme"] for path in stored] == ["gptq"]


def test_a_model_is_loaded_and_evaluated_with_these_codes(
    shoal: Cluster, text: Path, tmp_path: Path
) -> None:
    form = "--scheme=gptq", f"--scheme-text={text}"
    pins = "--pin", "embedding:pi-1", "--pin", "head:pi-2", "--hop-bits=32", "--no-teams"
    loaded = shoal.load(MODEL, *form, *pins, f"--bits={BITS}")
    assert {width for stage in loaded["plan"]["stages"] for width in stage["bits"]} == {BITS}
    checkpoint = quantized(Checkpoint.open(MODEL), "gptq", tmp_path, WORDS)
    fmt = next(iter(checkpoint.native_formats().values()), None)
    assert fmt is None
    prompt = [5, 9, 40, 77, 3, 120]
    wanted = generate_greedy(_reference(checkpoint), prompt, 24)
    body = {
        "model": "llama",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    url = f"{shoal.url}/v1/completions"
    answer = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    sure = next((i for i, margin in enumerate(wanted.margins) if margin < 1e-3), 24)
    assert sure > 3
    assert answer["shoal"]["tokens"][:sure] == wanted.tokens[:sure]

    data = tmp_path / "data.txt"
    data.write_text(WORDS, encoding="utf-8")
    asked = "eval", "llama", f"--data={data}", "--json", "--metrics=kl"
    refused = shoal.run(*asked)
    assert refused.returncode == 2
    assert "--scheme-text" in refused.stderr
    measured = last_json(shoal.run(*asked, form[1]))
    alone = last_json(shoal.run(*asked[:1], str(MODEL), *asked[2:], *form, f"--bits={BITS}"))
    figures = [answer["runs"][0]["figures"]["kl"]["value"] for answer in (measured, alone)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert figures[0] > 0


def _reference(checkpoint: Checkpoint) -> ReferenceModel:
    spec = checkpoint.spec
    fmt = Format.of(BITS, "gptq")
    return ReferenceModel(spec, [checkpoint.kept(block, fmt) for block in range(spec.block_count)])
