"""Texts per second of an encoder on one device, beside transformers.

The model has random weights and the shape of MiniLM-L6 (22 million weights), or of BERT base.
Texts have 5 to 256 random tokens, 31 in the mean. Each way encodes all texts once before it is
timed, and the fastest of several rounds counts. A slow way has fewer rounds.

    python -m benchmarks.encoders
    python -m benchmarks.encoders --shape bert-base --threads 2
    python -m benchmarks.encoders --agents 1,3       # also through /v1/embeddings
    python -m benchmarks.encoders --transformers /tmp/fixtures/bin/python

--transformers names a Python with torch and transformers. It encodes the same texts in batches of
32: by sentence-transformers if it is installed there, else by hand, sorted by length as that does.

--agents also sends the texts to /v1/embeddings of a coordinator with so many agents on the loopback
interface, in 8 requests at once. With several agents each has about as many blocks. They compute
with --threads each, so they need as many cores to be quicker than one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from backends.base import BackendUnavailable, StageOptions
from backends.registry import backend_class
from benchmarks.loopback import Shoal
from benchmarks.soak import PATIENCE_S
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.families import read_config, tensor_sources
from model.families.encoders import bert
from model.quantize import Format
from model.safetensors import write_safetensors
from model.texts import PASS_ROWS, Texts, split

SHAPES = {
    "minilm-l6": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
    "bert-base": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
VOCAB, CONTEXT = 30522, 512
TEXTS = 256
MOST_S = 20.0
"""A way begins no further round after so long. tflite_cpu takes 7 s of processor time a round."""

REQUESTS = 8
AGENT_BITS = (8,)
WAYS = (
    ("onnx_cpu", 32, "exact"),
    ("onnx_cpu", 8, ""),
    ("onnx_cpu", 8, "fast prompts"),
    ("onnx_cpu", 4, ""),
    ("torch_cpu", 32, "exact"),
    ("tflite_cpu", 8, ""),
    ("torch_cuda", 16, ""),
    ("torch_cuda", 8, ""),
)
"""Backends, bits, and options of a stage. Those that do not run here are left out."""

_TRANSFORMERS = """
import json, sys, time
import numpy as np, torch
from transformers import BertModel
directory, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
try:
    from sentence_transformers import SentenceTransformer
except ImportError:
    SentenceTransformer = None
model = BertModel.from_pretrained(directory, add_pooling_layer=False).eval().float()
texts = [np.array(text) for text in json.load(open(directory + "/texts.json"))]
def run():
    found = []
    with torch.inference_mode():
        for begin in range(0, len(texts), 32):
            part = texts[begin : begin + 32]
            longest = max(map(len, part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(part):
                ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            sums = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found.append(torch.nn.functional.normalize(sums, dim=1))
    return torch.cat(found).numpy()
name = "transformers"
if SentenceTransformer is not None:
    import importlib.metadata
    from sentence_transformers import models
    name = "sentence-transformers " + importlib.metadata.version("sentence-transformers")
    class Ready(models.Transformer):  # Texts come as tokens, as to all other ways.
        def tokenize(self, texts, *args, **kwargs):
            part = [json.loads(text) for text in texts]
            longest = max(map(len, part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(part):
                ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            return {"input_ids": ids, "attention_mask": mask}
    steps = [Ready(directory), models.Pooling(model.config.hidden_size), models.Normalize()]
    encoder = SentenceTransformer(modules=steps, device="cpu")
    written = [json.dumps(text.tolist()) for text in texts]
    def run():
        return encoder.encode(written, batch_size=32)
np.save(directory + "/vectors.npy", run())
times = []
for _ in range(rounds):
    started = time.perf_counter()
    run()
    times.append(time.perf_counter() - started)
print(json.dumps([name, min(times)]))
"""

Vectors = npt.NDArray[np.float32]


def make_model(directory: Path, shape: dict[str, int]) -> None:
    """Write a random checkpoint, and texts sorted by length."""
    config: dict[str, Any] = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        **shape,
    }
    (directory / "config.json").write_text(json.dumps(config))
    read, random = read_config(directory), np.random.default_rng(0)
    spec = bert(read)
    tensors = {}
    for block in range(spec.block_count):
        sources = tensor_sources(read, spec, block, ())
        for name, size in spec.block_tensors(block).items():
            values = 0.02 * random.standard_normal(size, np.float32)
            if name.endswith("norm.weight"):
                values += 1
            stored = sources[name][0].name.removeprefix("bert.")
            tensors[stored] = values.astype(np.float16)
    write_safetensors(directory / "model.safetensors", tensors)
    lengths = np.sort(np.clip(random.lognormal(3.2, 0.7, TEXTS), 5, 256).astype(int))
    texts = [random.integers(1000, VOCAB, length).tolist() for length in lengths]
    (directory / "texts.json").write_text(json.dumps(texts))
    vocab = {f"t{token}": token for token in range(VOCAB)}
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": words}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def ways(
    directory: Path, checkpoint: Checkpoint, threads: int
) -> Iterator[tuple[str, Callable[[], Vectors]]]:
    """Yield each way that runs here, and a function that encodes all texts."""
    texts = [np.array(text) for text in json.loads((directory / "texts.json").read_text())]
    lengths = [len(text) for text in texts]
    spec = checkpoint.spec
    for backend, bits, option in WAYS:
        kind = backend_class(backend)
        try:
            kind.probe()
        except BackendUnavailable:
            continue
        fmt = Format.of(bits)
        with tempfile.TemporaryDirectory(dir=directory) as name:
            artifacts = [
                (block, write_artifact(Path(name), block, checkpoint.block(block), fmt).path)
                for block in range(spec.block_count)
            ]
            options = StageOptions(
                1,
                CONTEXT,
                threads,
                exact=option == "exact",
                fast_prompts=option == "fast prompts",
            )
            with closing(kind().stage(spec, artifacts, options)) as stage:

                def run() -> Vectors:
                    found = np.empty((len(texts), spec.output_width), np.float32)
                    for chosen in split(lengths, PASS_ROWS):
                        tokens = np.concatenate([texts[index] for index in chosen])
                        bounds = Texts.plain(*(lengths[index] for index in chosen))
                        found[chosen] = stage.encode(tokens, bounds)
                    unit: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
                    return unit

                yield f"{backend}, {bits} bits{option and f', {option}'}", run


def over_agents(
    model: Path, count: int, bits: int, options: argparse.Namespace, wanted: Vectors | None
) -> tuple[float, float]:
    """Return texts per second through so many agents, and the least cosine to ``wanted``."""
    texts = json.loads((model / "texts.json").read_text())
    parts = [
        texts[first : first + TEXTS // REQUESTS] for first in range(0, TEXTS, TEXTS // REQUESTS)
    ]
    with tempfile.TemporaryDirectory(prefix="shoal-encoders-") as name:
        shoal = Shoal(Path(name))
        try:
            hosts = shoal.start_all(count, options.threads)
            layers = SHAPES[options.shape]["num_hidden_layers"]
            cuts = [layers * at // count for at in range(count + 1)]
            pins = [
                f"--pin=layers={first}-{last - 1}:{host}"
                for host, (first, last) in zip(hosts, itertools.pairwise(cuts), strict=True)
            ]
            shoal.put(model, f"--bits={bits}", f"--context={CONTEXT}", *pins)

            def ask(part: list[list[int]]) -> Vectors:
                body = {"input": part, "model": model.name}
                answer = httpx.post(
                    f"{shoal.url}/v1/embeddings",
                    json=body,
                    timeout=PATIENCE_S,
                    trust_env=False,
                )
                answer.raise_for_status()
                return np.array([one["embedding"] for one in answer.json()["data"]], np.float32)

            with ThreadPoolExecutor(REQUESTS) as pool:
                found = np.concatenate(list(pool.map(ask, parts)))
                times_s = []
                for _ in range(options.rounds):
                    started_s = time.perf_counter()
                    list(pool.map(ask, parts))
                    times_s.append(time.perf_counter() - started_s)
        finally:
            shoal.stop()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    cosine = 1.0 if wanted is None else float((found * wanted).sum(axis=1).min())
    return TEXTS / min(times_s), cosine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", metavar="PYTHON", help="a Python with transformers")
    parser.add_argument(
        "--agents",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[],
        metavar="N,N",
        help="also measure so many agents, each number by itself",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-encoders-") as name:
        directory = Path(name)
        make_model(directory, SHAPES[options.shape])
        wanted: Vectors | None = None
        sys.stdout.write("| | texts per second | least cosine |\n| --- | ---: | ---: |\n")
        if options.transformers:
            arguments = [name, str(options.threads), str(options.rounds)]
            done = subprocess.run(  # noqa: S603 - the user's own Python
                [options.transformers, "-c", _TRANSFORMERS, *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            library, least_s = json.loads(done.stdout.splitlines()[-1])
            wanted = np.load(directory / "vectors.npy")
            sys.stdout.write(f"| {library}, fp32 | {TEXTS / least_s:.0f} | 1 |\n")
        for label, run in ways(directory, Checkpoint.open(directory), options.threads):
            found = run()
            wanted = found if wanted is None else wanted
            cosine = float((found * wanted).sum(axis=1).min())
            times_s: list[float] = []
            while len(times_s) < options.rounds and sum(times_s) < MOST_S:
                started_s = time.perf_counter()
                run()
                times_s.append(time.perf_counter() - started_s)
            speed = TEXTS / min(times_s)
            sys.stdout.write(f"| {label} | {speed:.0f} | {cosine:.6f} |\n")
            sys.stdout.flush()
        for count in options.agents:
            for bits in AGENT_BITS:
                speed, cosine = over_agents(directory, count, bits, options, wanted)
                hosts = "1 agent" if count == 1 else f"{count} agents"
                label = f"/v1/embeddings, {hosts}, {bits} bits"
                sys.stdout.write(f"| {label} | {speed:.0f} | {cosine:.6f} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
