#!/usr/bin/env python3
"""Train the tiny OPT model from scratch on the generated questions, on a CPU, and export it.

The model is the OPT architecture (pre-norm, learned positions, ReLU, tied embeddings). Its
parameters carry the Hugging Face names, so that an export is a plain copy.

- A row of a batch is one passage with several questions. An attention mask lets every question see
  only the passage and itself, at the positions that it would have alone. So the model meets each
  question as in use, and cannot eliminate answers of the other questions.
- Training starts with few layers and an auxiliary loss. The first two layers must tell the last two
  content words before each token. With this loss the lookup of a fact ("attic" belongs to "lamp")
  forms within 300 steps. Without it, there was no lookup after 1400 steps.
- Then the model grows by layers whose output projections are zero, and training continues.
- Two and three hops form the same way. In the last stage, layers in the middle must tell the words
  that join the sentences, at the beginning of an answer.

Everything is seeded. A run continues from its checkpoint when it is started again.

    python train.py --work /tmp/tiny-opt                     # the committed model, about an hour
    python train.py --work /tmp/tiny-opt --stop-after 600    # ten minutes of it; run again to go on
    python train.py --work /tmp/tiny-opt --export-only       # write model/ from the checkpoint
"""

from __future__ import annotations

import math
import sys
import time
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
    run_arguments,
    save_checkpoint,
    word_tokenizer,
    write_model,
)

POSITION_OFFSET = 2  # OPT's position table starts two rows late
MAX_POSITIONS = 256
WIDTH = 128
HEADS = 4
WARM_UP = 200
BATCH_ROWS = 64
AUX_LAYERS = 2
AUX_STEPS = 1500
BRIDGE_LAYERS = (3, 5)  # the layers whose outputs tell the words that join sentences
SEED = 1


@dataclass(frozen=True)
class Stage:
    """A number of training steps at one depth."""

    steps: int
    layers: int
    items: tuple[int, ...]  # items per passage, drawn for each batch
    kinds: tuple[float, ...]  # weights of generate.KINDS
    same: float  # share of the rows whose items all have the same template
    rate: tuple[float, float]  # learning rate after the warm-up and at the end, a cosine between
    aux: float  # initial weight of the auxiliary loss, which falls linearly over AUX_STEPS
    shift: float  # share of the batches that start at a random position
    bridges: bool = False  # the auxiliary loss is of the joining words instead of the content words
    sentences: int = generate.MAX_SENTENCES


STAGES = (
    Stage(800, 4, (3, 4), (0.4, 0.2, 0.2, 0.2, 0.0), 0.7, (2e-3, 2e-3), 0.3, 0.0),
    Stage(3000, 8, (1, 2, 3, 3, 4), (0.25, 0.25, 0.25, 0.25, 0.0), 0.4, (1e-3, 3e-5), 0.0, 0.25),
    Stage(
        2500,
        8,
        (1, 2, 3, 4, 5),
        (0.1, 0.2, 0.2, 0.2, 0.3),
        0.5,
        (1e-3, 2e-5),
        0.3,
        0.25,
        bridges=True,
        sentences=generate.LONG_SENTENCES,
    ),
)


class Attention(nn.Module):
    """OPT self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the four projections."""
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the attention output under an additive mask."""
        b, t, d = x.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        qkv = F.linear(x, weight, bias).float().view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):  # slower in bfloat16 than in float32
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: torch.Tensor = self.out_proj(out.transpose(1, 2).reshape(b, t, d))
        return projected


class Layer(nn.Module):
    """One pre-norm OPT decoder layer."""

    def __init__(self, width: int, heads: int) -> None:
        """Make attention and feed-forward part, four times as wide inside."""
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        hidden: torch.Tensor = x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))
        return hidden


class Decoder(nn.Module):
    """Embeddings, layers and final norm, named as in Hugging Face's OPTDecoder."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        """Make the parameters; initialise() gives them their values."""
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(MAX_POSITIONS + POSITION_OFFSET, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)


class TinyOPT(nn.Module):
    """OPT for causal language modelling with tied embeddings."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        """Make and initialise the model."""
        super().__init__()
        self.width, self.heads = width, heads
        self.model = nn.ModuleDict({"decoder": Decoder(vocabulary, width, heads, layers)})
        for layer in self.decoder.layers:
            initialise(layer, 1.0 / math.sqrt(2 * layers))
        nn.init.normal_(self.decoder.embed_tokens.weight, std=0.06)
        with torch.no_grad():
            self.decoder.embed_positions.weight.copy_(0.08 * sinusoids(width))

    @property
    def decoder(self) -> Decoder:
        """Return the decoder."""
        decoder = self.model["decoder"]
        assert isinstance(decoder, Decoder)  # noqa: S101 - for mypy
        return decoder

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the final hidden states."""
        x = self.decoder.embed_tokens(ids) + self.decoder.embed_positions(
            positions + POSITION_OFFSET
        )
        between = []
        for layer in self.decoder.layers:
            x = layer(x, mask)
            between.append(x)
        out: torch.Tensor = self.decoder.final_layer_norm(x)
        return out, between

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return F.linear(hidden, self.decoder.embed_tokens.weight)

    def grow(self, layers: int) -> None:
        """Insert layers, evenly spread, that do not change the result yet."""
        old = list(self.decoder.layers)
        grown: list[nn.Module] = []
        for i in range(layers):
            source = i * len(old) // layers
            if i == 0 or source != (i - 1) * len(old) // layers:
                grown.append(old[source])
            else:
                layer = Layer(self.width, self.heads)
                initialise(layer, 0.0)
                grown.append(layer)
        self.decoder.layers = nn.ModuleList(grown)


def initialise(layer: Any, residual: float) -> None:
    """Set a layer's starting values; `residual` scales its addition to the stream."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        layer.self_attn.out_proj.weight.mul_(residual)
        layer.fc2.weight.mul_(residual)


def sinusoids(width: int, base: float = 100.0) -> torch.Tensor:
    """Return sinusoidal positions [rows of the table, width]: a start for the learned table."""
    at = torch.arange(MAX_POSITIONS + POSITION_OFFSET, dtype=torch.float32)[:, None]
    angle = at * base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(len(at), width)


@dataclass(frozen=True)
class Packed:
    """A batch as tensors: rows of a passage followed by questions that do not see each other."""

    ids: torch.Tensor  # [rows, tokens]
    positions: torch.Tensor  # [rows, tokens]
    mask: torch.Tensor  # [rows, 1, tokens, tokens], additive
    targets: torch.Tensor  # [rows, tokens]: the next token
    weights: torch.Tensor  # [rows, tokens]: 1 if the target is in an answer, 0 if padding
    bridges: torch.Tensor  # [rows, tokens, 2]: joining words where an answer is given, else -1
    passage_tokens: int


def pack(batch: generate.Batch, shift: int = 0, text_weight: float = 0.02) -> Packed:
    """Return the batch laid out for the model, all positions moved by `shift`."""
    rows, items, length = batch.questions.shape
    width = batch.passages.shape[1]
    slot = length + 1  # a question, its answer and the end
    questions = np.full((rows, items, slot), -1, dtype=np.int64)
    questions[:, :, :length] = batch.questions
    ends = (batch.questions >= 0).sum(axis=2)
    np.put_along_axis(questions, ends[..., None], generate.EOS_ID, axis=2)
    ids = np.concatenate([batch.passages, questions.reshape(rows, -1)], axis=1)
    passage_lengths = (batch.passages >= 0).sum(axis=1)
    column = np.arange(ids.shape[1])
    inside = np.where(column < width, column, (column - width) % slot)
    positions = np.where(column < width, column[None], passage_lengths[:, None] + inside[None])
    targets = np.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    last = (column == width - 1) | ((column >= width) & (inside == slot - 1))
    targets[:, last] = -1
    is_answer = inside[None, width:] >= np.repeat(batch.question_tokens, slot, axis=1) - 1
    weights = np.full(ids.shape, text_weight, dtype=np.float32)
    weights[:, width:][is_answer] = 1.0
    weights[targets < 0] = 0.0
    bridges = np.full((*ids.shape, generate.MAX_BRIDGES), -1, dtype=np.int64)
    joining = np.repeat(batch.bridges, slot, axis=1)
    bridges[:, width:] = np.where(is_answer[..., None], joining, -1)
    bridges[targets < 0] = -1

    group = np.where(column < width, 0, 1 + (column - width) // slot)
    causal = column[:, None] >= column[None]
    static = causal & ((group[None] == 0) | (group[:, None] == group[None]))
    visible = static[None] & ((ids >= 0)[:, None, :] | (column[:, None] == column[None]))
    mask = np.where(visible, np.float32(0), np.float32(-1e9))[:, None]
    return Packed(
        torch.from_numpy(np.maximum(ids, generate.PAD_ID * (ids < 0))),
        torch.from_numpy(np.minimum(positions + shift, MAX_POSITIONS - 1)),
        torch.from_numpy(mask),
        torch.from_numpy(np.maximum(targets, 0)),
        torch.from_numpy(weights),
        torch.from_numpy(bridges),
        width,
    )


@torch.no_grad()
def accuracy(model: TinyOPT, rng: np.random.Generator, rows: int = 128) -> dict[str, float]:
    """Return the share of dev questions, by kind, whose answer is the likeliest throughout."""
    model.eval()
    result = {}
    for k, kind in enumerate(generate.KINDS):
        weights = tuple(float(i == k) for i in range(len(generate.KINDS)))
        batch = generate.draw_batch(rng, rows, 3, "dev", weights)
        packed = pack(batch)
        hidden, _ = model(packed.ids, packed.positions, packed.mask)
        right = (model.logits(hidden).argmax(-1) == packed.targets) | (packed.weights < 1)
        each = right[:, packed.passage_tokens :].view(rows, 3, -1).all(-1).numpy()
        result[kind] = float(each[batch.kinds == k].mean())
    model.train()
    return result


CONTENT = np.zeros(len(generate.VOCABULARY), dtype=bool)
for _pool in generate.POOLS.values():
    CONTENT[[generate.WORD_ID[w] for w in _pool]] = True


def previous_content(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per token, the last content word before it and the one before that; -1 for none.

    A question's tokens count from the question's start.
    """
    ids = packed.ids.numpy()
    rows, total = ids.shape
    content = CONTENT[ids]
    width, slot = packed.passage_tokens, generate.QUESTION_LENGTH + 1
    column = np.arange(total)
    start = np.where(column < width, 0, width + (column - width) // slot * slot)
    at = np.where(content, column, -1)
    inclusive = np.maximum.accumulate(at, axis=1)
    before = np.concatenate([np.full((rows, 1), -1), inclusive[:, :-1]], axis=1)
    first = np.where(before >= start, before, -1)
    second = np.where(first >= 0, np.take_along_axis(before, np.maximum(first, 0), axis=1), -1)
    second = np.where(second >= start, second, -1)
    real = ids != generate.PAD_ID
    out = [
        np.where((p >= 0) & real, np.take_along_axis(ids, np.maximum(p, 0), axis=1), -1)
        for p in (first, second)
    ]
    return torch.from_numpy(out[0]), torch.from_numpy(out[1])


def cross_entropy(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the tokens that have a word (not -1)."""
    return F.cross_entropy(logits.float().flatten(0, 1), words.flatten(), ignore_index=-1)


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate of a step of a stage."""
    first, last = stage.rate
    if step < WARM_UP:
        return first * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, stage.steps - WARM_UP)
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))


class Trainer:
    """The state of a training run: model, optimizer, random generator, stage and step."""

    def __init__(self, work: Path) -> None:
        """Start a run, or continue the one whose checkpoint is in the work folder."""
        torch.manual_seed(SEED)
        self.path = work / "checkpoint.pt"
        self.rng = np.random.default_rng(SEED)
        self.stage, self.step, self.seconds = 0, 0, 0.0
        size = len(generate.VOCABULARY)
        self.model = TinyOPT(size, WIDTH, HEADS, STAGES[0].layers)
        self.aux = nn.ModuleList(nn.Linear(WIDTH, size) for _ in range(AUX_LAYERS))
        self.bridges = nn.ModuleList(nn.Linear(WIDTH, size) for _ in BRIDGE_LAYERS)
        if self.path.exists():
            saved = torch.load(self.path, weights_only=False)
            self.stage, self.step, self.seconds = saved["stage"], saved["step"], saved["seconds"]
            self.model = TinyOPT(size, WIDTH, HEADS, saved["layers"])
            self.model.load_state_dict(saved["model"])
            self.aux.load_state_dict(saved["aux"])
            self.rng.bit_generator.state = saved["rng"]
            self.optimizer = self._optimizer()
            if self.step:  # a stage starts with new ones
                self.bridges.load_state_dict(saved["bridges"])
                self.optimizer.load_state_dict(saved["optimizer"])
        else:
            self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer. Only matrices of the layers decay."""
        every = [
            *self.model.named_parameters(),
            *self.aux.named_parameters(),
            *self.bridges.named_parameters(),
        ]
        return adamw(every, 0.02)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "layers": len(self.model.decoder.layers),
            "model": self.model.state_dict(),
            "aux": self.aux.state_dict(),
            "bridges": self.bridges.state_dict(),
            "rng": self.rng.bit_generator.state,
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.path, state)

    def train_step(self) -> tuple[float, float]:
        """Do one step; return the answer loss and the auxiliary loss."""
        stage = STAGES[self.stage]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, self.step)
        items = int(self.rng.choice(stage.items))
        batch = generate.draw_batch(
            self.rng, BATCH_ROWS, items, "train", stage.kinds, stage.sentences, stage.same
        )
        longest = batch.passages.shape[1] + generate.QUESTION_LENGTH + 1
        moved = self.rng.random() < stage.shift
        shift = int(self.rng.integers(MAX_POSITIONS - longest)) if moved else 0
        packed = pack(batch, shift)
        aux = stage.aux * (1 - self.step / AUX_STEPS)
        side = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            hidden, between = self.model(packed.ids, packed.positions, packed.mask)
            logits = self.model.logits(hidden)
            if aux > 0 and stage.bridges:
                for i, head in enumerate(self.bridges):
                    words = packed.bridges[..., i]
                    side = side + cross_entropy(head(between[BRIDGE_LAYERS[i]]), words)
            elif aux > 0:
                for head, x, words in zip(
                    self.aux, between, previous_content(packed), strict=False
                ):
                    side = side + cross_entropy(head(x), words)
        each = F.cross_entropy(
            logits.float().flatten(0, 1), packed.targets.flatten(), reduction="none"
        )
        loss = (each * packed.weights.flatten()).sum() / (packed.weights == 1).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total = loss + aux * side
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach()), float(side.detach())

    def run(self, stop_after: float, every: int, model_dir: Path) -> bool:
        """Train until the end (True) or until the time is up (False)."""
        begun = last = time.monotonic()
        losses: list[tuple[float, float]] = []
        while self.stage < len(STAGES):
            stage = STAGES[self.stage]
            if self.step == 0 and self.stage > 0:
                torch.manual_seed(SEED + self.stage)
                if len(self.model.decoder.layers) < stage.layers:
                    self.model.grow(stage.layers)
                self.optimizer = self._optimizer()
            while self.step < stage.steps:
                losses.append(self.train_step())
                self.step += 1
                if self.step % every and self.step < stage.steps:
                    continue
                now = time.monotonic()
                self.seconds += now - last
                last = now
                self.save()
                kinds = " ".join(
                    f"{k} {v:.2f}"
                    for k, v in accuracy(self.model, np.random.default_rng(SEED + 1)).items()
                )
                loss, side = np.mean(losses, axis=0)
                print(
                    f"{self.seconds:.0f} s, stage {self.stage + 1}, step {self.step}, "
                    f"loss {loss:.3f}, aux {side:.3f}, dev {kinds}",
                    flush=True,
                )
                losses = []
                if now - begun > stop_after:
                    return False
            self.stage, self.step = self.stage + 1, 0
            self.save()
            export(self.model, model_dir)
        return True


def build_tokenizer() -> Any:
    """Return the word-level tokenizer; a word carries the space before it, as in GPT-2."""
    from tokenizers import pre_tokenizers

    first = len(generate.SPECIAL_TOKENS)
    vocabulary = {
        word if i < first or word in ".?" else "\u0120" + word: i
        for i, word in enumerate(generate.VOCABULARY)
    }
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return word_tokenizer(vocabulary, generate.SPECIAL_TOKENS, pre_tokenizer)


CHAT_TEMPLATE = (
    "{{ messages | selectattr('role', 'in', ['user', 'assistant']) | map(attribute='content')"
    " | map('trim') | join(' ') }}"
)
"""Questions and answers of earlier turns stay in the prompt, because they name the facts."""


def export(model: TinyOPT, folder: Path) -> None:
    """Write the Hugging Face directory: weights in fp16, configuration, tokenizer."""
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "layerdrop": 0.0,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "hidden_size": model.width,
        "word_embed_proj_dim": model.width,
        "ffn_dim": 4 * model.width,
        "num_attention_heads": model.heads,
        "num_hidden_layers": len(model.decoder.layers),
        "max_position_embeddings": MAX_POSITIONS,
    }
    write_model(folder, model, config, build_tokenizer(), CHAT_TEMPLATE, 8, begin="</s>")


def main(argv: list[str] | None = None) -> int:
    """Train, and export at the end of every stage; return the exit status."""
    parser = run_arguments(__doc__, HERE)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.work)
    if not args.export_only and not trainer.run(args.stop_after, args.every, args.model_dir):
        print("stopped; the same command goes on from the checkpoint")
        return 0
    export(trainer.model, args.model_dir)
    layers = len(trainer.model.decoder.layers)
    print(f"wrote {args.model_dir}: {layers} layers, {trainer.seconds:.0f} s of training")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
