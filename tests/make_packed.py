"""Make the packed checkpoints under tests/packed with the code of the tools that packed them.

Run by hand, in an environment of its own, whenever a fixture is added or changed:

    python -m venv /tmp/packed && /tmp/packed/bin/pip install torch transformers tokenizers \
        compressed-tensors loguru mlx mlx-cpu bitsandbytes
    /tmp/packed/bin/python -m tests.make_packed GPTQMODEL AUTOAWQ [name ...]

GPTQMODEL and AUTOAWQ are the unpacked sources of gptqmodel 7.7.0 and autoawq 0.2.9. Their packing
and unpacking functions are run as they are, without the packages around them.

Each directory holds a small Llama as its tool writes it, and golden.npz:

    prompt, logits (of its last position), continuation, margins   as in make_fixtures, in float32
    <module>   SHA-256 of the module's float32 values, as the tool's own code unpacks them

Scales are float32 for the tool's code. With float16 or bfloat16 it would round each product.
tests/packed/matrices.npz has single matrices of further options: their parts and their values.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests import make_fixtures

PACKED = Path(__file__).parent / "packed"
NEW_TOKENS = 64
MIN_DISTINCT = 16
"""Distinct tokens of a continuation. A model that repeats one token proves little."""
LLAMA = make_fixtures.LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}

Parts = dict[str, torch.Tensor]
Packer = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""Takes a weight [N, K]. Returns the parts by their names, and the values float32 [N, K]."""


def gptq(bits: int, group: int, *, sym: bool, version: int, shuffled: bool = False) -> Packer:
    """gptqmodel's ``pack_block`` and ``dequantize_weight``."""

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        width = columns if group == -1 else group
        scales, zeros = ranges(weight, bits, width, sym=sym)
        order = torch.arange(columns) // width
        if shuffled:
            order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
        module = gptq_module(bits, rows, columns)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        module.pack_block(module, linear, scales, zeros, order.int())
        parts = {name: module.buffers[name] for name in ("qweight", "scales")}
        module.buffers["scales"] = module.buffers["scales"].float()
        values = module.dequantize_weight(module)
        if version == 1:
            module.pack_block(module, linear, scales, (zeros - 1) % (1 << bits), order.int())
        parts |= {"qzeros": module.buffers["qzeros"], "g_idx": order.int()}
        return parts, values.T

    return pack


def gptq_module(bits: int, rows: int, columns: int) -> Any:
    """What the functions of gptqmodel's PackableQuantLinear need of their object."""

    class Module(types.SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            if name not in self.__dict__.get("buffers", {}):
                raise AttributeError(name)
            return self.buffers[name]

        def register_buffer(self, name: str, value: Any, persistent: bool = True) -> None:
            self.buffers[name] = value

    path = SOURCES[0] / "gptqmodel" / "nn_modules" / "qlinear" / "__init__.py"
    names = ("pack_block", "dequantize_weight", "_dequantize_from_codes", "_wf_device")
    shifts = "_torch_right_shift", "_torch_left_shift"
    found = functions(path, (*names, "_init_wf_unsqueeze_buffers", *shifts))
    module = Module(
        bits=bits,
        maxq=(1 << bits) - 1,
        in_features=columns,
        out_features=rows,
        pack_dtype=torch.int32,
        pack_dtype_bits=32,
        pack_factor=32 // bits,
        pack_np_math_dtype=np.uint32,
        pack_np_dtype=np.int32,
        planar=False,
        enable_wf_unsqueeze=True,
        dequant_dtype=torch.int16 if bits == 8 else torch.int8,
        buffers={},
        _buffers={},
        pack_block=found["pack_block"],
        dequantize_weight=found["dequantize_weight"],
    )
    for name in ("_dequantize_from_codes", "_wf_device", "_init_wf_unsqueeze_buffers"):
        setattr(module, name, types.MethodType(found[name], module))
    return module


def functions(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return functions and methods of a source file, without the imports around them."""
    tree = ast.parse(path.read_text())
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign)
        and (getattr(node, "name", None) in names or named(node) in names)
    ]
    scope: dict[str, Any] = {
        "t": torch,
        "torch": torch,
        "np": np,
        "nn": torch.nn,
        "_ConvNd": torch.nn.Conv1d,
        "transformers": __import__("transformers"),
        "env_flag": lambda name: name == "GPTQMODEL_DISABLE_PACK_EXT",
        "os": __import__("os"),
    }
    future = ast.parse("from __future__ import annotations").body
    unique = {getattr(node, "name", None) or named(node): node for node in reversed(nodes)}
    exec(compile(ast.Module([*future, *unique.values()], []), str(path), "exec"), scope)  # noqa: S102
    return {name: scope[name] for name in names}


def named(node: ast.AST) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else ""


def awq(group: int) -> Packer:
    """autoawq's ``WQLinear_GEMM.from_linear`` and ``dequantize_gemm``."""

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        folder = SOURCES[1] / "awq"
        gemm = functions(folder / "modules" / "linear" / "gemm.py", ("from_linear",))
        pack_linear = gemm["from_linear"]
        pack_linear = getattr(pack_linear, "__func__", pack_linear)
        unpack = functions(
            folder / "utils" / "packing_utils.py",
            ("dequantize_gemm", "unpack_awq", "reverse_awq_order", "AWQ_REVERSE_ORDER"),
        )
        rows, columns = weight.shape
        scales, zeros = ranges(weight, 4, group, sym=False)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = dequantized(weight, scales, zeros, group, 4)
        pack_linear.__globals__["get_best_device"] = lambda: "cpu"
        module = pack_linear(
            lambda bits, size, width, *_: types.SimpleNamespace(
                w_bit=bits, group_size=size, in_features=width
            ),
            linear,
            4,
            group,
            scales=scales.T.contiguous(),
            zeros=zeros.T.contiguous(),
        )
        values = unpack["dequantize_gemm"](
            module.qweight, module.qzeros, module.scales.float(), 4, group
        )
        parts = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
        return parts, values.T

    return pack


def compressed(format_name: str, **weights: Any) -> Packer:
    """compressed-tensors' compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        width = args.group_size or weight.shape[1]
        grouped = weight.reshape(len(weight), -1, width)
        scales, zeros = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
        scales = scales.to(torch.bfloat16)
        parts = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        compressor = BaseCompressor.get_value_from_registry(format_name)
        stored = compressor.compress(parts, scheme)
        wide = stored | {"weight_scale": scales.float()}
        values = compressor.decompress(dict(wide), scheme)["weight"]
        return dict(stored), values

    return pack


def fp8(block: int) -> Packer:
    """torch's float8, and transformers' ``Fp8Dequantize``."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        blocks = weight.reshape(rows // block, block, columns // block, block)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        stored = codes.to(torch.float8_e4m3fn)
        values = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32)
        return {"weight": stored, "weight_scale_inv": scales}, values

    return pack


def mlx(bits: int, group: int) -> Packer:
    """mlx.core.quantize and dequantize."""
    import mlx.core as mx

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        half = mx.array(weight.numpy()).astype(mx.float16)
        words, scales, biases = mx.quantize(half, group_size=group, bits=bits)
        wide = [one.astype(mx.float32) for one in (scales, biases)]
        values = mx.dequantize(words, *wide, group_size=group, bits=bits)
        parts = {"weight": words, "scales": scales, "biases": biases}
        stored = {name: torch.from_numpy(np.array(one)) for name, one in parts.items()}
        return stored, torch.from_numpy(np.array(values))

    return pack


def nf4(kind: str, *, nested: bool) -> Packer:
    """bitsandbytes' quantize_4bit and dequantize_4bit."""
    import bitsandbytes.functional as F

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        stored, state = F.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        parts = {f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}
        return {"weight": stored, **parts}, F.dequantize_4bit(stored, state)

    return pack


def int8() -> Packer:
    """bitsandbytes' int8_vectorwise_quant and int8_vectorwise_dequant."""
    import bitsandbytes.functional as F

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        stored, scales, _ = F.int8_vectorwise_quant(weight.half())
        values = F.int8_vectorwise_dequant(stored, scales)
        parts = {"weight": stored, "SCB": scales, "weight_format": torch.tensor(0).to(torch.uint8)}
        return parts, values.float()

    return pack


def mxfp4() -> Packer:
    """Random nibbles, and transformers' ``convert_moe_packed_tensors``."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        random = np.random.default_rng(0)
        rows, columns = weight.shape
        blocks = random.integers(0, 256, (2, rows, columns // 32, 16), np.uint8)
        scales = random.integers(110, 125, (2, rows, columns // 32), np.uint8)
        parts = {"blocks": torch.from_numpy(blocks), "scales": torch.from_numpy(scales)}
        values = convert_moe_packed_tensors(*parts.values(), dtype=torch.float32)
        return parts, values.transpose(1, 2)

    return pack


def ranges(
    weight: torch.Tensor, bits: int, group: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales that float16 holds, and zeros, both float32 [N, G]."""
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        scales = (torch.maximum(-low, high) / (middle - 0.5)).half().float()
        return scales, torch.full_like(scales, middle)
    scales = ((high - low) / top).half().float()
    return scales, (-low / scales).round().clamp(0, top)


def dequantized(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int, bits: int
) -> torch.Tensor:
    """Round to nearest, because autoawq packs weights that are rounded already."""
    wide, offset = (one.repeat_interleave(group, 1) for one in (scales, zeros))
    codes = (weight / wide + offset).round().clamp(0, (1 << bits) - 1)
    return (codes - offset) * wide


def ct(format_name: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

MODELS: dict[str, tuple[dict[str, Any], Callable[[], Packer]]] = {
    "gptq": (GPTQ, lambda: gptq(4, 64, sym=True, version=1)),
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": None,
        },
        lambda: awq(32),
    ),
    "compressed-int4": (ct("pack-quantized", **INT4), lambda: compressed("pack-quantized", **INT4)),
    "compressed-int8": (ct("int-quantized", **INT8), lambda: compressed("int-quantized", **INT8)),
    "compressed-fp8": (
        ct("float-quantized", **FLOAT8),
        lambda: compressed("float-quantized", **FLOAT8),
    ),
    "fp8": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "fmt": "e4m3",
        },
        lambda: fp8(32),
    ),
    "mlx": ({"bits": 4, "group_size": 64}, lambda: mlx(4, 64)),
    "bitsandbytes": (BNB, lambda: nf4("nf4", nested=True)),
    "bitsandbytes-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
}
OPEN = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
MATRICES: dict[str, tuple[dict[str, Any], Callable[[], Packer]]] = {
    "gptq-2": (GPTQ | {"bits": 2}, lambda: gptq(2, 64, sym=True, version=1)),
    "gptq-3": (GPTQ | {"bits": 3}, lambda: gptq(3, 64, sym=True, version=1)),
    "gptq-8": (
        GPTQ | {"bits": 8, "group_size": -1},
        lambda: gptq(8, -1, sym=True, version=1),
    ),
    "gptq-v2": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        lambda: gptq(4, 64, sym=False, version=2),
    ),
    "gptq-asymmetric": (GPTQ | {"sym": False}, lambda: gptq(4, 64, sym=False, version=1)),
    "gptq-order": (
        GPTQ | {"desc_act": True},
        lambda: gptq(4, 64, sym=True, version=1, shuffled=True),
    ),
    "compressed-asymmetric": (
        ct("pack-quantized", **OPEN),
        lambda: compressed("pack-quantized", **OPEN),
    ),
    "mlx-8": ({"bits": 8, "group_size": 64}, lambda: mlx(8, 64)),
    "mlx-3": ({"bits": 3, "group_size": 32}, lambda: mlx(3, 32)),
    "mlx-6": ({"bits": 6, "group_size": 64}, lambda: mlx(6, 64)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
    "fp4": (BNB | {"bnb_4bit_quant_type": "fp4"}, lambda: nf4("fp4", nested=False)),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
}


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module


def random_model(seed: int, stored: torch.dtype) -> Any:
    """Return a Llama with random weights and norms, exactly what the stored type can hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_(1, 0.2)
            parameter.copy_(parameter.to(stored).float())
    return model


def compute(model: Any, prompt: list[int]) -> dict[str, Any]:
    """Continue greedily, all tokens anew each time."""
    tokens, margins, logits = list(prompt), [], None
    for _ in range(NEW_TOKENS):
        last = model(torch.tensor([tokens])).logits[0, -1].float()
        logits = last.numpy() if logits is None else logits
        best = torch.topk(last, 2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if margins[-1] <= make_fixtures.MIN_MARGIN:
            break
    return {
        "prompt": np.array(prompt),
        "logits": logits,
        "continuation": np.array(tokens[len(prompt) :]),
        "margins": np.array(margins, np.float32),
    }


def make(name: str) -> int:
    settings, packer = MODELS[name]
    stored = torch.bfloat16 if name.startswith(("compressed", "fp8")) else torch.float16
    prompt = make_fixtures.tokenizer().encode(make_fixtures.PROMPT).ids
    for seed in range(1000):
        model = random_model(seed, stored)
        state = dict(model.state_dict())
        state.pop("lm_head.weight")
        hashes: dict[str, Any] = {}
        with torch.no_grad():
            for module_name, module in linears(model):
                parts, values = packer()(module.weight.data)
                module.weight.data = values.contiguous().float()
                plain = np.ascontiguousarray(module.weight.data.numpy(), np.float32)
                hashes[module_name] = hashlib.sha256(plain.tobytes()).hexdigest()
                del state[f"{module_name}.weight"]
                state |= {f"{module_name}.{part}": one for part, one in parts.items()}
            golden = compute(model, prompt)
        various = len(set(golden["continuation"])) > MIN_DISTINCT
        if golden["margins"].min() > make_fixtures.MIN_MARGIN and various:
            break
    else:
        raise SystemExit(f"{name}: no seed gives margins and various tokens")
    directory = PACKED / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = model.config.to_dict() | {"dtype": str(stored).removeprefix("torch.")}
    key = "quantization" if name == "mlx" else "quantization_config"
    (directory / "config.json").write_text(json.dumps(config | {key: settings}, indent=1) + "\n")
    kept = {
        key: (one.to(stored) if one.dtype == torch.float32 and small(key) else one).contiguous()
        for key, one in state.items()
    }
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    np.savez_compressed(directory / "golden.npz", **golden, **hashes)
    return seed


def small(name: str) -> bool:
    """Whether a tensor is no part of a packed matrix."""
    return "embed" in name or "norm" in name


def make_matrices() -> None:
    arrays: dict[str, Any] = {}
    for name, (settings, packer) in MATRICES.items():
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).half().float()
        parts, values = packer()(weight)
        arrays[f"{name}/settings"] = np.array(json.dumps(settings))
        arrays[f"{name}/values"] = values.contiguous().float().numpy()
        for part, one in parts.items():
            bits = one.view(torch.uint16) if one.dtype == torch.bfloat16 else one
            kind = "BF16" if one.dtype == torch.bfloat16 else ""
            arrays[f"{name}/{kind}/{part}"] = bits.contiguous().numpy()
    np.savez_compressed(PACKED / "matrices.npz", **arrays)


def main(names: list[str]) -> None:
    PACKED.mkdir(exist_ok=True)
    for name in names or [*MODELS, "matrices"]:
        if name == "matrices":
            make_matrices()
            continue
        seed = make(name)
        size_bytes = sum(path.stat().st_size for path in (PACKED / name).iterdir())
        print(f"{name}: seed {seed}, {math.ceil(size_bytes / 1000)} KB")  # noqa: T201 - a command


if __name__ == "__main__":
    SOURCES = [Path(path) for path in sys.argv[1:3]]
    main(sys.argv[3:])
