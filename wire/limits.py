"""Caps on what a peer may make us allocate, each with its reason. Checked before allocation."""

from __future__ import annotations

MAX_HEADER_BYTES = 4 << 20
"""The largest msgpack header.

The description of a model with some hundred layers is far smaller. So is a prompt of 128 Ki tokens
with at most 5 bytes each.
"""

MAX_PAYLOAD_BYTES = 64 << 20
"""The largest tensor or file chunk in one frame. Files travel in chunks, so they may be larger.

512 rows of a 16 Ki wide hidden state at fp32 are 32 MiB.
"""

FILE_CHUNK_BYTES = 256 << 10
"""Bytes of an artifact per frame: large enough for line rate, small enough for a slow link.

On 0.25 Mbit/s a chunk gets through within SEND_TIMEOUT_S.
"""

MAX_NESTING = 8
"""The depth of containers in a header. The deepest real one (a layer's rotary factors) is 6."""

RESULT_BYTES = 256 << 10
"""The most bytes of a result in one TextsEncoded. A report has twice as much at most."""

PREFILL_CHUNK_TOKENS = 64
"""The prompt rows that a stage runs in one call. This bounds compute buffers and frames."""

DRAFT_TOKENS = 14
"""The most tokens that a pass checks ahead. With its own row it has fewer rows than a chunk, which
some backends round more coarsely."""

CONNECT_TIMEOUT_S = 3.0
"""A device on the same LAN answers in milliseconds, or not at all."""

HANDSHAKE_TIMEOUT_S = 5.0
"""The time in which TLS and the introduction must be over, however slow the bytes."""

MAX_HANDSHAKE_BYTES = 1024
"""The largest header from a peer that has proved nothing yet."""

HELLO_TIMEOUT_S = 10.0
"""The time from accepting a connection until its first message is there, handshake included."""

MAX_AGENT_HELLO_BYTES = 64 << 10
"""The largest AgentHello. A profile and 64 addresses are about 4 KiB."""

MAX_HELLO_BYTES = 1024
"""The largest header of the other first messages."""

MAX_REPORT_BYTES = 512 << 10
"""The largest header that the coordinator reads: the hashes of 7000 blocks.

Python decodes it in a few tenths of a second, while all others wait.
"""

MAX_GRAMMAR_BYTES = 256 << 10
"""The longest grammar of an answer. A schema with a hundred tools has less than half of it."""

MAX_LOGIT_BIASES = 1024
"""The most tokens with a bias of their own. OpenAI takes 300."""

MAX_PROBE_BYTES = 4 << 20
"""The largest payload of a link probe."""

SEND_TIMEOUT_S = 10.0
"""The time after which a peer that accepts no byte counts as dead."""

LEAST_BYTES_PER_S = 16 << 10
"""A peer that takes a frame slower than this, beyond SEND_TIMEOUT_S, holds a thread up."""

HEARTBEAT_S = 1.0
"""The interval at which an agent says that it is alive."""

LIVENESS_S = 5.0
"""The silence after which an agent counts as lost: five heartbeats."""

COORDINATOR_PATIENCE_S = 20.0
"""The silence after which an agent leaves a coordinator whose machine still acknowledges.

Such a coordinator is suspended, and may go on later. If its machine or network is gone, nothing is
acknowledged, and the kernel reports that after LIVENESS_S. The limit is below the agent's own
watchdog (systemd/shoal-agent.service), because heartbeats feed that.
"""
