#!/usr/bin/env python3
"""Train the town model from scratch on a CPU, and export it.

The model is a Llama: pre-norm RMSNorm, rotary positions, grouped query heads, a gated MLP, tied
embeddings. Its parameters carry the Hugging Face names, so that an export is a plain copy.

- A step has three batches: passages with questions, facts about people alone, and sums alone. Facts
  and sums alone are short, so the model meets them more often in the same time.
- A row of the first batch is one passage with several questions. An attention mask lets every
  question see only the passage and itself, at the positions that it would have alone.
- Training starts with an auxiliary loss. The first two layers must tell the last two content words
  before each token. With it the lookup of a passage's words forms early.
- The learning rate stays, and falls to zero over the last steps.

Everything is seeded. The same command goes on from the last checkpoint after a stop, a crash or a
kill. On the same machine it ends with the same weights, bit for bit, as a run without a stop.

    python train.py --work /tmp/town                    # the committed model
    python train.py --work /tmp/town --stop-after 600   # ten minutes of it; run again to go on
    python train.py --work /tmp/town --export-only      # write model/ from the checkpoint
    python train.py --work /tmp/few --model-dir /tmp/few/model --steps 12   # all stages in seconds
"""

from __future__ import annotations

import math
import pickle
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from small_models import (  # noqa: E402 - it is in the folder above
    adamw,
    progress_bar,
    run_arguments,
    save_checkpoint,
    word_tokenizer,
    write_model,
)

MAX_POSITIONS = 256
WIDTH, FFN, HEADS, KV_HEADS, LAYERS = 64, 192, 4, 2, 6
THETA, EPS = 10000.0, 1e-5
QUESTIONS = 3  # of a passage, in one row
WARM_UP, COOL_DOWN = 200, 600
RATE = 3e-3
DECAY = 0.02
AUX_LAYERS, AUX_STEPS, AUX_WEIGHT = 2, 2500, 0.3
SEED = 1


@dataclass(frozen=True)
class Stage:
    """Steps with so many people, and what a step has: passages, facts alone and sums alone.

    kinds: those of the questions about passages.
    """

    steps: int
    people: int
    passage_rows: int
    fact_rows: int
    sum_rows: int
    kinds: tuple[str, ...] = generate.KINDS


FIRST_KINDS = ("read", "call", "sum")
STAGES = (
    Stage(1000, generate.FIRST_PEOPLE, 24, 96, 24, FIRST_KINDS),
    Stage(400, generate.PEOPLE_COUNT, 24, 96, 48, FIRST_KINDS),
    Stage(400, generate.PEOPLE_COUNT, 48, 0, 0, ("read",)),
    Stage(1100, generate.PEOPLE_COUNT, 24, 96, 48, FIRST_KINDS),
    Stage(850, generate.PEOPLE_COUNT, 24, 96, 48),
    Stage(550, generate.PEOPLE_COUNT, 40, 48, 48),
)
STEPS = sum(stage.steps for stage in STAGES)


def stage_of(step: float) -> Stage:
    """Return the stage of a step of STEPS; the last one has no end."""
    for stage in STAGES[:-1]:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, EPS)


def rotations(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [rows, 1, tokens, size] of rotary positions [rows, tokens]."""
    frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return heads turned by their positions."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    """Attention whose query heads share key and value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        b, t, _ = x.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        every = F.linear(x, weight).float().view(b, t, -1, self.size).transpose(1, 2)
        q, k, v = every.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with torch.autocast("cpu", enabled=False):  # slower in bfloat16 than in float32
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(b, t, -1))
        return projected


class Mlp(nn.Module):
    """A gated MLP (SwiGLU)."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = F.linear(x, weight).chunk(2, -1)
        out: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, width: int, ffn: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads)
        self.mlp = Mlp(width, ffn)
        self.input_layernorm = Norm(width)
        self.post_attention_layernorm = Norm(width)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embeddings, layers and final norm, named as in Hugging Face's LlamaModel."""

    def __init__(
        self, vocabulary: int, width: int, ffn: int, heads: int, kv_heads: int, layers: int
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, ffn, heads, kv_heads) for _ in range(layers))
        self.norm = Norm(width)


class Town(nn.Module):
    """A Llama for causal language modelling with tied embeddings."""

    def __init__(
        self, vocabulary: int, width: int, ffn: int, heads: int, kv_heads: int, layers: int
    ) -> None:
        """Make and initialise the model."""
        super().__init__()
        self.head_size = width // heads
        self.model = Decoder(vocabulary, width, ffn, heads, kv_heads, layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 0.06 if "embed" in name else parameter.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                deviation /= math.sqrt(2 * layers)
            nn.init.normal_(parameter, std=deviation)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the final hidden states, and those after each layer."""
        cos, sin = rotations(positions, self.head_size)
        x = self.model.embed_tokens(ids)
        between = []
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
            between.append(x)
        return self.model.norm(x), between

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)


@dataclass(frozen=True)
class Row:
    """A passage, which may be empty, with questions that do not see each other."""

    passage: str
    questions: Sequence[generate.Asked]


@dataclass(frozen=True)
class Packed:
    """Rows as tensors. Targets are -100 where no answer is expected."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor  # 0 in the passage, i in question i, -1 behind the end


def pack(rows: Sequence[Row]) -> Packed:
    """Return the tensors of rows: [rows, tokens], and the mask [rows, 1, tokens, tokens]."""
    made: list[list[tuple[int, int, int, int]]] = []  # id, position, group, is an answer
    for row in rows:
        passage = generate.encode(row.passage)
        cells = [(token, i, 0, 0) for i, token in enumerate(passage)]
        for group, asked in enumerate(row.questions, 1):
            question = generate.encode(asked.question)
            whole = [*question, *generate.encode(asked.answer), generate.EOS_ID]
            cells += [
                (token, len(passage) + i, group, int(i >= len(question)))
                for i, token in enumerate(whole)
            ]
        made.append(cells)
    longest = max(map(len, made))
    pad = (generate.PAD_ID, 0, -1, 0)
    table = np.array([[*cells, *[pad] * (longest - len(cells))] for cells in made])
    ids, positions, groups, answers = (table[..., i] for i in range(4))
    same = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == 0)
    visible = np.tri(longest, dtype=bool) & same
    targets = np.full_like(ids, -100)
    targets[:, :-1] = np.where(answers[:, 1:] == 1, ids[:, 1:], -100)
    mask = np.where(visible, np.float32(0), np.float32(-1e9))[:, None]
    return Packed(*(torch.from_numpy(x) for x in (ids, positions, mask, targets, groups)))


def passages(
    rng: random.Random,
    rows: int,
    split: str,
    most: int,
    people: Sequence[generate.Person] = generate.PEOPLE,
    kinds: Sequence[str] = generate.KINDS,
) -> list[Row]:
    """Return passages of one to three sentences with up to ``most`` questions of some kinds."""
    made: list[Row] = []
    while len(made) < rows:
        passage = generate.draw_split(rng, split, rng.randint(1, generate.MAX_FACTS), people)
        questions: Sequence[generate.Asked] = passage.questions
        questions = [asked for asked in questions if asked.kind in kinds]
        if len(questions) > most:
            questions = rng.sample(questions, most)
        if questions:
            made.append(Row(" ".join(passage.sentences), questions))
    return made


def facts(
    rng: random.Random, rows: int, people: Sequence[generate.Person] = generate.PEOPLE
) -> list[Row]:
    """Return facts about people as questions without a passage."""
    made = []
    for _ in range(rows):
        person = rng.choice(people)
        name = " ".join(person.name)
        if rng.random() < 0.5:
            asked = generate.Asked("fact", f"what is the number of {name} ?", person.number)
        else:
            asked = generate.Asked("fact", f"where does {name} live ?", " ".join(person.home))
        made.append(Row("", [asked]))
    return made


def sums(rng: random.Random, rows: int) -> list[Row]:
    """Return passages of the training set that are about the meter alone."""
    made = []
    while len(made) < rows:
        sentence, asked = generate.draw_sum(rng)
        if not generate.is_dev((sentence,)):
            made.append(Row(sentence, [asked]))
    return made


@torch.no_grad()
def accuracy(model: Town, rows: int = 120) -> dict[str, float]:
    """Return the share of dev questions, by kind, whose answer is the likeliest throughout."""
    model.eval()
    found: dict[str, list[bool]] = {}
    rng = random.Random(SEED + 1)
    for part in (passages(rng, rows, "dev", 99), facts(rng, rows)):
        packed = pack(part)
        hidden, _ = model(packed.ids, packed.positions, packed.mask)
        right = (model.logits(hidden).argmax(-1) == packed.targets) | (packed.targets < 0)
        for i, row in enumerate(part):
            for group, asked in enumerate(row.questions, 1):
                each = bool(right[i][packed.groups[i] == group].all())
                found.setdefault(asked.kind, []).append(each)
    model.train()
    return {kind: float(np.mean(each)) for kind, each in sorted(found.items())}


CONTENT = np.zeros(len(generate.VOCABULARY), dtype=bool)
CONTENT[
    [generate.WORD_ID[w] for w in (*generate.FIRST, *generate.LAST)]
    + [generate.WORD_ID[w] for w in (*generate.MADE_OF, *generate.THINGS)]
] = True


def previous_content(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per token, the last content word before it and the one before that; -100 for none.

    A question's tokens count from the question's start.
    """
    ids, groups = packed.ids.numpy(), packed.groups.numpy()
    rows, total = ids.shape
    column = np.arange(total)
    begins = np.where(np.diff(groups, axis=1, prepend=-2) != 0, column, 0)
    start = np.maximum.accumulate(begins, axis=1)
    at = np.maximum.accumulate(np.where(CONTENT[ids], column, -1), axis=1)
    before = np.concatenate([np.full((rows, 1), -1), at[:, :-1]], axis=1)
    first = np.where(before >= start, before, -1)
    second = np.where(first >= 0, np.take_along_axis(before, np.maximum(first, 0), axis=1), -1)
    second = np.where(second >= start, second, -1)
    told = [
        np.where((p >= 0) & (groups >= 0), np.take_along_axis(ids, np.maximum(p, 0), axis=1), -100)
        for p in (first, second)
    ]
    return torch.from_numpy(told[0]), torch.from_numpy(told[1])


def learning_rate(step: float) -> float:
    """Return the rate of a step of STEPS: warm-up, then constant, then a straight line to zero."""
    left = (STEPS - step) / COOL_DOWN
    return RATE * min(1.0, (step + 1) / WARM_UP, left)


class CheckpointError(Exception):
    """The checkpoint cannot be gone on with. The message is one line that says what to do."""


class Trainer:
    """The state of a training run: model, optimizer, random generator and step.

    steps: those of the whole run. With fewer than STEPS every stage is shorter in proportion.
    """

    def __init__(self, work: Path, steps: int = STEPS) -> None:
        """Start a run, or continue the one whose checkpoint is in the work folder.

        Raises CheckpointError if that is of another run.
        """
        self.steps = steps
        torch.manual_seed(SEED)
        self.path = work / "checkpoint.pt"
        self.rng = random.Random(SEED)
        self.step, self.seconds = 0, 0.0
        words = len(generate.VOCABULARY)
        self.model = Town(words, WIDTH, FFN, HEADS, KV_HEADS, LAYERS)
        self.aux = nn.ModuleList(nn.Linear(WIDTH, words) for _ in range(AUX_LAYERS))
        self.optimizer = self._optimizer()
        if self.path.exists():
            saved = self._saved()
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.model.load_state_dict(saved["model"])
            self.aux.load_state_dict(saved["aux"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.rng.setstate(saved["rng"])

    def _saved(self) -> dict[str, Any]:
        """Return the checkpoint's values. Raises CheckpointError."""
        remedy = "name another --work, or remove it"
        try:
            saved: dict[str, Any] = torch.load(self.path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {remedy}") from error
        if saved.get("steps") != self.steps:
            raise CheckpointError(
                f"{self.path}: of a run of {saved.get('steps')} steps, not {self.steps}: {remedy}"
            )
        return saved

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer. Only matrices of the layers decay."""
        every = [*self.model.named_parameters(), *self.aux.named_parameters()]
        return adamw(every, DECAY)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "aux": self.aux.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
        }
        save_checkpoint(self.path, state)

    def train_step(self) -> tuple[float, float]:
        """Do one step; return the answer loss and the auxiliary loss."""
        at = self.step * STEPS / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(at)
        stage = stage_of(at)
        people = generate.PEOPLE[: stage.people]
        aux = AUX_WEIGHT * (1 - at / AUX_STEPS)
        logits, targets = [], []
        side = torch.zeros(())
        for rows in (
            passages(self.rng, stage.passage_rows, "train", QUESTIONS, people, stage.kinds),
            facts(self.rng, stage.fact_rows, people),
            sums(self.rng, stage.sum_rows),
        ):
            if not rows:
                continue
            packed = pack(rows)
            expected = packed.targets >= 0
            with torch.autocast("cpu", torch.bfloat16):
                hidden, between = self.model(packed.ids, packed.positions, packed.mask)
                logits.append(self.model.logits(hidden[expected]).float())
                if aux > 0 and len(targets) == 0:  # passages alone have something to look up
                    for head, x, told in zip(
                        self.aux, between, previous_content(packed), strict=False
                    ):
                        known = told >= 0
                        side = side + F.cross_entropy(head(x[known]).float(), told[known])
            targets.append(packed.targets[expected])
        loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + aux * side)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach()), float(side.detach())

    def run(self, stop_after: float, every: int) -> bool:
        """Train until the end (True) or until the time is up (False)."""
        begun = last = time.monotonic()
        losses: list[tuple[float, float]] = []
        with progress_bar(self.step, self.steps) as on_step:
            while self.step < self.steps:
                losses.append(self.train_step())
                self.step += 1
                on_step(self.step, losses[-1][0])
                if self.step % every and self.step < self.steps:
                    continue
                now = time.monotonic()
                self.seconds += now - last
                last = now
                self.save()
                self._report(losses)
                losses = []
                if now - begun > stop_after:
                    return False
        return True

    def _report(self, losses: Sequence[tuple[float, float]]) -> None:
        """Print a line about the last steps."""
        kinds = " ".join(f"{k} {v:.2f}" for k, v in accuracy(self.model).items())
        loss, side = np.mean(losses, axis=0)
        print(
            f"{self.seconds:.0f} s, step {self.step}, loss {loss:.3f}, aux {side:.3f}, dev {kinds}",
            flush=True,
        )


def build_tokenizer() -> Any:
    """Return the tokenizer of words and digits; a token carries the space before it."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    plain = {*generate.SPECIAL_TOKENS, ".", "?"}
    vocabulary = {
        word[1:] if word.startswith("#") else word if word in plain else f"\u0120{word}": i
        for i, word in enumerate(generate.VOCABULARY)
    }
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[0-9]| ?[^\s0-9.?]+|[.?]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    prepend = [normalizers.Prepend(" ")]
    return word_tokenizer(vocabulary, generate.SPECIAL_TOKENS, pre_tokenizer, prepend)


CHAT_TEMPLATE = (
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content')"
    " | list | last | trim }}"
)


def export(model: Town, folder: Path) -> None:
    """Write the Hugging Face directory: weights in fp16, configuration, tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "num_hidden_layers": len(model.model.layers),
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "attention_bias": False,
        "mlp_bias": False,
    }
    write_model(folder, model, config, build_tokenizer(), CHAT_TEMPLATE, 16)


def main(argv: list[str] | None = None) -> int:
    """Train, and export at the end; return the exit status."""
    parser = run_arguments(__doc__, HERE)
    parser.add_argument("--steps", type=int, default=STEPS, help="of all stages together")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(args.work, args.steps)
        ended = args.export_only or trainer.run(args.stop_after, args.every)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoint", file=sys.stderr)
        return 130
    if not ended:
        print("stopped; the same command goes on from the checkpoint")
        return 0
    export(trainer.model, args.model_dir)
    print(f"wrote {args.model_dir}: step {trainer.step}, {trainer.seconds:.0f} s of training")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
