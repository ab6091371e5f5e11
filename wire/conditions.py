"""The load of the machine during a measurement, which says how far the figure can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

QUIET_CORES = 0.1
QUIET_SHARE = 0.05
"""The share of the processor that others may use while a machine still counts as quiet."""

QUIET_SPREAD = 0.25
"""The share of a figure by which its repeats may differ."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The use of the processor during a measurement, and the spread of its repeats.

    cores: the cores that the process may run on.
    others_cores: how many of them other programs used on average.
    stolen_cores: how many of them the hypervisor gave to other machines.
    held_share: share of the quota's periods in which a container's limit stopped the process.
    load: the kernel's average of the last minute.
    spread: distance of the repeats' quartiles over their median; 0 for a single repeat.
    measured_s: the time of the measurement, in seconds since 1970.
    """

    cores: int
    others_cores: float
    stolen_cores: float
    held_share: float
    load: float
    spread: float
    measured_s: float

    @property
    def was_busy(self) -> bool:
        """Whether others used enough of the processor to distort the figure."""
        return self.others_cores + self.stolen_cores > max(QUIET_CORES, QUIET_SHARE * self.cores)

    @property
    def is_noisy(self) -> bool:
        """Whether the figure may be far from that of a quiet machine.

        Under a quota the spread does not count, because the quota stops some repeats and not
        others.
        """
        return self.was_busy or (self.spread > QUIET_SPREAD and self.held_share <= 0)

    @property
    def noise(self) -> float:
        """A number for comparisons. Less is better."""
        taken = (self.others_cores + self.stolen_cores) / max(self.cores, 1)
        return taken + (self.spread if self.held_share <= 0 else 0.0)

    @property
    def text(self) -> str:
        """Return the causes of disturbance as the end of a sentence."""
        parts = []
        if _shown(self.others_cores, self.cores) != "0.0":
            used = _shown(self.others_cores, self.cores)
            parts.append(f"measured while other programs used {used} of {self.cores} cores")
        if _shown(self.stolen_cores, self.cores) != "0.0":
            stolen = _shown(self.stolen_cores, self.cores)
            parts.append(f"the hypervisor took {stolen} of {self.cores} cores for other machines")
        if self.held_share > 0:
            share = min(self.held_share, 1.0)
            parts.append(f"the container's processor limit stopped it in {share:.0%} of periods")
        elif self.spread > QUIET_SPREAD:
            parts.append(f"repeats differed by {min(self.spread, 10.0):.0%}")
        return ", ".join(parts) or "nothing else ran"


def worst(conditions: Iterable[Conditions | None]) -> Conditions | None:
    """Return the conditions that disturbed most, or None if none are known."""
    known = [item for item in conditions if item is not None]
    return max(known, key=lambda item: (item.is_noisy, item.noise), default=None)


def _shown(cores: float, of: int) -> str:
    return f"{min(max(cores, 0.0), of):.1f}"
