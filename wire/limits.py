"""Caps on what a peer may make us allocate, each with its reason. Checked before allocation."""

from __future__ import annotations

MAX_HEADER_BYTES = 4 << 20
"""Largest msgpack header: a model description of some hundred layers, or a prompt of 128 Ki tokens
(5 bytes each at most), stays well below."""

MAX_PAYLOAD_BYTES = 64 << 20
"""Largest tensor or file chunk in one frame: 512 rows of a 16 Ki wide hidden state at fp32 are
32 MiB. Files travel in chunks, so that their size is not bounded by this."""

FILE_CHUNK_BYTES = 256 << 10
"""Bytes of an artifact per frame: large enough for line rate, small enough to get through within
SEND_TIMEOUT_S on a link of 0.25 Mbit/s."""

MAX_NESTING = 8
"""Depth of containers in a header; the deepest real one (a layer's rotary settings) is 5."""

PREFILL_CHUNK_TOKENS = 64
"""Rows of a prompt that a stage runs in one call: bounds compute buffers and frame sizes."""

CONNECT_TIMEOUT_S = 3.0
"""A device on the same LAN answers in milliseconds, or not at all."""

HANDSHAKE_TIMEOUT_S = 5.0
"""For both ends to prove that they know the token, however slowly bytes come."""

MAX_HANDSHAKE_BYTES = 1024
"""Largest header of somebody who has proved nothing yet."""

HELLO_TIMEOUT_S = 10.0
"""From the moment a connection is accepted until its first message is there, handshake included,
however slowly bytes come."""

MAX_AGENT_HELLO_BYTES = 64 << 10
"""Largest AgentHello: a profile and 64 addresses are some 4 KiB."""

MAX_HELLO_BYTES = 1024
"""Largest of the other first messages."""

MAX_REPORT_BYTES = 512 << 10
"""Largest header that the coordinator reads: the hashes of 7000 blocks. Python decodes it in a few
tenths of a second, in which everybody else waits."""

MAX_PROBE_BYTES = 4 << 20
"""Largest payload of a link probe."""

SEND_TIMEOUT_S = 10.0
"""A peer that accepts no byte for this long is as good as dead."""

HEARTBEAT_S = 1.0
"""Interval at which an agent says that it is alive."""

LIVENESS_S = 5.0
"""Silence after which an agent counts as lost: five heartbeats, within the user's patience."""

COORDINATOR_PATIENCE_S = 20.0
"""Silence after which an agent leaves a coordinator whose machine still acknowledges what it is
sent. Such a coordinator stands still, and goes on where it was. One whose machine or network is
gone acknowledges nothing: the kernel says so after LIVENESS_S. Less than the agent's own watchdog
bears (systemd/shoal-agent.service), since heartbeats feed that."""
