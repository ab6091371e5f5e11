"""Steps that the example models share in their training: optimizer, checkpoint, tokenizer, export.

The scripts `train.py` in the folders beside this file use it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES.parent))  # for shoal's own packages


def adamw(named: Iterable[tuple[str, nn.Parameter]], decay: float) -> torch.optim.Optimizer:
    """Return a new optimizer. Only matrices of the layers decay."""
    every = list(named)
    decays = [p for name, p in every if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in every if not (p.ndim == 2 and ".layers." in name)]
    groups = [{"params": decays, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training run, whole or not at all, also if the power fails."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def progress_bar(done: int, total: int) -> Iterator[Callable[[int, float], None]]:
    """Yield a function that takes the steps done and the loss. It draws a bar on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        # Reports that go to a file are none of the bar's.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("training", completed=done, total=total, loss="-")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.3f}")


def word_tokenizer(
    vocabulary: Mapping[str, int],
    special_tokens: Sequence[str],
    pre_tokenizer: Any,
    last_normalizers: Sequence[Any] = (),
) -> Any:
    """Return a tokenizer of lower-case words. A token carries the space before it, as in GPT-2."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))  # noqa: S106 - a word
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r" (?=[.?])"), ""),
            normalizers.Strip(),
            *last_normalizers,
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return tokenizer


def write_model(
    folder: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    tokenizer: Any,
    chat_template: str,
    max_new_tokens: int,
    begin: str | None = None,
) -> None:
    """Write the Hugging Face directory: weights in fp16, configuration, tokenizer.

    config: what is particular to the architecture, with max_position_embeddings.
    begin: the token that stands for the beginning of a text in the tokenizer's configuration.
    """
    from model.safetensors import write_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().to(torch.float16).numpy() for name, value in model.state_dict().items()
    }
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokens = {
        "bos_token_id": tokenizer.token_to_id(begin or "<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
    }
    stored = {
        **config,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        **tokens,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if begin is None else {"bos_token": begin}),
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": chat_template,
    }
    generation = {"do_sample": False, "max_new_tokens": max_new_tokens, **tokens}
    for name, value in (
        ("config.json", stored),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def run_arguments(about: str | None, home: Path) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all training scripts have."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--model-dir", type=Path, default=home / "model", help="where to export")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--export-only", action="store_true")
    return parser
