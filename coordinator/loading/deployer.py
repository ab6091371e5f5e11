"""Makes the files of a plan, and deploys it until no stage was found damaged."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from coordinator.errors import AgentDamaged, AgentFailed, AgentLost, LinkFailed
from coordinator.files.artifacts import ArtifactStore
from coordinator.files.vocabulary import Vocabulary, make_vocabulary
from coordinator.loading.deployment import Deployment, Planned, deploy, unload, wanted_artifacts
from coordinator.loading.drafting import DRAFT
from coordinator.loading.models import Models
from coordinator.loading.state import FilesMended, deployment_of
from coordinator.roster.measurements import Step, in_thread
from coordinator.roster.members import Member, Roster
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning.request import model_name
from wire.messages import BlockRef, StageLoaded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """The files that a plan's devices need.

    blocks: the artifacts of each device, by its name in the plan.
    vocabulary: of the device that samples. None if the model has none.
    """

    blocks: Mapping[str, Sequence[BlockRef]]
    vocabulary: Vocabulary | None


class Deployer:
    """Deploys plans on the devices that have joined. The caller holds the turn."""

    def __init__(
        self,
        roster: Roster,
        store: ArtifactStore,
        models: Models,
        report: Callable[[Step], None],
    ) -> None:
        self._roster = roster
        self._store = store
        self._models = models
        self._report = report
        self._vocabularies: list[tuple[Tokenizer, Vocabulary | None]] = []
        """The vocabularies of the loaded models' tokenizers, and of the last one."""
        self._damages: dict[int, AgentDamaged] = {}
        """The damages of deployments that did not serve yet, by epoch."""

    def note_damage(self, epoch: int, error: AgentDamaged) -> None:
        """Note that a stage of ``epoch``, which does not serve yet, was found damaged."""
        self._damages[epoch] = error

    def damage(self, epoch: int) -> AgentDamaged | None:
        """The damage of the deployment that was loaded last, found before it served."""
        return self._damages.get(epoch)

    async def files(self, planned: Planned, tokenizer: Tokenizer) -> PlanFiles:
        """Make the files of a plan. Raises CoordinatorError, ModelError."""
        blocks = await self._quantize(planned)
        return PlanFiles(blocks, await self.vocabulary(tokenizer, planned.checkpoint.spec))

    async def vocabulary(self, tokenizer: Tokenizer, spec: ModelSpec) -> Vocabulary | None:
        """Return the vocabulary of a model, made once for each loaded tokenizer."""
        return await asyncio.to_thread(self._vocabulary_of, tokenizer, spec)

    async def deploy(
        self, planned: Planned, tokenizer: Tokenizer, files: PlanFiles, members: Sequence[Member]
    ) -> Deployment:
        """Load and connect the stages of a plan, beside all deployments that the roster keeps.

        Raises AgentFailed, LinkFailed.
        """
        self._damages.clear()
        while True:  # This ends, because a device fetches or makes damaged files again.
            epoch = secrets.randbits(62)  # Hard to guess, and not repeated after a restart.
            on_loaded = partial(self._on_loaded, model_name(planned.request.model))
            try:
                deployment = await deploy(
                    planned,
                    tokenizer,
                    files.blocks,
                    members,
                    epoch,
                    self._report,
                    on_loaded,
                    files.vocabulary,
                    tuple(self._roster.keeps),
                )
            except AgentLost:
                raise
            except (AgentFailed, LinkFailed):
                if epoch not in self._damages:
                    raise
                continue  # A damaged stage takes no connection. The link is well.
            if epoch not in self._damages:
                return deployment
            await asyncio.shield(unload(deployment.devices, epoch))

    async def _quantize(self, planned: Planned) -> dict[str, list[BlockRef]]:
        """Make the plan's artifacts, and return those of each device by its name in the plan."""
        names, wanted = zip(*wanted_artifacts(planned), strict=True)
        refs = await in_thread(
            "quantize",
            lambda on_step, cancelled: self._store.quantize(
                planned.checkpoint, wanted, on_step, cancelled
            ),
            self._report,
        )
        blocks: dict[str, list[BlockRef]] = {name: [] for name in (*names, DRAFT)}
        for name, ref in zip(names, refs, strict=True):
            blocks[name].append(ref)
        draft = planned.draft
        if draft is not None:
            blocks[DRAFT] += await in_thread(
                "quantize",
                lambda on_step, cancelled: self._store.quantize(
                    draft.checkpoint, draft.wanted, on_step, cancelled, keep=True
                ),
                self._report,
            )
        return blocks

    def _vocabulary_of(self, tokenizer: Tokenizer, spec: ModelSpec) -> Vocabulary | None:
        for known, vocabulary in self._vocabularies:
            if known is tokenizer:
                if vocabulary is not None:
                    self._store.keep(vocabulary.data)
                return vocabulary
        used = [deployment_of(state) for _, state in self._models.present()]
        loaded = [deployment.tokenizer for deployment in used if deployment is not None]
        for known, vocabulary in tuple(self._vocabularies):
            if not any(known is one for one in loaded):
                self._vocabularies.remove((known, vocabulary))
                if vocabulary is not None:
                    vocabulary.close()
        vocabulary = make_vocabulary(tokenizer, spec, self._store)
        self._vocabularies.append((tokenizer, vocabulary))
        return vocabulary

    def _on_loaded(self, name: str, member: Member, loaded: StageLoaded) -> None:
        if loaded.damaged_files:
            self._models.apply(name, FilesMended())
            log.warning(
                "%s: %d damaged files were fetched or made again", member.name, loaded.damaged_files
            )
