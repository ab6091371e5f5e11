"""Every message that crosses a socket: one dataclass each, one code each, one table.

There are three kinds of connection, told apart by their first message:

    AgentHello      agent -> coordinator   control: profile, commands, results, heartbeats
    BlocksHello     agent -> coordinator   files: FetchBlock / BlockChunk, MakeFiles / FilesMade
    PeerHello       agent -> agent         data plane: activations, tokens, link probes, team sums

Requests carry ``request``, and answers repeat it. Data-plane messages carry the epoch of their
deployment, a random number that no other deployment has. A stage drops messages of another epoch.

Activation and TokenSampled are not frozen, because each token needs one of each. A frozen dataclass
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


# ---- every encrypted connection: wire.introduction ----------------------------------------------


@dataclass(frozen=True, slots=True)
class AuthChallenge:
    """Caller to answerer, before anything else."""

    version: int
    nonce: bytes
    shoal: str = ""
    """The sender's shoal version, for a peer that cannot read later messages."""


@dataclass(frozen=True, slots=True)
class AuthAnswer:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Introduction:
    """Caller to answerer, inside TLS: who calls whom and why. See wire.introduction."""

    purpose: str
    device: str
    expected: str
    certificate: bytes
    signature: bytes
    invite: str = ""
    """The id of the invite by which a new machine joins."""
    invite_proof: bytes = b""


# ---- control: joining and liveness -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptStage:
    """A stage that an agent kept when it lost its last coordinator.

    newest_sequence: the newest sequence that was started on it. 0: none, or another member leads.
    """

    epoch: int
    newest_sequence: int = 0


@dataclass(frozen=True, slots=True)
class AgentHello:
    """Agent to coordinator, first message: identity, abilities and addresses for peers."""

    device: str
    """An identity that outlives restarts."""
    name: str
    version: str
    endpoints: tuple[Endpoint, ...]
    """The addresses at which it listens, as far as it knows."""
    profile: DeviceProfile
    cluster: str = ""
    """The only cluster to join. Empty means any."""
    run: str = ""
    """Random, of this process. It tells a returning agent from a copy of its disk."""
    attempt: int = 0
    """A counter that grows with each connection of a run."""
    port: int = 0
    """The port at which it listens on every address of its machine. 0 means only ``endpoints``."""
    advertised: tuple[Endpoint, ...] = ()
    """The addresses that its user configured for peers. They are tried first."""
    kept: tuple[KeptStage, ...] = ()


@dataclass(frozen=True, slots=True)
class CoordinatorWelcome:
    """Coordinator's answer. ``name`` is the agent's name made unique in the cluster.

    keeps: the epochs of stages that the agent goes on with. It unloads its other stages.
    """

    cluster: str
    name: str
    keeps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """Coordinator's answer to an agent that may not join. The agent shows it and retries.

    Either end of any connection also sends it to a peer that may not come in, or that has another
    protocol. All versions from 3 on understand it.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device that may join, and the SHA-256 of its certificate."""

    device: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class DevicesKnown:
    """Coordinator to agent, in a shoal with TLS: all devices whose connections it may take."""

    devices: tuple[KnownDevice, ...]


@dataclass(frozen=True, slots=True)
class StageCounts:
    """Counts of what a stage has done since it was loaded. Only the lead of a team sends them.

    passes, rows: forward passes, and their rows.
    compute_us: microseconds in which a pass ran.
    waited_us: microseconds that rows waited here for their pass, summed over passes.
    frames, sent_bytes: rows and tokens sent to the next device.
    sending_us: microseconds in which the socket took them.
    round_trip_us: the newest measured round trip to the next device. 0: none was measured.
    held_rows, most_rows: rows in the KV cache that sequences hold now, and those that fit.
    running_us, running_rows: how long the pass of this moment has computed, and its rows. 0: none.
    busy: whether rows run, wait or are sent at this moment, or are not acknowledged yet.
    """

    passes: int
    rows: int
    compute_us: int
    waited_us: int
    frames: int
    sent_bytes: int
    sending_us: int
    round_trip_us: int
    held_rows: int
    most_rows: int
    running_us: int = 0
    running_rows: int = 0
    busy: bool = False


@dataclass(frozen=True, slots=True)
class StageBeat:
    """The state of one of an agent's stages, each HEARTBEAT_S.

    token_s: the mean seconds of its last passes of one row, without waits for other members of its
        team. 0: there were too few passes.
    counts: None if another member of its team leads.
    """

    epoch: int
    token_s: float = 0.0
    counts: StageCounts | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Either side, each HEARTBEAT_S.

    load: the share of the machine's processor that is used, by all programs.
    celsius: the temperature of its hottest part, or None if it is not known.
    stages: the loaded stages of an agent, oldest first.
    """

    memory_available_bytes: int = 0
    load: float = 0.0
    celsius: float | None = None
    stages: tuple[StageBeat, ...] = ()


# ---- control: requests and their answers -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeasureModel:
    """Measure seconds per block of this model's shapes at each of ``bits``.

    The agent reports earlier measurements without repeating them.
    together: passes of several rows are timed too, each row of another sequence.
    shares: shares of blocks are timed too, as far as a limited time allows.
    """

    request: int
    spec: dict[str, Any]
    bits: tuple[int, ...]
    together: bool = False
    shares: bool = False


@dataclass(frozen=True, slots=True)
class MeasureModelAgain:
    """Do the same as MeasureModel, but repeat earlier measurements."""

    request: int
    spec: dict[str, Any]
    bits: tuple[int, ...]
    together: bool = False
    shares: bool = False


@dataclass(frozen=True, slots=True)
class ModelMeasured:
    """The measured times. ``call_s`` is the profile's, or a new one if that had none."""

    request: int
    timings: tuple[BlockTiming, ...]
    call_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MeasureDevice:
    """Measure the device's own figures in its profile again. No stage may be loaded."""

    request: int


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """The profile with its new figures. The limits are unchanged."""

    request: int
    profile: DeviceProfile


@dataclass(frozen=True, slots=True)
class FiguresChanged:
    """Agent to coordinator, unasked: better figures than before.

    ``timings`` are of the model ``spec``, if it is not empty.
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
    """Agent to coordinator, unasked: the link to ``device`` has changed since it was measured."""

    device: str
    rtt_s: float
    bytes_per_s: float
    rtt_p90_s: float


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the shoal, which is known by its content: SHA-256 and size."""

    sha256: str
    size_bytes: int

    def __str__(self) -> str:
        return f"file {self.sha256[:12]}"


@dataclass(frozen=True, slots=True)
class BlockRef(FileRef):
    """The artifact of a block, which is numbered by its place in the model."""

    block: int
    experts: bytes = b""
    """The hashes of its experts in their order (model.expert_parts). Empty without experts."""

    def __str__(self) -> str:
        return f"block {self.block}"


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A small model with the same vocabulary, whole. It guesses tokens for the ring.

    memory_bytes: what the plan charges for it.
    """

    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    context_tokens: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Fetch these contiguous blocks, and load them as the stage of deployment ``epoch``.

    keeps: the epochs of stages that stay beside it. All others are unloaded first.
    """

    request: int
    epoch: int
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    slots: int
    context_tokens: int
    previous: str
    """The device that sends to this stage: the stage before, or the last one for the first."""
    hop_key: bytes
    """A random key that the previous device shows in its PeerHello. Only it gets the key."""
    hop_bits: HopBits = DEFAULT_HOP_BITS
    """The width of the rows that this stage sends on."""
    team: tuple[str, ...] = ()
    """Device ids of the team that shares this stage; the first leads. Empty: it is alone."""
    share: tuple[int, ...] = ()
    """This member's share, as model.share.Share.to_tuple gives it. ``spec`` is the whole model's.

    ``blocks`` are its slices. The embedding, if there is one, is whole and with the lead alone.
    """
    team_key: bytes = b""
    """A random key that members show each other in their PeerHello."""
    sum_bits: HopBits = DEFAULT_HOP_BITS
    """The width of the partial rows that members exchange."""
    vocabulary: FileRef | None = None
    """The bytes of each token (model.token_bytes), for a stage that samples. None: not known."""
    keeps: tuple[int, ...] = ()
    weight: float = 1.0
    """Its part of the device's time, against the weights of other stages there."""
    draft: DraftModel | None = None
    """For the first stage: a small model that guesses tokens on its device."""
    rows_at_once: tuple[int, ...] = ()
    """For the first stage: the most rows of a pass while 1, 2, ... sequences run. Empty: no limit.

    The last number is for more sequences, too.
    """


@dataclass(frozen=True, slots=True)
class StageLoaded:
    request: int
    memory_bytes: int
    fetched_bytes: int
    load_s: float
    damaged_files: int
    """The number of files that were damaged on the device, and were fetched or made again."""
    grammars: str = ""
    """The version of llguidance, where the stage can keep answers to a grammar."""
    from_peers_bytes: int = 0
    """The share of ``fetched_bytes`` that other devices sent."""
    draft_memory_bytes: int = 0
    """The share of ``memory_bytes`` that the draft model takes."""


@dataclass(frozen=True, slots=True)
class ConnectStage:
    """Connect to the next device of the ring. The last stage's next is the first.

    ``hop_key`` is the key that the next device expects.
    """

    request: int
    epoch: int
    device: str
    endpoints: tuple[Endpoint, ...]
    hop_key: bytes


@dataclass(frozen=True, slots=True)
class ConnectTeam:
    """Connect to another member of the team. Each member connects to all members after it."""

    request: int
    epoch: int
    device: str
    endpoints: tuple[Endpoint, ...]
    team_key: bytes


@dataclass(frozen=True, slots=True)
class TeamPass:
    """Lead to member: run this pass. The payload is hidden rows [rows, hidden] at ``bits`` a value.

    ``slots`` and ``positions`` have one entry for rows of one sequence, or one per row.
    ``candidates``: a member with the head answers with so many highest logits of each last row.
    0: none. -1: all.
    ``logits``: the number of last rows, for rows of one sequence.
    """

    epoch: int
    number: int
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    rows: int
    bits: HopBits
    candidates: int
    logits: int = 1


@dataclass(slots=True)
class TeamPart:
    """Member to member: partial rows of cut ``cut`` of a pass. The payload is [rows, hidden]."""

    epoch: int
    number: int
    cut: int
    first_row: int
    rows: int
    bits: HopBits


@dataclass(frozen=True, slots=True)
class TeamLogits:
    """Member to lead: its highest logits of a pass.

    The payload is float32 [rows, candidates], then token ids int32 of that shape unless all of the
    member's vocabulary is sent. Ids count from the start of the model's vocabulary, and
    ``first_token`` is the id of the first token of the member's vocabulary.
    """

    epoch: int
    number: int
    rows: int
    candidates: int
    first_token: int


@dataclass(frozen=True, slots=True)
class TeamFailed:
    """Member to member: the sender has left pass ``number``, and sends nothing more of it.

    ``device`` failed to run the pass. With ``lost``, the sender or another member has lost the
    connection to it, and the team has ended. Each member that leaves a pass tells all others.
    """

    epoch: int
    number: int
    device: str
    reason: str
    lost: bool


@dataclass(frozen=True, slots=True)
class TeamTrial:
    """Lead to member, as a pass: sum rows of ones this often, without running the stage."""

    epoch: int
    number: int
    rows: int
    sums: int


@dataclass(frozen=True, slots=True)
class MeasureTeam:
    """Coordinator to lead: measure the sum over the connections of the team of ``epoch``."""

    request: int
    epoch: int


@dataclass(frozen=True, slots=True)
class TeamMeasured:
    """Median seconds of one sum of one row, and of ``chunk_rows`` rows."""

    request: int
    row_s: float
    chunk_rows: int
    chunk_s: float


@dataclass(frozen=True, slots=True)
class UnloadStage:
    """Unload the stage of deployment ``epoch``, or all stages if it is 0."""

    request: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Fetch files into the block cache for a later LoadStage. Files of loaded stages stay."""

    request: int
    blocks: tuple[BlockRef, ...]
    vocabulary: FileRef | None = None


@dataclass(frozen=True, slots=True)
class BlocksFetched:
    """``fetched_bytes`` came over the network. The other files were there."""

    request: int
    fetched_bytes: int
    from_peers_bytes: int = 0
    """The share of them that other devices sent."""


@dataclass(frozen=True, slots=True)
class FindBlocks:
    """Say which of these artifacts are in the block cache."""

    request: int
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlocksFound:
    request: int
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasureQuality:
    """Measure how fewer bits change a model's predictions over ``sequences`` of token ids.

    ``blocks`` are all blocks of the model, as in its checkpoint. The agent measures each block at
    each width of ``wanted`` alone, each boundary of ``hops`` alone, and each plan as a whole. It
    sends a QualityMeasured or HopMeasured for each as soon as it has it, and then Done.
    """

    request: int
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    sequences: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[int, tuple[int, ...]], ...]
    """Pairs of a block and its widths."""
    plans: tuple[tuple[int, ...], ...]
    scheme: Literal["rtn", "truncate", "float"]
    group_size: int
    hops: tuple[tuple[int, tuple[HopBits, ...]], ...] = ()
    """Pairs of a boundary and its widths. Boundary b lies behind block b."""
    backend: str = ""
    """The backend whose arithmetic the layers are computed with. Empty means the agent's own."""
    prepared: tuple[tuple[int, BlockRef], ...] = ()
    """Pairs of bits and a block whose codes a quantizer chose. The agent rounds the others."""


@dataclass(frozen=True, slots=True)
class QualityMeasured:
    """One result: mean KL divergence in nats of ``block`` alone at ``bits``, or of a plan.

    A plan's result has no block, the bits of all blocks, and 0 as ``weight_error``. The weight
    error of a block is max|w - w_b|.
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
    """Make the files that ``backend`` needs beside these blocks, on a machine with its compiler.

    An agent asks the coordinator on a file connection, with ``request`` 0, and serves the blocks
    that the coordinator lacks. Heartbeats come until the answer does. The coordinator asks an agent
    that has the compiler. That agent fetches the blocks as for a stage.
    """

    request: int
    backend: str
    spec: dict[str, Any]
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class FilesMade:
    """The files, in the backend's order. Empty if nobody here can make them.

    The agent that made them sends this twice. The first time is on a file connection, where the
    coordinator fetches the files it lacks and then says Done. The second time is the answer.
    """

    request: int
    files: tuple[FileRef, ...]


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Nobody waits for this request any more. Its answer, if one comes, is dropped."""

    request: int


@dataclass(frozen=True, slots=True)
class Done:
    """A request without a result has been carried out."""

    request: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a request. ``unit`` is "bytes" or "steps"."""

    request: int
    phase: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request was not carried out. ``reason`` is one line for the user."""

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
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there before, or multiplies them if below 0."""
    penalized: tuple[int, ...] = ()
    """The different tokens of the prompt. Only the last stage is told, if they are penalized."""
    min_p: float = 0.0
    """Tokens are dropped whose probability is below this share of the highest."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens for each time that they are in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit. Each token at most once."""
    top_logprobs: int = -1
    """How many of the likeliest tokens TokenSampled tells beside its own. -1: not even that."""
    prompt_logprobs: bool = False
    """Whether each token of the prompt is told by PromptScored."""
    grammar: bytes = b""
    """The language of the answer in UTF-8, as llguidance reads it. Empty: any text."""
    answer: tuple[int, ...] = ()
    """The end of the prompt that is the answer so far, after a pause.

    Only the last stage is told, if penalties or the grammar need it.
    """


@dataclass(frozen=True, slots=True)
class StartSequence:
    """Coordinator to every stage: this sequence holds the slot from now on.

    A stage takes rows only of started sequences. The first stage gets the prompt, and runs it. The
    last one gets it too if it tells the prompt's log-probabilities.

    cached: the leading rows that the slot keeps from an earlier sequence with the same tokens. They
        do not run again.
    drafts: the most tokens that the first stage may guess ahead of the answer. 0: none.
    """

    epoch: int
    sequence: int
    slot: int
    prompt: tuple[int, ...]
    sampling: Sampling
    chunk_tokens: int = limits.PREFILL_CHUNK_TOKENS
    """The largest number of prompt rows that go through the stages at once."""
    cached: int = 0
    drafts: int = 0
    draft_model: bool = True
    """Whether a draft model may guess, too, where one is loaded."""


@dataclass(frozen=True, slots=True)
class ReleaseSequence:
    """Coordinator to every stage: the sequence is over or cancelled. Ignore later rows."""

    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """Stage to coordinator: a sequence cannot continue.

    prefix_lost: the slot does not keep the ``cached`` rows. A start without them may work.
    format_failed: the answer cannot be kept to its grammar, on any device.
    """

    epoch: int
    sequence: int
    reason: str
    prefix_lost: bool = False
    format_failed: bool = False


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Stage to coordinator: the next device, or a member of the team, is lost.

    Repeated at each sequence.
    """

    epoch: int
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageDamaged:
    """Stage to coordinator: a damaged file stopped this stage, and its tokens may be wrong.

    The file is removed, so that the next load fetches or makes it again.
    """

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class TakeTrace:
    """Send the remembered passes of these sequences of deployment ``epoch``."""

    request: int
    epoch: int
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TracedPass:
    """One pass of a sequence through a stage. Times are microseconds of the device's own clock.

    arrived_us: its rows were there. started_us, computed_us: the pass began and ended.
    sent_us: its result was handed to the network, or the token to the sequence.
    together: the sequences that ran in this pass.
    """

    sequence: int
    position: int
    rows: int
    together: int
    arrived_us: int
    started_us: int
    computed_us: int
    sent_us: int


@dataclass(frozen=True, slots=True)
class TraceTaken:
    """The passes, oldest first, and the device's clock now. Older passes may be forgotten."""

    request: int
    now_us: int
    passes: tuple[TracedPass, ...]


# ---- data plane --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerHello:
    """Agent to agent, first message. ``expected`` must be the acceptor's own device id.

    The previous device of the ring shows ``hop_key`` from LoadStage, and a member of the same team
    ``team_key``. Without a key only link probes may follow.
    """

    device: str
    expected: str
    hop_key: bytes = b""
    team_key: bytes = b""


@dataclass(frozen=True, slots=True)
class PeerWelcome:
    device: str


@dataclass(slots=True)
class Activation:
    """Hidden rows [position, position + rows) of a sequence, to the next stage.

    The payload is that of wire.activations, at ``bits`` a value. ``last`` is false if more chunks
    of the prompt follow, so that the head need not run.

    drafts: the tokens of all rows but the first, if they are guesses of the first stage. Later rows
        may replace these rows.
    """

    epoch: int
    sequence: int
    slot: int
    position: int
    rows: int
    bits: HopBits
    last: bool
    drafts: tuple[int, ...] = ()
    by_model: bool = False
    """Whether a draft model made the guesses."""
    following: int = 0
    """The rows of other sequences that come from the same pass after this one."""


@dataclass(slots=True)
class TokenSampled:
    """Last stage to first stage and to coordinator: token number ``index`` of the answer.

    A stop token has finish "stop", and is not part of the answer.

    after_us: microseconds since the last stage sampled the previous token. 0 for the first one.
        Tokens of one pass share its time.
    logprobs: wire.logprobs of the token and the likeliest ones, if asked for. Only for the
        coordinator.
    drafted, accepted: the number of drafts in the pass that ended with this token, and of those
        that were right. 0 for the other tokens of the pass. Only its last token goes to the first
        stage.
    """

    epoch: int
    sequence: int
    index: int
    token: int
    finish: FinishReason
    after_us: int = 0
    logprobs: bytes = b""
    drafted: int = 0
    accepted: int = 0
    by_model: bool = False
    """Whether a draft model made the guesses that were counted."""
    following: int = 0
    """The tokens of other sequences that come from the same pass after this one, at most."""


@dataclass(slots=True)
class PromptScored:
    """Last stage to coordinator: wire.logprobs of the prompt's token at ``position``, from 1 on."""

    epoch: int
    sequence: int
    position: int
    logprobs: bytes


# ---- whole texts through an encoder -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodeTexts:
    """Coordinator to the first stage: run these whole texts through all stages in one pass.

    number: of the pass. Passes of an epoch have different numbers.
    tokens: of all texts, one behind the other.
    lengths: the tokens of each text.
    seconds: where the second part of each text begins: its length if it has none.
    """

    epoch: int
    number: int
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    seconds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextRows:
    """Hidden rows of a pass, stage to stage. The payload is that of Activation."""

    epoch: int
    number: int
    bits: HopBits
    lengths: tuple[int, ...]
    seconds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextsEncoded:
    """Last stage to coordinator: some rows of a pass's result, from row ``first`` on.

    The result is one row for each text, or for each token. All rows are told, in order.
    values: float32 little-endian [rows, width].
    """

    epoch: int
    number: int
    first: int
    values: bytes


@dataclass(frozen=True, slots=True)
class PassFailed:
    """Any stage to coordinator: a pass of texts has ended without a result."""

    epoch: int
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProbePing:
    """Link probe. The peer answers ProbePong at once. The payload is ignored."""

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
    """Send bytes of the artifact with this hash: [offset, end). 0 is the end of the file."""

    sha256: str
    offset: int
    end: int = 0


@dataclass(frozen=True, slots=True)
class FindHolders:
    """Say which other devices have these files. An agent asks this on its connection of files."""

    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """A device that has some of the files, and where it may be reached."""

    device: str
    endpoints: tuple[Endpoint, ...]
    sha256s: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlocksHeld:
    """The devices that have some of the files, the nearest first."""

    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class BlockDamaged:
    """The artifact with this hash arrived incomplete or with other contents.

    The coordinator checks its own file, and makes a damaged one again. It sends heartbeats
    meanwhile. It ends with Done, or with RequestFailed (``request`` 0) if it cannot make the file.
    """

    sha256: str


@dataclass(frozen=True, slots=True)
class BlockChunk:
    """The payload is bytes of the artifact at ``offset``. ``total`` is the artifact's size."""

    offset: int
    total: int


Message: TypeAlias = (
    AuthChallenge
    | AuthAnswer
    | Introduction
    | DevicesKnown
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
    | ConnectTeam
    | TeamPass
    | TeamPart
    | TeamLogits
    | TeamFailed
    | TeamTrial
    | MeasureTeam
    | TeamMeasured
    | UnloadStage
    | FetchBlocks
    | BlocksFetched
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
    | TakeTrace
    | TraceTaken
    | PeerHello
    | PeerWelcome
    | Activation
    | TokenSampled
    | PromptScored
    | EncodeTexts
    | TextRows
    | TextsEncoded
    | PassFailed
    | ProbePing
    | ProbePong
    | BlocksHello
    | FetchBlock
    | FindHolders
    | BlocksHeld
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
    29: LinkChanged,
    30: StartSequence,
    31: ReleaseSequence,
    32: SequenceFailed,
    33: PeerLost,
    34: HopMeasured,
    35: ConnectTeam,
    36: FetchBlocks,
    37: BlocksFetched,
    40: PeerHello,
    41: PeerWelcome,
    42: Activation,
    43: TokenSampled,
    44: ProbePing,
    45: ProbePong,
    46: TeamPass,
    47: TeamPart,
    48: TeamLogits,
    50: BlocksHello,
    51: FetchBlock,
    52: BlockChunk,
    53: MakeFiles,
    54: FilesMade,
    60: StageDamaged,
    61: BlockDamaged,
    67: FindHolders,
    68: BlocksHeld,
    81: EncodeTexts,
    82: TextRows,
    83: TextsEncoded,
    84: PassFailed,
    85: MeasureDevice,
    86: DeviceMeasured,
    87: FiguresChanged,
    88: MeasureModelAgain,
    90: TeamFailed,
    91: MeasureTeam,
    92: TeamMeasured,
    93: TeamTrial,
    94: PromptScored,
    95: Introduction,
    96: DevicesKnown,
    98: TakeTrace,
    99: TraceTaken,
}
"""The message codes on the wire. Never reuse a number."""

WITH_PAYLOAD: frozenset[type[Message]] = frozenset(
    {Activation, TextRows, ProbePing, BlockChunk, TeamPass, TeamPart, TeamLogits}
)
"""The messages that may carry raw bytes behind the header."""
