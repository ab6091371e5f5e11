"""A GGUF file through the whole line: planned, loaded on two agents, and asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from model.tokenizer import Tokenizer
from tests.gguf_files import tiny
from tests.greedy import generate_greedy
from tests.system.cluster import ROOT, Cluster, last_json, shoal

QWEN3 = ROOT / "tests" / "gguf" / "qwen3.gguf"
PROMPT = "The quick brown fox jumps."
VOCABULARY: dict[str, Any] = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "gpt-2",
    "tokenizer__ggml__tokens": [chr(ord("a") + index) for index in range(26)]
    + [f"[{index}]" for index in range(22)],
    "tokenizer__ggml__token_type": [1] * 48,
}


def test_a_gguf_file_is_loaded_and_answers_as_its_checkpoint(cluster: Cluster) -> None:
    golden = np.load(ROOT / "tests" / "fixtures" / "qwen3" / "golden.npz")
    file = Path(shutil.copy(QWEN3, cluster.directory / "Fox-0.1B-F16.gguf"))
    cluster.start_coordinator()
    for name in ("pi-1", "pi-2"):
        cluster.start_agent(name)
    cluster.wait_for_agents("pi-1", "pi-2")

    plan = last_json(cluster.run("plan", str(file), "--bits=32", "--json"))
    assert {block["bits"] for block in plan["plan"]["blocks"]} == {32}

    answer = cluster.load(file, "--bits=32", "--pin=embedding:pi-1", "--pin=head:pi-2")
    assert len(answer["stages"]) > 1
    assert answer["model"] == "Fox-0.1B-F16"
    body = {"model": answer["model"], "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    url = f"{cluster.url}/v1/completions"
    said = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    tokenizer = Tokenizer.load(ROOT / "tests" / "fixtures" / "qwen3")
    expected = golden["continuation"][:48].tolist()
    end = tokenizer.encode("</s>", add_special=False)[0]
    assert end not in expected, "the file's end token would end the answer"
    assert said["choices"][0]["text"] == tokenizer.decode(expected)


def test_kept_codes_give_the_reference_tokens(cluster: Cluster) -> None:
    """8-bit codes of the file reach the devices, in a folder that holds only the file."""
    folder = cluster.directory / "tiny"
    folder.mkdir()
    file = tiny("Q8_0", **VOCABULARY).write(folder / "tiny-Q8_0.gguf")
    model = ReferenceModel.from_checkpoint(Checkpoint.open(file))
    tokenizer = Tokenizer.load(file)
    expected = generate_greedy(model, tokenizer.encode("woats"), 12).tokens
    assert len(set(expected)) > 5

    cluster.start_coordinator()
    cluster.start_agent("pi")
    cluster.wait_for_agents("pi")
    answer = cluster.load(folder, "--bits=8", "--max-weight-error=1")
    assert answer["model"] == "tiny"
    body = {"prompt": "woats", "max_tokens": 12, "temperature": 0}
    said = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert said.json()["choices"][0]["text"] == tokenizer.decode(expected)


@pytest.mark.parametrize(
    ("kind", "bits", "told"),
    [
        ("Q8_0", 8, "8-bit codes kept from the file (Q8_0): all blocks"),
        ("Q8_0", 4, "requantized from Q8_0: all blocks"),
        ("Q4_0", 4, "4-bit codes kept from the file (Q4_0): all blocks"),
        ("Q4_1", 4, "requantized from Q4_1: all blocks"),
        ("Q4_1", 16, "decoded from Q4_1: all blocks"),
    ],
)
def test_a_plan_says_what_becomes_of_the_files_codes(
    tmp_path: Path, kind: str, bits: int, told: str
) -> None:
    file = tiny(kind, **VOCABULARY).write(tmp_path / "tiny.gguf")
    lab = ROOT / "examples" / "labs" / "four-pis.yaml"
    planned = shoal("plan", str(file), f"--devices={lab}", f"--bits={bits}", "--json")
    assert last_json(planned)["weights"] == [told]
    shown = shoal("plan", str(file), f"--devices={lab}", f"--bits={bits}")
    assert told in " ".join(shown.stdout.split())


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(QWEN3.read_bytes()[:50_000])
    lab = ROOT / "examples" / "labs" / "four-pis.yaml"
    completed = shoal("plan", str(file), f"--devices={lab}")
    assert completed.returncode != 0
    assert "the download is not complete" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert len(completed.stderr.strip().splitlines()) == 1
