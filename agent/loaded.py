"""The relay of a loaded stage: of a model that generates, or of one that encodes."""

from __future__ import annotations

from collections.abc import Callable

from agent.drafter import Drafter
from agent.encoding import EncoderRelay
from agent.relay import Relay
from agent.turnstile import Turnstile
from backends.base import Stage
from model.grammar_process import GrammarProcess
from model.spec import ModelSpec
from wire.connection import Connection
from wire.messages import EncodeTexts, LoadStage, Message, PassFailed

AnyRelay = Relay | EncoderRelay


def relay_of(
    request: LoadStage,
    stage: Stage,
    spec: ModelSpec,
    report: Callable[[Message], None],
    grammars: GrammarProcess | None,
    turnstile: Turnstile,
    drafter: Drafter | None,
) -> AnyRelay:
    """Return the relay of the stage of this request. ``turnstile``, ``drafter`` as of Relay."""
    blocks = range(request.blocks[0].block, request.blocks[-1].block + 1)
    if spec.encodes:
        return EncoderRelay(
            stage,
            spec,
            blocks,
            epoch=request.epoch,
            context_tokens=request.context_tokens,
            hop_bits=request.hop_bits,
            report=report,
            turnstile=turnstile,
            weight=request.weight,
        )
    return Relay(
        stage,
        spec,
        blocks,
        epoch=request.epoch,
        slots=request.slots,
        context_tokens=request.context_tokens,
        hop_bits=request.hop_bits,
        report=report,
        grammars=grammars,
        turnstile=turnstile,
        weight=request.weight,
        drafter=drafter,
        rows_at_once=request.rows_at_once,
    )


def encode(message: EncodeTexts, relay: AnyRelay | None, connection: Connection) -> None:
    """Queue a pass of texts, or tell the coordinator why it cannot run here."""
    if isinstance(relay, EncoderRelay):
        relay.encode(message)
        return
    reason = "the stage is not loaded" if relay is None else "this model generates text"
    connection.send(PassFailed(message.epoch, message.number, reason))
