"""A shoal whose model says what its prompt tells it to (tests.backends.script_cpu)."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

from tests.system.cluster import FIXTURES, ROOT, Cluster

TABLE = "BACKENDS: dict[str, str] = {\n"
LINE = '    "script_cpu": "backends.script_cpu:ScriptBackend",\n'
COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from cli.main import main
sys.exit(main())
"""

MARKERS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|channel|>", "<|message|>", "<|constrain|>"),
    *("<|start|>", "<|end|>", "<|call|>", "<|return|>"),
)
"""The tokens after the fixture's own. Those of Qwen's vocabulary are not special there, too."""

PLAIN_MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CONTEXT_TOKENS = 16384
HIDDEN = 8

_TOOLS = """\
{%- if tools %}{{ '<s>tools\n' }}{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}\
{{ 'Call them as HOW</s>\n' }}{%- endif %}"""

_MESSAGES = """\
{%- for message in messages %}{{ '<s>' + message.role + '\n' + message.content }}\
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{%- endfor %}\
{{ '</s>\n' }}{%- endfor %}"""

_THOUGHTS = "{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"

TEMPLATES = {
    "hermes": ("<tool_call></tool_call> {# reasoning_content </think> #}", _THOUGHTS),
    "llama": ('ipython {"name": , "parameters": }', ""),
    "mistral": ("[TOOL_CALLS][", ""),
    "harmony": ("<|channel|>commentary to=functions.", ""),
    "plain": ("", ""),
}
"""The words by which each format is known, and what the prompt of an answer ends with."""


def write_model(directory: Path, kind: str) -> Path:
    """Write a model that no backend could compute anything useful with."""
    directory.mkdir()
    tokenizer = json.loads((FIXTURES / "llama" / "tokenizer.json").read_text())
    first = len(tokenizer["added_tokens"]) + len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = _byte_tokens()
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": first + number, "content": text}
        | {"special": text not in PLAIN_MARKERS}
        for number, text in enumerate(MARKERS)
    ]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    how, ending = TEMPLATES[kind]
    begin = "" if kind == "plain" else _TOOLS.replace("HOW", how.replace("'", "\\'"))
    template = (
        begin
        + _MESSAGES
        + "{%- if add_generation_prompt %}{{ '<s>assistant\n' }}"
        + ending
        + "{%- endif %}"
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "head_dim": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": CONTEXT_TOKENS,
        "vocab_size": first + len(MARKERS),
        "eos_token_id": 257,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    (directory / "config.json").write_text(json.dumps(config))
    _write_weights(directory / "model.safetensors", config["vocab_size"])
    return directory


def _byte_tokens() -> dict[str, int]:
    """Return GPT-2's character for each byte, so that byte b has the token b."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return {characters[byte]: byte for byte in range(256)}


def _write_weights(path: Path, vocab: int) -> None:
    square, norm, table = (HIDDEN, HIDDEN), (HIDDEN,), (vocab, HIDDEN)
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": square for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": square for name in ("gate", "up", "down")}
    shapes |= {f"{layer}{name}_layernorm.weight": norm for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": norm, "lm_head.weight": table}
    header, data = {}, b""
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32).tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class ScriptedCluster(Cluster):
    """A shoal of one agent with the scripted backend."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.tree = directory / "tree"
        shutil.copytree(
            ROOT / "backends", self.tree / "backends", ignore=shutil.ignore_patterns("__pycache__")
        )
        for path in ROOT.iterdir():
            if (path / "__init__.py").exists() and path.name not in ("backends", "tests"):
                (self.tree / path.name).symlink_to(path)
        script = ROOT / "tests" / "backends" / "script_cpu.py"
        shutil.copy(script, self.tree / "backends")
        registry = self.tree / "backends" / "registry.py"
        table = registry.read_text()
        assert TABLE in table
        registry.write_text(table.replace(TABLE, TABLE + LINE))

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-c", COMMAND, str(self.tree)]

    def serve(self, kind: str) -> str:
        """Start what is not running, load the model of this kind, and return its name."""
        if not self.processes:
            self.start_coordinator()
            where = f"--coordinator=127.0.0.1:{self.control_port}"
            self.start_agent("scripted", where, "--memory=1G", "--backend=script_cpu")
            self.wait_for_agents("scripted", timeout_s=120)
        directory = self.directory / kind
        if not directory.exists():
            write_model(directory, kind)
        self.load(directory, "--bits=16", "--slots=2", f"--context={CONTEXT_TOKENS}")
        return kind


def say(*steps: str) -> str:
    """Return a user's message that makes the model say this, one step in each turn."""
    return f"Hello! [[say]]{'[[then]]'.join(steps)}[[end]]"
