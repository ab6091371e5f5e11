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
├── Busy                    another plan, load or unload is under way
├── NotLoaded               no model is loaded, or its deployment is broken
├── StorageFull             the coordinator may not keep as many blocks as it needs
├── MakingFailed            files that a backend needs beside blocks could not be made
└── RequestInvalid          the request itself is wrong (param names the field)

The gateway answers them as HTTP errors with ``status`` and ``code``.
"""

from __future__ import annotations


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

    def __init__(self, name: str, cause: str, alone: str | None = None) -> None:
        """``alone``: why the other devices cannot take its place, once that was tried."""
        rest = "" if alone is None else f"; the others cannot take its place: {alone}"
        super().__init__(name, f"device lost ({cause}); check its power, network and agent{rest}")
        self.cause = cause

    def unplaced(self, why: str) -> CoordinatorError:
        return AgentLost(self.name, self.cause, why)


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
        super().__init__(name, f"it {lie}; update shoal there, or leave it out with --exclude")


class Stalled(CoordinatorError):
    """Heartbeats come, tokens do not."""

    status = 504
    code = "stalled"


class Busy(CoordinatorError):
    """One plan, load or unload at a time."""

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


class RequestInvalid(CoordinatorError):
    """The user's request is wrong; ``param`` is the field, where there is one."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code
