"""Every message that crosses a socket: one dataclass each, one code each, one table.

Three kinds of connection exist, told apart by their first message:

    AgentHello      agent -> coordinator   control: profile, commands, results, heartbeats
    BlocksHello     agent -> coordinator   files: FetchBlock / BlockChunk, MakeFiles / FilesMade
    PeerHello       agent -> agent         data plane: activations, tokens, link probes

Names say who says what. Requests carry ``request``, answers repeat it. Data-plane messages carry
the epoch of their deployment, a random number that no other deployment has; a stage drops what
belongs to another.

All are frozen but the two that every token needs, Activation and TokenSampled: a frozen dataclass
takes ten times as long to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from wire import limits
from wire.activations import DEFAULT_HOP_BITS, HopBits
from wire.conditions import Conditions
from wire.profile import BlockTiming, DeviceProfile

PROTOCOL_VERSION = 3

FinishReason = Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address where an agent accepts peers."""

    host: str
    port: int


# ---- every connection, where there is a token: wire.auth ----------------------------------------


@dataclass(frozen=True, slots=True)
class AuthChallenge:
    """The one that connects, before anything else."""

    version: int
    nonce: bytes
    shoal: str = ""
    """The sender's shoal version, for a peer that cannot read what follows."""


@dataclass(frozen=True, slots=True)
class AuthAnswer:
    nonce: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class AuthProof:
    proof: bytes


# ---- control: joining and liveness -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentHello:
    """Agent to coordinator, first message: who I am, what I can do, where peers reach me."""

    device: str
    """Identity that outlives restarts."""
    name: str
    version: str
    endpoints: tuple[Endpoint, ...]
    """Where it listens, as it knows by itself."""
    profile: DeviceProfile
    cluster: str = ""
    """The only one to join; empty: any."""
    run: str = ""
    """Random, of this process of the agent: one that comes back is told from a copy."""
    attempt: int = 0
    """Grows with each connection of a run."""
    port: int = 0
    """Where it listens on every address of its machine; 0: only at ``endpoints``."""
    advertised: tuple[Endpoint, ...] = ()
    """Where its user says that peers reach it: to be tried first."""


@dataclass(frozen=True, slots=True)
class CoordinatorWelcome:
    """Coordinator's answer. ``name`` is the agent's name made unique in the cluster."""

    cluster: str
    name: str


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """Coordinator's answer to an agent that may not join; the agent shows it and retries.

    Also what either end of any connection says to one that has not proved to know the token, or
    that speaks another protocol: all versions from 3 on understand it.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Either side, each HEARTBEAT_S."""

    memory_available_bytes: int = 0


# ---- control: requests and their answers -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeasureModel:
    """Measure seconds per block of this model's shapes at each of ``bits``.

    What the agent has measured before is not measured again. ``together``: also passes of several
    rows, each of another sequence.
    """

    request: int
    spec: dict[str, Any]
    bits: tuple[int, ...]
    together: bool = False


@dataclass(frozen=True, slots=True)
class MeasureModelAgain:
    """As MeasureModel, but what the agent has measured before is measured again."""

    request: int
    spec: dict[str, Any]
    bits: tuple[int, ...]
    together: bool = False


@dataclass(frozen=True, slots=True)
class ModelMeasured:
    """``call_s`` is the profile's, or measured now by an agent that could not before it joined."""

    request: int
    timings: tuple[BlockTiming, ...]
    call_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MeasureDevice:
    """Measure again what the profile says of the device itself. No stage may be loaded."""

    request: int


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """The profile with its new figures; limits are as they were."""

    request: int
    profile: DeviceProfile


@dataclass(frozen=True, slots=True)
class FiguresChanged:
    """Agent to coordinator, unasked: better figures than it has told before.

    ``timings`` are of the model ``spec``, where it is not empty.
    """

    profile: DeviceProfile
    spec: dict[str, Any]
    timings: tuple[BlockTiming, ...]


@dataclass(frozen=True, slots=True)
class MeasureLink:
    """Measure the link to a peer that is reachable at one of ``endpoints``."""

    request: int
    device: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """Round trips of a small frame (median, 90th percentile), and the rate of large ones."""

    request: int
    rtt_s: float
    bytes_per_s: float
    rtt_p90_s: float = 0.0
    conditions: Conditions | None = None


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """Agent to coordinator, unasked: the link to ``device`` is not what it was measured as."""

    device: str
    rtt_s: float
    bytes_per_s: float
    rtt_p90_s: float


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block to load: its index in the model and the artifact that holds it."""

    block: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Fetch these contiguous blocks and load them: this device's stage of deployment ``epoch``."""

    request: int
    epoch: int
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    slots: int
    context_tokens: int
    previous: str
    """Device that sends here: the stage before, or the last one for the first."""
    hop_key: bytes
    """What that device must show in its PeerHello: random, and told to no other."""
    hop_bits: HopBits = DEFAULT_HOP_BITS
    """Of the rows that this stage sends on."""


@dataclass(frozen=True, slots=True)
class StageLoaded:
    request: int
    memory_bytes: int
    fetched_bytes: int
    load_s: float
    damaged_files: int
    """Files of the stage that were damaged on the device, and were fetched or made again."""


@dataclass(frozen=True, slots=True)
class ConnectStage:
    """Connect to the next device of the ring (the first stage's, for the last).

    ``hop_key`` is what that device expects.
    """

    request: int
    epoch: int
    device: str
    endpoints: tuple[Endpoint, ...]
    hop_key: bytes


@dataclass(frozen=True, slots=True)
class UnloadStage:
    request: int


@dataclass(frozen=True, slots=True)
class FindBlocks:
    """Which of these artifacts are in the block cache?"""

    request: int
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlocksFound:
    request: int
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasureQuality:
    """Measure what fewer bits do to a model's predictions over ``sequences`` of token ids.

    ``blocks`` are all of the model's, as its checkpoint has them. Each block at each width of
    ``wanted`` is measured alone, so is each boundary of ``hops``, and each of ``plans`` (bits of
    every block) as a whole; results come as QualityMeasured and HopMeasured as soon as they are
    there, Done ends the request.
    """

    request: int
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    sequences: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[int, tuple[int, ...]], ...]
    """(block, widths) pairs."""
    plans: tuple[tuple[int, ...], ...]
    scheme: Literal["rtn", "truncate", "float"]
    group_size: int
    hops: tuple[tuple[int, tuple[HopBits, ...]], ...] = ()
    """(boundary, widths) pairs; boundary b lies behind block b."""
    backend: str = ""
    """What computes the layers, for the sake of its arithmetic; empty: the agent's own."""


@dataclass(frozen=True, slots=True)
class QualityMeasured:
    """One result: mean KL divergence in nats of ``block`` alone at ``bits``, or of a plan.

    A plan's result has no block, and the bits of all blocks. ``weight_error`` is max|w - w_b|, of a
    plan 0.
    """

    request: int
    block: int | None
    bits: tuple[int, ...]
    kl: float
    weight_error: float


@dataclass(frozen=True, slots=True)
class HopMeasured:
    """One result: mean KL divergence in nats of sending the rows behind a block at ``bits``."""

    request: int
    boundary: int
    bits: HopBits
    kl: float


@dataclass(frozen=True, slots=True)
class MakeFiles:
    """Make what ``backend`` needs beside these blocks, on a machine that has what makes it.

    An agent asks the coordinator (on a connection of files, ``request`` 0), and serves the blocks
    that the coordinator does not have; heartbeats come until the answer does. The coordinator asks
    an agent that can, which fetches the blocks as for a stage.
    """

    request: int
    backend: str
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class FilesMade:
    """The files in their order, which ``BlockRef.block`` counts; none: nobody here can make them.

    From the agent that made them first on a connection of files, where the coordinator fetches
    what it lacks and then says Done, and then as the answer.
    """

    request: int
    files: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Nobody waits for this request any more; its answer, if one comes, is dropped."""

    request: int


@dataclass(frozen=True, slots=True)
class Done:
    """A request without a result of its own has been carried out."""

    request: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is; ``unit`` is "bytes" or "steps"."""

    request: int
    phase: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request was not carried out; ``reason`` is one line for the user."""

    request: int
    reason: str


# ---- control: generation -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage turns logits into tokens, and when it stops. Temperature 0 is greedy."""

    max_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StartSequence:
    """Coordinator to every stage: this sequence holds the slot from now on.

    A stage takes rows of no other sequence. Only the first stage gets the prompt, and runs it.
    """

    epoch: int
    sequence: int
    slot: int
    prompt: tuple[int, ...]
    sampling: Sampling
    chunk_tokens: int = limits.PREFILL_CHUNK_TOKENS
    """Rows of the prompt that go through the stages at once, at most that many."""


@dataclass(frozen=True, slots=True)
class ReleaseSequence:
    """Coordinator to every stage: the sequence is over or cancelled; ignore what still arrives."""

    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """A stage cannot go on with a sequence."""

    epoch: int
    sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A stage lost its connection to the next device of the ring; repeated at each sequence."""

    epoch: int
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageDamaged:
    """A stage stopped because a file that it runs from is damaged; its tokens may be wrong.

    The file is removed, so that the next load fetches or makes it again.
    """

    epoch: int
    reason: str


# ---- data plane --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerHello:
    """Agent to agent, first message. ``expected`` must be the acceptor's own device id.

    ``hop_key``: the one of LoadStage, from the previous device of the ring. Without it, nothing but
    link probes may follow.
    """

    device: str
    expected: str
    hop_key: bytes = b""


@dataclass(frozen=True, slots=True)
class PeerWelcome:
    device: str


@dataclass(slots=True)
class Activation:
    """Hidden rows [position, position + rows) of a sequence, to the next stage.

    Payload: wire.activations, at ``bits`` a value. ``last`` is false for prompt chunks that more
    chunks follow: the head need not run for them.
    """

    epoch: int
    sequence: int
    slot: int
    position: int
    rows: int
    bits: HopBits
    last: bool


@dataclass(slots=True)
class TokenSampled:
    """Last stage to first stage and to coordinator: token number ``index`` of the answer.

    A token that is a stop token is reported with finish "stop", and is not part of the answer.
    """

    epoch: int
    sequence: int
    index: int
    token: int
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class ProbePing:
    """Link probe; the peer answers ProbePong at once. The payload is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class ProbePong:
    number: int


# ---- block download ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlocksHello:
    device: str


@dataclass(frozen=True, slots=True)
class FetchBlock:
    """Send the artifact with this hash, from ``offset`` on."""

    sha256: str
    offset: int


@dataclass(frozen=True, slots=True)
class BlockDamaged:
    """The artifact with this hash arrived with other contents, or not whole.

    The coordinator checks its own file and makes a damaged one again. It sends heartbeats
    meanwhile, then Done, or RequestFailed where it cannot make the file (with 0 as ``request``).
    """

    sha256: str


@dataclass(frozen=True, slots=True)
class BlockChunk:
    """Payload: bytes of the artifact at ``offset``. ``total`` is the artifact's size."""

    offset: int
    total: int


Message: TypeAlias = (
    AuthChallenge
    | AuthAnswer
    | AuthProof
    | AgentHello
    | CoordinatorWelcome
    | JoinRefused
    | Heartbeat
    | MeasureModel
    | MeasureModelAgain
    | ModelMeasured
    | MeasureDevice
    | DeviceMeasured
    | FiguresChanged
    | MeasureLink
    | LinkMeasured
    | LinkChanged
    | LoadStage
    | StageLoaded
    | ConnectStage
    | UnloadStage
    | FindBlocks
    | BlocksFound
    | MeasureQuality
    | QualityMeasured
    | HopMeasured
    | MakeFiles
    | FilesMade
    | CancelRequest
    | Done
    | Progress
    | RequestFailed
    | StartSequence
    | ReleaseSequence
    | SequenceFailed
    | PeerLost
    | StageDamaged
    | PeerHello
    | PeerWelcome
    | Activation
    | TokenSampled
    | ProbePing
    | ProbePong
    | BlocksHello
    | FetchBlock
    | BlockDamaged
    | BlockChunk
)

CODES: dict[int, type[Message]] = {
    1: AgentHello,
    2: CoordinatorWelcome,
    3: JoinRefused,
    4: Heartbeat,
    10: MeasureModel,
    11: ModelMeasured,
    12: MeasureLink,
    13: LinkMeasured,
    14: LoadStage,
    15: StageLoaded,
    16: ConnectStage,
    17: UnloadStage,
    18: Done,
    19: Progress,
    20: RequestFailed,
    21: CancelRequest,
    22: FindBlocks,
    23: BlocksFound,
    24: MeasureQuality,
    25: QualityMeasured,
    26: AuthChallenge,
    27: AuthAnswer,
    28: AuthProof,
    29: LinkChanged,
    30: StartSequence,
    31: ReleaseSequence,
    32: SequenceFailed,
    33: PeerLost,
    34: HopMeasured,
    40: PeerHello,
    41: PeerWelcome,
    42: Activation,
    43: TokenSampled,
    44: ProbePing,
    45: ProbePong,
    50: BlocksHello,
    51: FetchBlock,
    52: BlockChunk,
    53: MakeFiles,
    54: FilesMade,
    60: StageDamaged,
    61: BlockDamaged,
    85: MeasureDevice,
    86: DeviceMeasured,
    87: FiguresChanged,
    88: MeasureModelAgain,
}
"""Message codes on the wire. Never reuse a number."""

WITH_PAYLOAD: frozenset[type[Message]] = frozenset({Activation, ProbePing, BlockChunk})
"""Messages that may carry raw bytes behind the header."""
