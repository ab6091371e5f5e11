"""The training scripts of the example models write exactly the folders that are committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra torch")

EXAMPLES = Path(__file__).parents[2] / "examples"

EXPORT = """
import sys
from pathlib import Path
import torch
import train
from model.safetensors import read_safetensors
words = len(train.generate.VOCABULARY)
model = {model}
file = read_safetensors(Path("model/model.safetensors"))
state = {{name: torch.tensor(file.map(name)) for name in model.state_dict()}}
model.load_state_dict(state)
train.export(model, Path(sys.argv[1]))
"""
"""Loads the committed weights into the script's model, and exports it anew."""

MODELS = {
    "tiny-opt": "train.TinyOPT(words, train.WIDTH, train.HEADS, train.STAGES[-1].layers)",
    "town": "train.Town(words, train.WIDTH, train.FFN, train.HEADS, train.KV_HEADS, train.LAYERS)",
}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_of_the_committed_weights_is_the_committed_folder(
    name: str, tmp_path: Path
) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", EXPORT.format(model=MODELS[name]), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=EXAMPLES / name,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    written = sorted(tmp_path.iterdir())
    assert len(written) == 5
    for path in written:
        assert path.read_bytes() == (EXAMPLES / name / "model" / path.name).read_bytes(), path.name
