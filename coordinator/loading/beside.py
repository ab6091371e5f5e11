"""The memory and storage of each device that the stages of other models leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.loading.record import DeploymentRecord
from planning.plan import Member, Stage
from wire.profile import DeviceProfile


@dataclass(frozen=True, slots=True)
class Use:
    """The memory and storage that stages take on one device."""

    memory_bytes: int = 0
    storage_bytes: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.memory_bytes + other.memory_bytes, self.storage_bytes + other.storage_bytes)

    def left_of(self, profile: DeviceProfile) -> DeviceProfile:
        """Return the profile with the memory and storage that other stages leave."""
        return replace(
            profile,
            memory_bytes=max(profile.memory_bytes - self.memory_bytes, 0),
            memory_total_bytes=max(profile.memory_total_bytes - self.memory_bytes, 0),
            storage_bytes=max(profile.storage_bytes - self.storage_bytes, 0),
        )


def use_of(records: Iterable[DeploymentRecord]) -> Mapping[str, Use]:
    """Return what these deployments take, by the ids of their devices. Others take nothing.

    A stage may take more memory than planned, such as a copy for fast prompts. The larger one of
    the planned and the reported figure counts.
    """
    found: defaultdict[str, Use] = defaultdict(Use)
    for record in records:
        for stage, team in zip(record.plan.stages, record.loaded, strict=True):
            parts: Sequence[Stage | Member] = stage.members or (stage,)
            for part, loaded in zip(parts, team, strict=True):
                memory_bytes = max(part.memory_bytes, loaded.memory_bytes)
                found[record.devices[part.device]] += Use(memory_bytes, part.storage_bytes)
    return found
