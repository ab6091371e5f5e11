"""The widths that a plan has by default, against all blocks at 8 and at 4 bits, with measured loss.

    python -m benchmarks.default_widths               # the demo model, then a model of 1B shape
    python -m benchmarks.default_widths --only demo

Four described Pi 5 with room for the model are planned for. Losses are measured on this machine in
numpy, as a first load does. The 1B model has Llama-3.2-1B's shape and random heavy-tailed weights:
2.5 GB below --directory, which are removed at the end. Its text is told by the demo model's
tokenizer. So its losses say how planning decides, not what Llama loses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.random_model import SEED, TOKENIZER
from calibration.shapes import SHAPES
from coordinator.files.artifacts import ArtifactStore
from model.checkpoint import Checkpoint
from model.loss_store import Form, LossStore
from model.quantize import Format
from planning.build import RequestInput
from planning.labs.lab import lab_problem
from planning.labs.lab_file import parse_lab
from planning.losses import keep_measured
from planning.plan import InfeasiblePlan, Plan, bits_text
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import DEFAULT_BITS
from planning.sensitivity import DEFAULT_QUALITY_BUDGET, scaled

LAB = """\
model: {name: Llama-3.2-1B, hidden: 2048, ffn: 8192, heads: 32, kv_heads: 8, vocab: 128256}
templates:
  pi-5: &pi-5
    memory: 1500M
    storage: 16G
    bits: [3, 4, 5, 6, 8, 16]
    container: {3: 4, 5: 8, 6: 8, 16: 32}
    layer_ms:
      decode: {3: 4.6, 4: 4.6, 5: 8.1, 6: 8.1, 8: 8.1, 16: 25}
      prefill_per_token: {3: 1.3, 4: 1.3, 5: 1.2, 6: 1.2, 8: 1.2, 16: 1.5}
    embed_ms: 0.02
    head_ms: {3: 17, 4: 17, 5: 31, 6: 31, 8: 31, 16: 105}
devices:
  - {<<: *pi-5, name: pi-1}
  - {<<: *pi-5, name: pi-2}
  - {<<: *pi-5, name: pi-3}
  - {<<: *pi-5, name: pi-4}
default_link: {rtt_ms: 0.4, mbit_per_s: 940}
"""
"""Assumed times, as in examples/labs/four-pis.yaml, at every width that CPU backends run."""

LOGITS_STD = 0.54
"""Random layers pass errors on undamped. With logits of this spread all blocks at 4 bits lose about
0.1 nats, as plain 4-bit rounding does of trained models of this size."""

POOL = 1 << 22
BUDGETS = 12
"""Budgets that are tried for a plan of equal speed."""
CONTEXT_TOKENS = 256


def never() -> bool:
    return False


def silent(done: int, total: int) -> None:
    pass


# ---- a model of heavy-tailed weights -------------------------------------------------------------


class HeavyTails:
    """Weights as Student's t with 4 degrees of freedom has them, from a pool; rows have scales."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        pool = self._random.standard_t(4, POOL).astype(np.float32)
        self._pool = pool / pool.std()

    def rows(self, shape: tuple[int, int], std: float) -> Iterator[npt.NDArray[np.uint16]]:
        """bf16 patterns of a matrix, some rows at a time."""
        rows, columns = shape
        step = max(1, POOL // columns)
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            values = np.roll(self._pool, int(self._random.integers(POOL)))[: count * columns]
            scales = std * self._random.lognormal(0, 0.3, (count, 1)).astype(np.float32)
            part = values.reshape(count, columns) * scales
            yield (part.view(np.uint32) >> 16).astype(np.uint16)

    def gain(self) -> float:
        """How much louder a layer is than others."""
        return float(self._random.lognormal(0, 0.5))


def heavy_tailed(directory: Path, config: Mapping[str, object]) -> Path:
    """Write a Llama checkpoint of random weights into ``directory``, a few rows at a time."""
    directory.mkdir(parents=True)
    values = dict(config) | {"architectures": ["LlamaForCausalLM"], "bos_token_id": None}
    (directory / "config.json").write_text(json.dumps(values | {"eos_token_id": None}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    hidden, ffn, layers, heads, kv_heads, vocab = (
        int(str(config[key]))
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
    )
    kv_rows, tails = hidden // heads * kv_heads, HeavyTails(SEED)
    matrices = {"model.embed_tokens.weight": ((vocab, hidden), LOGITS_STD * hidden**-0.5)}
    norms = ["model.norm.weight"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norms += [prefix + name + "_layernorm.weight" for name in ("input", "post_attention")]
        inside, out = hidden**-0.5, tails.gain() * (2 * layers) ** -0.5
        matrices |= {
            prefix + "self_attn.q_proj.weight": ((hidden, hidden), inside),
            prefix + "self_attn.k_proj.weight": ((kv_rows, hidden), inside),
            prefix + "self_attn.v_proj.weight": ((kv_rows, hidden), inside),
            prefix + "self_attn.o_proj.weight": ((hidden, hidden), out * inside),
            prefix + "mlp.gate_proj.weight": ((ffn, hidden), inside),
            prefix + "mlp.up_proj.weight": ((ffn, hidden), inside),
            prefix + "mlp.down_proj.weight": ((hidden, ffn), out * ffn**-0.5),
        }
    header: dict[str, object] = {}
    end = 0
    for name, size in [(n, list(s)) for n, (s, _) in matrices.items()] + [
        (n, [hidden]) for n in norms
    ]:
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    with (directory / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, std in matrices.values():
            for part in tails.rows(shape, std):
                file.write(part.tobytes())
        for _ in norms:
            file.write(np.full(hidden, 0x3F80, np.uint16).tobytes())
    return directory


# ---- plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    plan: Plan | None
    kl: float | None = None

    def __str__(self) -> str:
        if self.plan is None:
            return f"| {self.name} | no plan | | | |"
        bits = bits_text([placement.bits for placement in self.plan.placements])
        sent = sum(stage.storage_bytes for stage in self.plan.stages) / 1e6
        kl = "" if self.kl is None else f"{self.kl:.2e}"
        return f"| {self.name} | {bits} | {self.plan.decode_s * 1e3:.2f} | {sent:.1f} | {kl} |"


class Comparison:
    """One model's plans on the described devices."""

    def __init__(self, model: Path, state_dir: Path) -> None:
        self._form = Form(Checkpoint.open(model), "rtn", 64)
        self._state_dir = state_dir
        self._store = LossStore(state_dir)
        began_s, used_s = time.perf_counter(), time.process_time()
        self._known = self._store.losses(self._form, silent, never)
        first_s, used_s = time.perf_counter() - began_s, time.process_time() - used_s
        began_s = time.perf_counter()
        LossStore(state_dir).losses(Form(Checkpoint.open(model), "rtn", 64), silent, never)
        again_s = time.perf_counter() - began_s
        print(
            f"losses measured on {self._known.tokens} tokens: {first_s:.1f} s the first time"
            f" ({used_s:.1f} s of processor time), {again_s:.3f} s again;"
            f" margin {self._known.margin:.2f}"
        )
        for bits in (4, 8):
            total = math.fsum(row[bits] for row in self._known.blocks)
            print(f"all blocks at {bits} bits are predicted to lose {total:.2g} nats", flush=True)

    def problem(
        self,
        bits: Sequence[int],
        budget: float | None = None,
        *,
        margin: float = 1.0,
        errors: Sequence[Mapping[int, float]] | None = None,
    ) -> PlanningProblem:
        spec = self._form.checkpoint.spec
        request = RequestInput(
            spec,
            tuple(bits),
            min(CONTEXT_TOKENS, spec.max_context),
            formats={width: Format.of(width) for width in {*DEFAULT_BITS, *bits}},
            sensitivities=scaled(self._known.blocks, margin),
            quality_budget=budget,
            weight_errors=errors,
            max_weight_error=None if errors is None else 1e-3,
        )
        return lab_problem(parse_lab(LAB, "four Pi 5"), request)

    def measured(self, plan: Plan) -> float:
        bits = tuple(placement.bits for placement in plan.placements)
        return self._store.plan_loss(self._form, bits, silent, never)

    def by_default(self) -> Row:
        """The default plan: measured whole, and made again while it loses too much."""
        problem = self.problem(DEFAULT_BITS, DEFAULT_QUALITY_BUDGET, margin=self._known.margin)

        async def measured(bits: tuple[int, ...]) -> float:
            began_s, used_s = time.perf_counter(), time.process_time()
            kl = self._store.plan_loss(self._form, bits, silent, never)
            took_s, used_s = time.perf_counter() - began_s, time.process_time() - used_s
            print(
                f"a plan measured whole: {took_s:.1f} s ({used_s:.1f} s of processor time),", end=""
            )
            print(f" {bits_text(bits)} loses {kl:.4f} nats", flush=True)
            return kl

        async def again(tighter: PlanningProblem) -> Plan:
            return solve(tighter)

        plan = solve(problem)
        print(f"planned in {plan.proof.solve_s:.2f} s, gap {plan.gap:.2%}")
        return Row("default", *asyncio.run(keep_measured(problem, plan, measured, again)))

    def before(self) -> Row:
        """The default of earlier versions: 4, 8 and 16 bits, errors up to 1e-3."""
        store = ArtifactStore(self._state_dir)
        store.prepare()
        formats = [Format.of(bits) for bits in (4, 8, 16)]
        errors = store.weight_errors(self._form.checkpoint, formats, silent, never)
        try:
            plan = solve(self.problem((4, 8, 16), errors=errors))
        except InfeasiblePlan:
            return Row("before", None)
        return Row("before", plan, self.measured(plan))

    def uniform(self, bits: int) -> Plan:
        return solve(self.problem((bits,)))

    def at_equal_loss(self, name: str, plan: Plan) -> Row:
        """The fastest plan that is predicted to lose no more than ``plan`` is."""
        bits = [placement.bits for placement in plan.placements]
        budget = math.fsum(
            losses[width] for losses, width in zip(self._known.blocks, bits, strict=True)
        )
        best = solve(self.problem(DEFAULT_BITS, budget * (1 + 1e-9)))
        return Row(f"chosen, loss of {name}", best, self.measured(best))

    def at_equal_speed(self, name: str, plan: Plan) -> Row:
        """The plan that loses least, by prediction, and is as fast as ``plan``."""
        best, low, high = plan, 1e-6, 1.0
        for _ in range(BUDGETS):
            budget = math.sqrt(low * high)
            try:
                tried = solve(self.problem(DEFAULT_BITS, budget))
            except InfeasiblePlan:
                low = budget
                continue
            if tried.decode_s <= plan.decode_s * (1 + 1e-6):
                best, high = tried, budget
            else:
                low = budget
        return Row(f"chosen, speed of {name}", best, self.measured(best))


def compare(name: str, model: Path, state_dir: Path) -> None:
    print(f"\n{name}")
    comparison = Comparison(model, state_dir)
    default = comparison.by_default()
    print("\n| plan | bits | ms per token | MB loaded | measured KL |")
    print("| --- | --- | --- | --- | --- |")
    print(default, comparison.before(), sep="\n", flush=True)
    for bits in (4, 8):
        name, plan = f"all {bits}", comparison.uniform(bits)
        print(Row(name, plan, comparison.measured(plan)), flush=True)
        print(comparison.at_equal_loss(name, plan), flush=True)
        print(comparison.at_equal_speed(name, plan), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=("demo", "1b"))
    parser.add_argument("--layers", type=int, default=16, help="of the 1B model; for a short try")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="shoal-widths-") as directory:
        root = Path(directory)
        if options.only != "1b":
            compare("demo model", TOKENIZER, root / "demo-state")
        if options.only != "demo":
            config = dict(SHAPES["llama-1b"]) | {"num_hidden_layers": options.layers}
            began_s = time.perf_counter()
            model = heavy_tailed(root / "model", config)
            print(f"\nthe 1B model was written in {time.perf_counter() - began_s:.0f} s")
            compare(f"Llama-3.2-1B's shape, {options.layers} layers", model, root / "state")


if __name__ == "__main__":
    main()
