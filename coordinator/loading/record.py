"""The records of deployments on disk, by which a restarted coordinator takes over their stages.

Agents keep their stages when they lose the coordinator. The record says which stages belong
together. It is written when its model is placed. It is of no use once one of the stages is gone:
then the coordinator loads the model again.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.disk import Disk, fault, write
from coordinator.loading.deployment import Deployment, Team
from coordinator.loading.drafting import Draft
from coordinator.roster.members import Member
from model.bounded import read_json
from planning.json_codec import from_plain, to_plain
from planning.plan import Plan, PlanError
from wire.messages import StageLoaded, TeamMeasured

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A placed deployment, without what its request and the model's files say.

    fingerprint: of the checkpoint from which the stages were made.
    devices: ids of the devices by the names in the plan.
    loaded, sums, quality, weights, draft: as of ``Deployment``.
    """

    epoch: int
    fingerprint: str
    plan: Plan
    context_tokens: int
    devices: Mapping[str, str]
    loaded: tuple[tuple[StageLoaded, ...], ...]
    sums: tuple[TeamMeasured | None, ...]
    quality: Mapping[str, Any] | None = None
    weights: tuple[str, ...] = ()
    draft: Draft | None = None
    version: int = VERSION

    @staticmethod
    def of(deployment: Deployment) -> DeploymentRecord:
        """Return the record of a deployment."""
        devices = {
            name: member.device
            for stage, team in zip(deployment.plan.stages, deployment.teams, strict=True)
            for name, member in zip(stage.devices, team, strict=True)
        }
        return DeploymentRecord(
            deployment.epoch,
            deployment.fingerprint,
            deployment.plan,
            deployment.context_tokens,
            devices,
            deployment.loaded,
            deployment.sums,
            deployment.quality,
            tuple(deployment.weights),
            deployment.draft,
        )

    def teams(self, members: Sequence[Member]) -> tuple[Team, ...] | None:
        """Return the members that have kept all stages, or None while one stage is missing."""
        kept = {member.device: member for member in members if self.epoch in member.kept}
        if not set(self.devices.values()) <= kept.keys():
            return None
        return tuple(
            tuple(kept[self.devices[name]] for name in stage.devices) for stage in self.plan.stages
        )


class RecordFile:
    """The records by model in ``deployment.json``, in the coordinator's state directory."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        """``disk`` writes the file. Without one, each change returns when it is written."""
        self._path = directory / "deployment.json"
        self._write_text = write if disk is None else disk.replace
        self._records: dict[str, Any] | None = None
        """The contents of the file. None: it was not read yet."""

    def keep(self, deployment: Deployment) -> None:
        """Write the record of a deployment that was placed."""
        self._write({**self._known(), deployment.name: to_plain(DeploymentRecord.of(deployment))})

    def forget(self, name: str) -> None:
        """Remove the record of a model."""
        records = self._known()
        if name in records:
            self._write({other: record for other, record in records.items() if other != name})

    def read(self) -> dict[str, DeploymentRecord]:
        """Return the records by model, without those that this version cannot use."""
        found = {}
        for name, plain in self._known().items():
            try:
                record: DeploymentRecord = from_plain(
                    DeploymentRecord, plain, "record", finite=True
                )
                _check(record)
            except (ValueError, PlanError) as error:
                log.warning("%s: %s cannot be taken over (%s)", self._path, name, error)
            else:
                found[name] = record
        return found

    def _known(self) -> dict[str, Any]:
        """Return the contents of the file, which may be anything."""
        if self._records is None:
            self._records = {}
            try:
                records = read_json(self._path)
                if not isinstance(records, dict):
                    raise ValueError("it is of another form")
                self._records = records
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                log.warning(
                    "%s cannot be used (%s): models are loaded again", self._path, fault(error)
                )
        return self._records

    def _write(self, records: dict[str, Any]) -> None:
        self._records = records
        self._write_text(self._path, json.dumps(records) if records else None, self._not_written)

    def _not_written(self, error: OSError) -> None:
        log.warning("%s: %s: a restart will load models again", self._path, error.strerror)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _check(record: DeploymentRecord) -> None:
    """Raise ValueError if parts of a record do not fit together."""
    stages = record.plan.stages
    named = {name for stage in stages for name in stage.devices}
    if record.version != VERSION:
        raise ValueError(f"it has version {record.version}, and this program reads {VERSION}")
    if not 0 < record.epoch < 1 << 62 or not stages or named != record.devices.keys():
        raise ValueError("its stages and devices do not fit together")
    if [len(stage.devices) for stage in stages] != [len(team) for team in record.loaded]:
        raise ValueError("it does not know what each device has loaded")
    if len(record.sums) != len(stages):
        raise ValueError("it does not know the sums of each stage")
