"""One file per kind of hardware: load a stage of quantized blocks, run it."""
