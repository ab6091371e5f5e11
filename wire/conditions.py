"""What else went on while a figure was measured: how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

QUIET_CORES = 0.1
QUIET_SHARE = 0.05
"""Of the processor, what others may use while a figure still counts as one of a quiet machine."""

QUIET_SPREAD = 0.25
"""Share of a figure by which its repeats may differ."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What used the processor while a figure was measured, and how far its repeats disagreed.

    ``cores``: those that the process may run on. ``others_cores``: of them, what other programs
    used on average; ``stolen_cores``: what the hypervisor gave to other machines. ``held_share``:
    share of the quota's periods in which a container's limit held the process up. ``load``: the
    kernel's average of the last minute. ``spread``: distance of the quartiles of the repeats over
    their median; 0 where there was one only. ``measured_s``: when, in seconds since 1970.
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
        """Whether others used so much of the processor that the figure may be theirs."""
        return self.others_cores + self.stolen_cores > max(QUIET_CORES, QUIET_SHARE * self.cores)

    @property
    def is_noisy(self) -> bool:
        """Whether the figure may be far from that of a quiet machine.

        Under a quota repeats differ by nature: it holds some of them up.
        """
        return self.was_busy or (self.spread > QUIET_SPREAD and self.held_share <= 0)

    @property
    def noise(self) -> float:
        """A number to compare by: the less the better."""
        taken = (self.others_cores + self.stolen_cores) / max(self.cores, 1)
        return taken + (self.spread if self.held_share <= 0 else 0.0)

    @property
    def text(self) -> str:
        """What disturbed the measurement, as the end of a sentence."""
        parts = []
        if _shown(self.others_cores, self.cores) != "0.0":
            used = _shown(self.others_cores, self.cores)
            parts.append(f"measured while other programs used {used} of {self.cores} cores")
        if _shown(self.stolen_cores, self.cores) != "0.0":
            stolen = _shown(self.stolen_cores, self.cores)
            parts.append(f"the hypervisor took {stolen} of {self.cores} cores for other machines")
        if self.held_share > 0:
            share = min(self.held_share, 1.0)
            parts.append(f"the container's processor limit held it up in {share:.0%} of periods")
        elif self.spread > QUIET_SPREAD:
            parts.append(f"repeats differed by {min(self.spread, 10.0):.0%}")
        return ", ".join(parts) or "nothing else ran"


def worst(conditions: Iterable[Conditions | None]) -> Conditions | None:
    """The one that disturbed most; None where nothing is known."""
    known = [item for item in conditions if item is not None]
    return max(known, key=lambda item: (item.is_noisy, item.noise), default=None)


def _shown(cores: float, of: int) -> str:
    return f"{min(max(cores, 0.0), of):.1f}"
