"""Packed models and adapters over two agents: their tokens are those of their tools' values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.system.cluster import FIXTURES, ROOT, Cluster, last_json

PACKED = ROOT / "tests" / "packed"
ADAPTERS = ROOT / "tests" / "adapters"
KEPT = {
    "gptq": (4, "GPTQ"),
    "awq": (4, "AWQ"),
    "compressed-int4": (4, "compressed-tensors int4"),
    "compressed-int8": (8, "compressed-tensors int8"),
    "bitsandbytes-int8": (8, "bitsandbytes"),
}
"""The bits of the files' own codes, and the method in messages."""

DECODED = {
    "compressed-fp8": "fp8 (e4m3)",
    "fp8": "fp8 (e4m3)",
    "mlx": "MLX 4 bits",
    "bitsandbytes": "bitsandbytes nf4",
}


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cluster = Cluster(tmp_path_factory.mktemp("packed"))
    cluster.start_coordinator()
    address = f"--coordinator=127.0.0.1:{cluster.control_port}"
    for name in ("pi-1", "pi-2"):
        cluster.start_agent(name, address, "--exact")
    cluster.wait_for_agents("pi-1", "pi-2")
    yield cluster
    cluster.stop()


def model(name: str, folder: Path) -> Path:
    """A fixture with the tokenizer that all of them have."""
    path = Path(shutil.copytree(PACKED / name, folder / name))
    for tokenizer in (FIXTURES / "llama").glob("tokenizer*"):
        shutil.copy(tokenizer, path)
    return path


def check_tokens(cluster: Cluster, name: str, golden_path: Path, count: int) -> None:
    golden = np.load(golden_path)
    body = {
        "model": name,
        "prompt": golden["prompt"].tolist(),
        "temperature": 0,
        "max_tokens": count,
        "return_token_ids": True,
    }
    url = f"{cluster.url}/v1/completions"
    answer = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    assert answer["shoal"]["tokens"] == golden["continuation"][:count].tolist()


@pytest.mark.parametrize("name", KEPT)
def test_codes_of_the_file_reach_the_devices(shoal: Cluster, name: str, tmp_path: Path) -> None:
    bits, method = KEPT[name]
    path = model(name, tmp_path)
    wishes = f"--bits={bits},16", "--quality-budget=0", "--hop-bits=32", "--no-teams"
    pins = "--pin", "embedding:pi-1", "--pin", "head:pi-2"
    answer = shoal.load(path, *wishes, *pins)
    used = [width for stage in answer["plan"]["stages"] for width in stage["bits"]]
    assert used == [16, bits, bits, 16]
    assert answer["quality"]["measured_kl"] == 0
    line = f"{bits}-bit codes kept from the file ({method}): 2 of 4 blocks"
    assert answer["weights"] == [line]
    check_tokens(shoal, name, path / "golden.npz", 40)
    if name == "gptq":
        assert line in shoal.run("ps").stdout
        assert line in shoal.run("plan", str(path), *wishes, *pins).stdout


@pytest.mark.parametrize("name", DECODED)
def test_other_packed_weights_are_decoded(shoal: Cluster, name: str, tmp_path: Path) -> None:
    path = model(name, tmp_path)
    answer = shoal.load(path, "--bits=32", "--hop-bits=32", "--no-teams", "--pin", "head:pi-2")
    assert answer["weights"] == [f"decoded from {DECODED[name]}: 2 of 4 blocks"]
    check_tokens(shoal, name, path / "golden.npz", 40)
    if name == "mlx":
        planned = last_json(shoal.run("plan", str(path), "--json", "--bits=4", "--no-teams"))
        assert planned["weights"] == [f"requantized from {DECODED[name]}: 2 of 4 blocks"]


def test_an_agent_finds_no_loss_in_kept_codes(shoal: Cluster, tmp_path: Path) -> None:
    path = model("gptq", tmp_path)
    shoal.run("unload")
    work = "--bits=3,4", "--max-tokens=40", "--check-plans=1", "--on=auto", "--json"
    answer = last_json(shoal.run("calibrate", "--quality", f"--model={path}", *work))
    lost = {(item["block"], item["bits"]): item["kl"] for item in answer["blocks"]}
    assert [lost[block, 4] == 0 for block in range(4)] == [False, True, True, False]
    assert all(lost[block, 3] > 0 for block in range(4))
    (plan,) = answer["plans"]
    assert plan["measured_kl"] == pytest.approx(plan["predicted_kl"], rel=1)


def test_an_adapter_is_merged(shoal: Cluster) -> None:
    wishes = "--bits=32", "--hop-bits=32", "--no-teams", "--pin", "head:pi-2"
    adapter = ADAPTERS / "plain"
    answer = shoal.load(FIXTURES / "llama", *wishes, f"--adapter={adapter}")
    assert answer["adapter"] == str(adapter)
    assert answer["weights"] == ["LoRA adapter merged into F32: 3 of 5 blocks"]
    check_tokens(shoal, "llama", adapter / "golden.npz", 40)
    alone = shoal.run("load", str(adapter), "--json")
    assert alone.returncode == 1
    assert f"run `shoal load example/llama --adapter {adapter}`" in alone.stderr
    shoal.load(FIXTURES / "llama", *wishes)
    check_tokens(shoal, "llama", FIXTURES / "llama" / "golden.npz", 40)
