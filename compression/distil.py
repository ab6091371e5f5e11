"""Teaches a smaller model to predict what the original predicts, on the user's text.

The loss of a step has two parts: KL(original || student) of the predictions that matter, and how
far the hidden states behind each kept layer are from the original's at the same depth. A kept layer
stands for those behind it that were removed, so its state is compared with the last of theirs
(Hinton et al., "Distilling the Knowledge in a Neural Network"; Jiao et al., "TinyBERT").
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression.cuts import Cut
from compression.errors import CompressionError
from compression.importance import divergence_sum
from compression.network import Network, Outputs
from compression.text import Batch, drawn
from evaluation.losses import Target

OnStep = Callable[[int, int, float], None]

SAVE_EVERY = 50
"""Steps between two checkpoints of the training."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student is taught.

    rate: the highest learning rate, after a tenth of the steps. It falls to zero as a cosine.
    batch_tokens: tokens of a step, with the padding.
    hidden_weight: the weight of the hidden states beside the predictions.
    """

    steps: int
    rate: float = 1e-3
    batch_tokens: int = 2048
    hidden_weight: float = 1.0
    seed: int = 0


def distil(
    teacher: Network,
    student: Network,
    cut: Cut,
    targets: Sequence[Target],
    recipe: Recipe,
    kept: Path,
    on_step: OnStep,
) -> None:
    """Train the student in place. It goes on from ``kept`` if that has a step of the same recipe.

    kept: a checkpoint, written every SAVE_EVERY steps and when the training is interrupted.
    on_step: gets (steps done, all steps, loss). Raises OSError, CompressionError.
    """
    parameters = student.parameters()
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    step = _restored(kept, recipe, parameters, optimizer)
    try:
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = _rate(recipe, step)
            batch = drawn(targets, recipe.batch_tokens, recipe.seed, step)
            with torch.no_grad():
                expected = teacher.forward(batch.tokens, at=batch.predicts)
            found = student.forward(batch.tokens, at=batch.predicts)
            loss = distillation_loss(expected, found, batch, cut, recipe)
            told = float(loss.detach())
            if not math.isfinite(told):
                raise CompressionError(
                    f"the loss of step {step} is not finite: teach with a smaller --rate, into "
                    "another --out"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            on_step(step, recipe.steps, told)
            if step % SAVE_EVERY == 0 and step < recipe.steps:
                _save(kept, recipe, step, parameters, optimizer)
    except KeyboardInterrupt:
        _save(kept, recipe, step, parameters, optimizer)
        raise
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def distillation_loss(
    expected: Outputs, found: Outputs, batch: Batch, cut: Cut, recipe: Recipe
) -> torch.Tensor:
    """Return the loss of a batch: divergence in nats per token, and weighted relative distances.

    Both outputs have logits where the batch predicts.
    """
    loss = divergence_sum(expected.logits, found.logits) / len(expected.logits)
    if not recipe.hidden_weight:
        return loss
    distances = []
    for place, depth in enumerate(depths(cut, len(expected.hidden) - 1)):
        own, others = (
            states[batch.real] for states in (found.hidden[place + 1], expected.hidden[depth])
        )
        distances.append((own - others).square().mean() / others.square().mean())
    return loss + recipe.hidden_weight * torch.stack(distances).mean()


def depths(cut: Cut, layers: int) -> list[int]:
    """Return, for each kept layer, how many of the original's layers it and those before stand for.

    >>> depths(Cut((0, 3), ((0,),) * 2, ((0,),) * 2), 6)
    [3, 6]
    """
    return [*cut.layers[1:], layers]


def _rate(recipe: Recipe, step: int) -> float:
    warm_up = max(1, recipe.steps // 10)
    if step < warm_up:
        return recipe.rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, recipe.steps - warm_up)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * done))


def _save(
    path: Path,
    recipe: Recipe,
    step: int,
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the checkpoint, whole or not at all. Raises OSError."""
    state = {
        "recipe": repr(recipe),
        "step": step,
        "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(),
    }
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # torch says what the disk said as a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    part.replace(path)


def _restored(
    path: Path,
    recipe: Recipe,
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Restore a checkpoint of the same recipe and shapes; return its step, or 0 without one."""
    if not path.exists():
        return 0
    try:
        state: Mapping[str, Any] = torch.load(path, weights_only=True)
        fits = state["recipe"] == repr(recipe) and [p.shape for p in state["parameters"]] == [
            p.shape for p in parameters
        ]
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        return 0  # Damaged: the training begins anew.
    if not fits:
        return 0
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
