"""One file per kind of hardware: load a stage of quantized blocks, run it."""

import os

# ONNX Runtime from 1.29 on reports its use to its makers, over the network and with an identity of
# this machine, unless this is set before it is imported. Nothing of a user's leaves the shoal.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
