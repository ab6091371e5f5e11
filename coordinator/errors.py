"""Errors that the coordinator reports to its users.

    CoordinatorError            one line, with what to do next
    ├── NoAgents                nothing has joined
    ├── AgentFailed             an agent could not carry out a request
    │   ├── AgentLost           the agent is gone
    │   ├── AgentDamaged        a file of its stage is damaged, and the stage stopped
    │   └── AgentLied           its answer broke the protocol
    ├── Moved                   the model moves to a better plan
    ├── LinkFailed              two agents live, and one cannot reach the other
    ├── AnswerWithdrawn         text that was shown came from a damaged stage
    ├── FormatFailed            the answer cannot be kept to the format of its request
    ├── FormatsUnchecked        the coordinator cannot check formats now
    ├── Stalled                 the devices are alive, but no token comes
    │   └── RowsLost            ... because rows were lost between them
    ├── Busy                    another plan, load, unload or measurement is under way
    ├── NotLoaded               no model is loaded, or its deployment is broken
    ├── NotReady                the model is being loaded or resumed
    ├── QueueFull               too many requests wait for a slot
    ├── StorageFull             the coordinator may not keep as many blocks as it needs
    └── MakingFailed            files that a backend needs beside blocks could not be made

A wrong request is planning.errors.RequestInvalid. HTTP answers have the error's ``status`` and
``code``.
"""

from __future__ import annotations

REJOIN = "to take it back, let it join by a new token (`shoal token create`)"
UPDATE = "update shoal there, or leave it out with --exclude"
"""The advice for an agent that sends what no working agent sends."""


class CoordinatorError(Exception):
    """A request was not carried out."""

    status = 500
    code = "internal_error"
    retry_after_s: int | None = None
    """When the same request may succeed, if that is known."""

    def unplaced(self, why: str) -> CoordinatorError:
        """Extend the error with ``why`` the deployment that it broke cannot be placed anew."""
        return NotLoaded(f"{self}; the model cannot be placed anew: {why}")


class NoAgents(CoordinatorError):
    """No agent has joined."""

    status = 503
    code = "no_agents"


class AgentFailed(CoordinatorError):
    """The agent ``name`` could not carry out a request."""

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
        self,
        name: str,
        cause: str,
        alone: str | None = None,
        *,
        advice: str = "",
        broke_protocol: bool = False,
        may_return: bool = False,
    ) -> None:
        """Make the message.

        alone: why the other devices cannot take its place, once that was tried.
        advice: what to do, unless its power, network or agent may be at fault.
        broke_protocol: the agent is alive, but the coordinator dropped it for what it sent.
        may_return: perhaps only its connection ended, and its stage is well.
        """
        rest = "" if alone is None else f"; the others cannot take its place: {alone}"
        usual = UPDATE if broke_protocol else "check its power, network and agent"
        super().__init__(name, f"device lost ({cause}); {advice or usual}{rest}")
        self.cause = cause
        self.advice = advice
        self.broke_protocol = broke_protocol
        self.may_return = may_return

    def unplaced(self, why: str) -> CoordinatorError:
        return AgentLost(
            self.name, self.cause, why, advice=self.advice, broke_protocol=self.broke_protocol
        )


class Moved(CoordinatorError):
    """The model moves to a better plan. Its answers go on there."""

    status = 503
    code = "model_moving"

    def __init__(self, why: str = "the model moves to a better plan") -> None:
        super().__init__(why)


class LinkFailed(CoordinatorError):
    """``source`` cannot reach ``target``, although the coordinator reaches both."""

    status = 503
    code = "link_failed"

    def __init__(self, source: str, target: str, reason: str, alone: str | None = None) -> None:
        """Make the message.

        reason: the failure, with the addresses that were tried.
        alone: why no plan does without the link, once that was tried.
        """
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
    """The agent ``name`` stopped its stage, because a file of the stage is damaged."""

    status = 503
    code = "stage_damaged"

    def unplaced(self, why: str) -> CoordinatorError:
        return AgentFailed(self.name, f"{self.reason}; the model cannot be loaded again yet: {why}")


class AnswerWithdrawn(CoordinatorError):
    """A part of an answer came from a damaged stage, and the right answer is different."""

    status = 503
    code = "answer_withdrawn"

    def __init__(self) -> None:
        super().__init__(
            "the answer so far came from a device with a damaged file and is wrong: ask again"
        )


class FormatFailed(CoordinatorError):
    """An answer cannot be kept to the format that its request wants. No device is at fault."""

    status = 400
    code = "format_failed"


class FormatsUnchecked(CoordinatorError):
    """The coordinator cannot check formats now. No request is at fault."""

    status = 503
    code = "formats_unchecked"


class AgentLied(AgentFailed):
    """The agent ``name`` sent what no working agent sends. Its answer cannot be trusted."""

    code = "device_misbehaved"

    def __init__(self, name: str, lie: str) -> None:
        super().__init__(name, f"it {lie}; {UPDATE}")


class Stalled(CoordinatorError):
    """The devices send heartbeats but no tokens."""

    status = 504
    code = "stalled"


class RowsLost(Stalled):
    """Rows of an answer were lost between two devices that are both well."""

    def __init__(self) -> None:
        super().__init__(
            "no token comes although all devices are well: rows were lost between them, see the "
            "agents' logs"
        )


class Busy(CoordinatorError):
    """Another plan, load, unload or measurement is under way."""

    status = 409
    code = "busy"


class NotLoaded(CoordinatorError):
    """No model is loaded, or its deployment is broken."""

    status = 503
    code = "model_not_loaded"


class NotReady(CoordinatorError):
    """The model is being loaded or resumed, and will answer soon."""

    status = 503
    code = "model_loading"

    def __init__(self, what: str, retry_after_s: int) -> None:
        super().__init__(f"{what}: ask again in {retry_after_s} s, or stream the answer to wait")
        self.retry_after_s = retry_after_s


class QueueFull(CoordinatorError):
    """As many requests wait for a slot as may."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{waiting} requests wait for a slot already: ask again in {retry_after_s} s, or load "
            "the model with more --slots"
        )
        self.retry_after_s = retry_after_s


class TextsWait(CoordinatorError):
    """As many texts wait for a pass as may."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{waiting} texts wait already: ask again in {retry_after_s} s, or send fewer at once"
        )
        self.retry_after_s = retry_after_s


class StorageFull(CoordinatorError):
    """The blocks of one operation exceed the coordinator's storage limit."""

    status = 507
    code = "storage_full"


class MakingFailed(CoordinatorError):
    """Files that a backend needs beside blocks could not be made."""

    code = "making_failed"
