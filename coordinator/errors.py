"""What the coordinator tells a user who asked for something that did not work.

CoordinatorError            one line, with what to do next
├── NoAgents                nothing has joined
├── AgentFailed             an agent could not do what it was asked
│   ├── AgentLost           ... because it is gone
│   ├── AgentDamaged        ... because a file of its stage is damaged: the stage stopped
│   └── AgentLied           ... because it broke the protocol in an answer
├── LinkFailed              two agents live, and one cannot reach the other
├── AnswerWithdrawn         text that was shown came from a damaged stage
├── Stalled                 the devices live, but no token comes
├── Busy                    another plan, load, unload or measurement is under way
├── NotLoaded               no model is loaded, or its deployment is broken
├── StorageFull             the coordinator may not keep as many blocks as it needs
└── MakingFailed            files that a backend needs beside blocks could not be made

A wrong request is planning.errors.RequestInvalid. The HTTP routes answer with ``status`` and
``code``.
"""

from __future__ import annotations

UPDATE = "update shoal there, or leave it out with --exclude"
"""What to do about an agent that sends what no working one does."""


class CoordinatorError(Exception):
    """A request was not carried out."""

    status = 500
    code = "internal_error"

    def unplaced(self, why: str) -> CoordinatorError:
        """What to say where this broke a deployment, and it cannot be placed anew: ``why``."""
        return NotLoaded(f"{self}; the model cannot be placed anew: {why}")


class NoAgents(CoordinatorError):
    """No agent has joined."""

    status = 503
    code = "no_agents"


class AgentFailed(CoordinatorError):
    """The agent ``name`` answered that it cannot."""

    status = 502
    code = "agent_failed"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class AgentLost(AgentFailed):
    """The agent ``name`` is gone."""

    status = 503
    code = "device_lost"

    def __init__(
        self, name: str, cause: str, alone: str | None = None, *, broke_protocol: bool = False
    ) -> None:
        """``alone``: why the other devices cannot take its place, once that was tried.
        ``broke_protocol``: it lives, and was dropped for what it sent.
        """
        rest = "" if alone is None else f"; the others cannot take its place: {alone}"
        advice = UPDATE if broke_protocol else "check its power, network and agent"
        super().__init__(name, f"device lost ({cause}); {advice}{rest}")
        self.cause = cause
        self.broke_protocol = broke_protocol

    def unplaced(self, why: str) -> CoordinatorError:
        return AgentLost(self.name, self.cause, why, broke_protocol=self.broke_protocol)


class LinkFailed(CoordinatorError):
    """``source`` cannot reach ``target``, although the coordinator reaches both."""

    status = 503
    code = "link_failed"

    def __init__(self, source: str, target: str, reason: str, alone: str | None = None) -> None:
        """``reason`` names addresses; ``alone``: why no plan does without it, where none does."""
        rest = "" if alone is None else f"; no plan does without this link: {alone}"
        super().__init__(
            f"link lost: {source} cannot reach {target} ({reason}), and both are alive: check the"
            f" network between them{rest}"
        )
        self.source = source
        self.target = target
        self.reason = reason

    def unplaced(self, why: str) -> CoordinatorError:
        return LinkFailed(self.source, self.target, self.reason, why)


class AgentDamaged(AgentFailed):
    """The agent ``name`` stopped its stage: a file that the stage runs from is damaged."""

    status = 503
    code = "stage_damaged"

    def unplaced(self, why: str) -> CoordinatorError:
        return AgentFailed(self.name, f"{self.reason}; the model cannot be loaded again yet: {why}")


class AnswerWithdrawn(CoordinatorError):
    """Text that the user has seen came from a damaged stage, and another text would follow now."""

    status = 503
    code = "answer_withdrawn"

    def __init__(self) -> None:
        super().__init__(
            "the answer so far came from a device with a damaged file and is wrong: ask again"
        )


class AgentLied(AgentFailed):
    """The agent ``name`` sent what no working one sends; the answer cannot be trusted."""

    code = "device_misbehaved"

    def __init__(self, name: str, lie: str) -> None:
        super().__init__(name, f"it {lie}; {UPDATE}")


class Stalled(CoordinatorError):
    """Heartbeats come, tokens do not."""

    status = 504
    code = "stalled"


class Busy(CoordinatorError):
    """One plan, load, unload or measurement at a time."""

    status = 409
    code = "busy"


class NotLoaded(CoordinatorError):
    """There is no model to run."""

    status = 503
    code = "model_not_loaded"


class StorageFull(CoordinatorError):
    """The blocks of one operation exceed the coordinator's storage limit."""

    status = 507
    code = "storage_full"


class MakingFailed(CoordinatorError):
    """Files that a backend needs beside blocks could not be made."""

    code = "making_failed"
