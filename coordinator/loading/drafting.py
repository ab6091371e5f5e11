"""The draft model of a deployment: what it is, and whether it may guess for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.files.artifacts import Wanted
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.given import require_model
from model.quantize import DEFAULT_SCHEME, Format
from model.tokenizer import Tokenizer
from planning.draft import ASSUMED_ACCEPTANCE, DraftInput, DraftOn, gain
from planning.errors import RequestInvalid
from planning.plan import Plan
from planning.request import LoadRequest, model_name
from wire.messages import BlockRef, DraftModel

DRAFT = ""
"""Stands for the draft model among the names of devices that get blocks."""

ENOUGH_GUESSES = 100
"""After so many guesses the measured share of right ones replaces the assumed one."""


@dataclass(slots=True)
class Counts:
    """The guesses of a deployment's draft model so far.

    checked: those that were right, and the first wrong one of each pass. The others tell nothing.
    """

    drafted: int = 0
    accepted: int = 0
    checked: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """Count the guesses of a pass."""
        self.drafted += drafted
        self.accepted += accepted
        self.checked += accepted + (accepted < drafted)


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model that a plan has room for. It is kept on disk with its deployment.

    token_s: the predicted time of a guess on the first stage's device.
    """

    model: str
    bits: int
    memory_bytes: int
    token_s: float

    def describe(self, plan: Plan, counts: Counts | None = None) -> dict[str, Any]:
        """Return JSON with the predicted gain, and from what that was predicted.

        Without enough counted guesses the share of right ones is an assumption.
        """
        found = counts or Counts()
        is_measured = found.checked >= ENOUGH_GUESSES
        acceptance = found.accepted / found.checked if is_measured else ASSUMED_ACCEPTANCE
        return {
            "model": self.model,
            "bits": self.bits,
            "device": plan.stages[0].device,
            "memory_bytes": self.memory_bytes,
            "token_s": self.token_s,
            "drafted_tokens": found.drafted,
            "accepted_tokens": found.accepted,
            "checked_tokens": found.checked,
            "acceptance": acceptance,
            "acceptance_is": "measured" if is_measured else "assumed",
            "predicted_gain": gain(plan.decode_s, self.token_s, acceptance),
        }


@dataclass(frozen=True, slots=True, eq=False)
class PlannedDraft:
    """A draft model with its files, and what it takes on each device."""

    checkpoint: Checkpoint
    given: DraftInput
    model: str
    places: Mapping[str, DraftOn] = field(default_factory=dict)

    def on(self, plan: Plan) -> Draft:
        """Return the draft model as ``plan`` places it: on the device of the first stage."""
        stage = plan.stages[0]
        place = self.places[stage.members[0].device if stage.members else stage.device]
        return Draft(self.model, self.given.bits, place.memory_bytes, place.token_s)

    @property
    def wanted(self) -> list[Wanted]:
        """Its artifacts, one per block."""
        return [Wanted(block, fmt) for block, fmt in enumerate(self.given.formats)]

    def message(self, plan: Plan, blocks: Sequence[BlockRef]) -> DraftModel:
        """Return what the first stage's device is told."""
        memory_bytes = self.on(plan).memory_bytes
        spec = self.checkpoint.spec.to_dict()
        return DraftModel(spec, tuple(blocks), self.given.context_tokens, memory_bytes)


def open_draft(request: LoadRequest, checkpoint: Checkpoint, context_tokens: int) -> PlannedDraft:
    """Return the draft model of a request, from its checkpoint. Raises RequestInvalid."""
    model = Path() if request.draft is None else request.draft
    spec = checkpoint.spec
    if spec.encodes:
        raise RequestInvalid(
            f"draft: {model_name(model)} encodes whole texts: name a model that generates", "draft"
        )
    fmt = Format.of(request.draft_bits, DEFAULT_SCHEME, request.group_size)
    formats = [checkpoint.format_of(block, fmt) for block in range(spec.block_count)]
    given = DraftInput(
        spec, request.draft_bits, formats, min(context_tokens, spec.max_context), request.slots
    )
    return PlannedDraft(checkpoint, given, model_name(model))


def check_vocabulary(request: LoadRequest, *, weights: bool) -> None:
    """Raise RequestInvalid if the draft model has another vocabulary, and ModelError.

    Without ``weights`` the files of a tokenizer may not be here yet. Then nothing is checked.
    """
    try:
        tokenizers = [load_tokenizer(path) for path in (request.model, request.draft) if path]
    except ModelError:
        if weights:
            raise
        return
    require_same_vocabulary(request, *tokenizers)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a model's directory. Raises ModelError."""
    require_model(directory)
    return Tokenizer.load(directory)


def require_same_vocabulary(request: LoadRequest, own: Tokenizer, other: Tokenizer) -> None:
    """Raise RequestInvalid unless the draft model's tokens have the texts of the model's."""
    if request.draft is None:
        return
    known, found = _texts(own), _texts(other)
    differing = [token for token in sorted(known | found) if known.get(token) != found.get(token)]
    if differing:
        first, name, draft = differing[0], model_name(request.model), model_name(request.draft)
        raise RequestInvalid(
            f"draft: {draft} has another vocabulary than {name}: {len(differing)} tokens differ, "
            f"and token {first} is {_shown(found, first)} for {draft} and {_shown(known, first)} "
            f"for {name}. Name a smaller model of the same family",
            "draft",
        )


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {token: text for text, token in vocabulary.items()}


def _shown(texts: Mapping[int, str], token: int) -> str:
    return repr(texts[token])[:40] if token in texts else "missing"
