"""Teaching brings a smaller model closer to the original, and goes on after a stop."""

from __future__ import annotations

import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra torch")

import torch

from compression import distil as module
from compression.cuts import Cut, cut_blocks, cut_spec
from compression.distil import Recipe, depths, distil, distillation_loss
from compression.errors import CompressionError
from compression.importance import (
    Importance,
    Probe,
    best_cut,
    cut_of,
    gate_importance,
    layer_order,
    masked,
    shapes,
)
from compression.measure import losses
from compression.network import Network
from compression.text import batch_of, batches, divided, drawn
from evaluation.losses import Target
from model.checkpoint import Checkpoint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama"
CUT = Cut((0, 2), ((1,), (0,)), (tuple(range(24)), tuple(range(24))))
RECIPE = Recipe(60, rate=3e-3, batch_tokens=256)


def targets(count: int = 12) -> list[Target]:
    rng = random.Random(5)
    lengths = [rng.randint(8, 24) for _ in range(count)]
    return [Target(tuple(rng.randrange(4, 60) for _ in range(n)), 3) for n in lengths]


def original() -> tuple[Checkpoint, list[dict[str, Any]]]:
    checkpoint = Checkpoint.open(FIXTURE)
    return checkpoint, [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]


def teacher_and_student() -> tuple[Network, Network]:
    checkpoint, blocks = original()
    smaller = cut_blocks(checkpoint.spec, blocks, CUT)
    return Network(checkpoint.spec, blocks), Network(cut_spec(checkpoint.spec, CUT), smaller)


def test_teaching_halves_the_divergence_and_leaves_the_teacher(tmp_path: Path) -> None:
    teacher, student = teacher_and_student()
    before = [parameter.clone() for parameter in teacher.parameters()]
    text = list(batches(targets(), 256))
    probe = Probe(teacher, text)
    pruned = probe.of(student)
    losses: list[float] = []
    distil(
        teacher,
        student,
        CUT,
        targets(),
        RECIPE,
        tmp_path / "kept.pt",
        lambda step, total, loss: losses.append(loss),
    )
    taught = probe.of(student)
    assert taught < 0.5 * pruned
    assert len(losses) == RECIPE.steps
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_a_stopped_teaching_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 7)
    recipe = replace(RECIPE, steps=20)
    teacher, at_once = teacher_and_student()
    distil(teacher, at_once, CUT, targets(), recipe, tmp_path / "a.pt", lambda *_: None)

    def stop(step: int, total: int, loss: float) -> None:
        if step == 12:
            raise KeyboardInterrupt

    steps: list[int] = []
    teacher, stopped = teacher_and_student()
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, stopped, CUT, targets(), recipe, tmp_path / "b.pt", stop)
    teacher, resumed = teacher_and_student()
    distil(
        teacher,
        resumed,
        CUT,
        targets(),
        recipe,
        tmp_path / "b.pt",
        lambda step, *_: steps.append(step),
    )
    assert steps == list(range(13, 21))
    for one, other in zip(at_once.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense"])
def test_a_damaged_checkpoint_begins_anew(content: bytes, tmp_path: Path) -> None:
    kept = tmp_path / "kept.pt"
    kept.write_bytes(content)
    teacher, student = teacher_and_student()
    steps: list[int] = []
    distil(
        teacher,
        student,
        CUT,
        targets(),
        replace(RECIPE, steps=2),
        kept,
        lambda step, *_: steps.append(step),
    )
    assert steps == [1, 2]


def test_teaching_that_diverges_is_said_to_do_so(tmp_path: Path) -> None:
    """It went on with losses that are NaN, and its folder was a damaged one."""
    teacher, student = teacher_and_student()
    wild, steps = replace(RECIPE, rate=1e30), list[int]()
    with pytest.raises(CompressionError, match="is not finite: teach with a smaller --rate"):
        distil(
            teacher,
            student,
            CUT,
            targets(),
            wild,
            tmp_path / "kept.pt",
            lambda step, *_: steps.append(step),
        )
    assert len(steps) < 10
    with pytest.raises(CompressionError, match="predictions are not finite"):
        losses(teacher, student, list(batches(targets(), 256)))


def test_a_disk_that_is_full_is_said_to_be(tmp_path: Path) -> None:
    """The library says what a disk said as an error of its own, which was a traceback."""
    kept = tmp_path / "kept.pt"
    teacher, student = teacher_and_student()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def stop(*_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        raise KeyboardInterrupt  # A checkpoint is written now.

    try:
        with pytest.raises(OSError, match="too large") as failure:
            distil(teacher, student, CUT, targets(), RECIPE, kept, stop)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failure.value.filename == str(kept)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_recipe_is_not_used(tmp_path: Path) -> None:
    kept = tmp_path / "kept.pt"

    def stop(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    teacher, student = teacher_and_student()
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, student, CUT, targets(), replace(RECIPE, steps=3), kept, stop)
    assert kept.exists()
    steps: list[int] = []
    teacher, student = teacher_and_student()
    distil(
        teacher,
        student,
        CUT,
        targets(),
        replace(RECIPE, steps=2),
        kept,
        lambda step, *_: steps.append(step),
    )
    assert steps == [1, 2]


def test_the_loss_is_zero_for_the_original_itself() -> None:
    checkpoint, blocks = original()
    network = Network(checkpoint.spec, blocks)
    cut = Cut((0, 1, 2), ((0, 1),) * 3, (tuple(range(48)),) * 3)
    batch = batch_of(targets(3))
    with torch.no_grad():
        outputs = network.forward(batch.tokens, at=batch.predicts)
    assert float(distillation_loss(outputs, outputs, batch, cut, RECIPE)) == pytest.approx(
        0, abs=1e-6
    )


def test_hidden_states_count_as_much_as_the_recipe_says() -> None:
    teacher, student = teacher_and_student()
    batch = batch_of(targets(3))
    with torch.no_grad():
        wanted = teacher.forward(batch.tokens, at=batch.predicts)
        found = student.forward(batch.tokens, at=batch.predicts)
        none, one, two = (
            float(
                distillation_loss(wanted, found, batch, CUT, replace(RECIPE, hidden_weight=weight))
            )
            for weight in (0.0, 1.0, 2.0)
        )
    assert one > none
    assert two - one == pytest.approx(one - none, rel=1e-5)


def test_a_kept_layer_stands_for_those_removed_behind_it() -> None:
    assert depths(Cut((0, 3, 4), ((0,),) * 3, ((0,),) * 3), 8) == [3, 4, 8]


# ---- importance ----------------------------------------------------------------------------------


def test_a_part_that_adds_nothing_is_worth_nothing_and_goes_first() -> None:
    checkpoint, blocks = original()
    dead = [{name: np.array(value) for name, value in block.items()} for block in blocks]
    dead[2]["down.weight"][:, 5] = 0
    dead[2]["o.weight"][:, : dead[2]["o.weight"].shape[1] // 2] = 0  # those of KV head 0
    network = Network(checkpoint.spec, dead)
    text = list(batches(targets(), 256))
    heads, columns = gate_importance(network, text, lambda *_: None)
    assert columns[1][5] == 0
    assert heads[1][0] == 0
    assert heads[1][1] > 0
    assert min(value for place, value in enumerate(columns[1]) if place != 5) > 0
    cut = cut_of(checkpoint.spec, Importance(heads, columns, [0, 1]), _shape(3, 1, 47))
    assert 5 not in cut.columns[1]
    assert cut.heads[1] == (1,)


def test_a_layer_that_changes_nothing_goes_first() -> None:
    checkpoint, blocks = original()
    dead = [{name: np.array(value) for name, value in block.items()} for block in blocks]
    for name in ("o.weight", "down.weight"):
        dead[2][name][:] = 0
    network = Network(checkpoint.spec, dead)
    steps: list[tuple[int, int]] = []
    order = layer_order(
        Probe(network, list(batches(targets(), 256))), lambda *step: steps.append(step)
    )
    assert order[0] == 1
    assert len(order) == 2
    assert steps[-1] == (5, 5)


def test_the_chosen_cut_is_the_best_of_its_size_by_measurement() -> None:
    checkpoint, blocks = original()
    network = Network(checkpoint.spec, blocks)
    text = list(batches(targets(), 256))
    heads, columns = gate_importance(network, text, lambda *_: None)
    probe = Probe(network, text)
    importance = Importance(heads, columns, layer_order(probe, lambda *_: None))
    tried: list[int] = []
    cut = best_cut(probe, importance, 0.7, lambda done, total: tried.append(total), with_heads=True)
    found = probe.divergence(masked(network, cut))
    from compression.cuts import weights_of

    whole = weights_of(checkpoint.spec)
    sizes = {
        shape: weights_of(cut_spec(checkpoint.spec, cut_of(checkpoint.spec, importance, shape)))
        for shape in shapes(checkpoint.spec, with_heads=True)
    }
    chosen = sizes[cut.shape]
    assert chosen <= 0.7 * whole
    assert tried[0] > 1
    for shape, size in sizes.items():
        if chosen < size <= 0.7 * whole:
            other = cut_of(checkpoint.spec, importance, shape)
            assert probe.divergence(masked(network, other)) >= found


def _shape(layers: int, heads: int, columns: int) -> Any:
    from compression.cuts import Shape

    return Shape(layers, heads, columns)


# ---- text ----------------------------------------------------------------------------------------


def test_a_batch_marks_what_is_real_and_what_predicts() -> None:
    batch = batch_of([Target((7, 8, 9, 10), 2), Target((7, 8), 1)])
    assert batch.tokens.tolist() == [[7, 8, 9, 10], [7, 8, 0, 0]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.predicts.tolist() == [[False, True, True, True], [True, True, False, False]]


def test_batches_hold_every_sequence_once_within_their_size() -> None:
    found = list(batches(targets(), 60))
    assert sum(len(batch.tokens) for batch in found) == 12
    assert all(batch.tokens.numel() <= 60 for batch in found)


def test_a_step_draws_the_same_batch_again() -> None:
    one, same, other = (drawn(targets(), 100, 0, step) for step in (3, 3, 4))
    assert torch.equal(one.tokens, same.tokens)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)


def test_what_is_measured_is_not_taught() -> None:
    learn, held = divided(range(30), 0.1, 0)
    assert len(held) == 3
    assert sorted([*learn, *held]) == list(range(30))
    assert divided([4, 5], 0.1, 0)[0] != []
