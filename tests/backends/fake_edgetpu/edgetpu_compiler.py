"""A stand-in for edgetpu_compiler in tests: same options, same file names, same kind of words.

The operator it writes is `edgetpu-custom-op`, whose options the fake libedgetpu beside it knows.
FAKE_COMPILER chooses: ok, unmapped (hands the file back), refuse, or silent (makes no file).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import flatbuffers
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))

from backends import edgetpu_tflite as writer
from backends.edgetpu_runtime import find_runtime

CUSTOM = 32
SCALE = np.array([writer.SCALE], np.float32)


def compiled(content: bytes) -> bytes:
    """The file with its product as one custom operator."""
    interpreter = find_runtime().module.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    details = {detail["name"]: detail for detail in interpreter.get_tensor_details()}
    weights = interpreter.get_tensor(details["weights"]["index"])
    multipliers = details["weights"]["quantization_parameters"]["scales"]
    payload = np.array(weights.shape, np.int32).tobytes() + multipliers.tobytes()
    payload += weights.tobytes()
    builder = flatbuffers.Builder(len(payload) + 4096)
    options = writer._bytes(builder, payload)
    buffers = writer._tables(builder, [[]])
    tensors = writer._tables(
        builder,
        [
            writer._tensor(builder, "x", (1, weights.shape[1]), 0, SCALE),
            writer._tensor(builder, "y", (1, weights.shape[0]), 0, SCALE),
        ],
    )
    operator = [
        (1, writer._integers(builder, (0,))),
        (2, writer._integers(builder, (1,))),
        (5, writer._offset(builder, options)),
    ]
    subgraph = [
        (0, writer._offset(builder, tensors)),
        (1, writer._integers(builder, (0,))),
        (2, writer._integers(builder, (1,))),
        (3, writer._offset(builder, writer._tables(builder, [operator]))),
    ]
    code = [
        (0, lambda slot: builder.PrependInt8Slot(slot, CUSTOM, 0)),
        (1, writer._string(builder, "edgetpu-custom-op")),
        (3, lambda slot: builder.PrependInt32Slot(slot, CUSTOM, 0)),
    ]
    model = writer._table(
        builder,
        [
            (0, lambda slot: builder.PrependUint32Slot(slot, 3, 0)),
            (1, writer._offset(builder, writer._tables(builder, [code]))),
            (2, writer._offset(builder, writer._tables(builder, [subgraph]))),
            (3, writer._string(builder, "Exported from Subgraph.")),
            (4, writer._offset(builder, buffers)),
        ],
    )
    builder.Finish(model, b"TFL3")
    return bytes(builder.Output())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-o", type=Path, default=Path())
    parser.add_argument("files", type=Path, nargs="*")
    options = parser.parse_args()
    if options.version:
        print("Edge TPU Compiler version 16.0.384591198")
        return 0
    mode = os.environ.get("FAKE_COMPILER", "ok")
    if mode == "refuse":
        print("ERROR: Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'")
        print("Internal compiler error. Aborting!")
        return 1
    room = int(os.environ.get("FAKE_COMPILER_ON_CHIP", 8 << 20))
    for file in options.files if mode != "silent" else ():
        content = file.read_bytes()
        output = options.o / f"{file.stem}_edgetpu.tflite"
        output.write_bytes(content if mode == "unmapped" else compiled(content))
        streamed = max(len(content) - room, 0)
        room -= len(content) - streamed
        print(f"Input model: {file}")
        print(
            "Off-chip memory used for streaming uncached model parameters: "
            f"{streamed / (1 << 20):.2f}MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
