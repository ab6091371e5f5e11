"""One file per kind of hardware: it loads a stage of quantized blocks and runs it."""

import os

# Unless this is set before its import, ONNX Runtime from 1.29 on reports its use to its makers over
# the network, with an identity of this machine. A user's data must not leave the shoal.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
