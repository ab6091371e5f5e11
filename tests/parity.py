"""How a family's fixture runs: by the reference, by backends, in stages, in teams.

Every function returns logits float32 or float64 [n, vocab]. Row i is computed from the prompt and
the first i tokens of transformers' continuation, which are run one at a time. So greedy decoding
gives that continuation if each row is highest at its token.

The table of docs/families.md is what this prints:

    python -m tests.parity
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import Backend, StageOptions, TeamSum
from backends.edgetpu_host import HostLayer, Span, stacks
from backends.registry import backend_class
from model.artifact import read_block, store_block, values_of, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.rotary import rotary_table
from model.share import Share, most_members, share_spec, share_tensors
from model.spec import QUANTIZED_TENSORS, ModelSpec
from tests.team import run_together, shares_of

Rows = npt.NDArray[Any]
Artifacts = list[tuple[int, Path]]
Step = Callable[[Rows, int], Rows]
"""Runs tokens [n] from a position on, and returns logits whose last row is that of the last."""

FAMILIES = Path(__file__).parent / "families"
NAMES = sorted(path.parent.name for path in FAMILIES.glob("*/golden.npz"))


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers computed for a fixture."""

    prompt: Rows
    logits: Rows
    continuation: Rows

    @staticmethod
    def load(directory: Path) -> Golden:
        values = np.load(directory / "golden.npz")
        return Golden(values["prompt"], values["logits"], values["continuation"])

    @property
    def inputs(self) -> Rows:
        """All tokens that are run: the last one of the continuation is not."""
        return np.concatenate([self.prompt, self.continuation[:-1]])

    @property
    def distinct_fraction(self) -> float:
        """The part of the continuation's tokens that differ from each other."""
        return len(set(self.continuation.tolist())) / len(self.continuation)

    def agreeing(self, rows: Rows) -> int:
        """Return how many tokens of the continuation are highest in their rows."""
        return int((rows.argmax(axis=1) == self.continuation).sum())

    def run(self, step: Step) -> Rows:
        """Run the prompt at once, and then the continuation token by token."""
        position = len(self.prompt)
        rows = [step(self.prompt, 0)[-1:]]
        for token in self.continuation[:-1]:
            rows.append(step(np.array([token]), position))
            position += 1
        return np.concatenate(rows)


@dataclass(frozen=True, slots=True)
class Case:
    """A fixture with its blocks stored in one format."""

    spec: ModelSpec
    golden: Golden
    fmt: Format
    artifacts: Artifacts

    @staticmethod
    def store(name: str, fmt: Format, directory: Path) -> Case:
        checkpoint = Checkpoint.open(FAMILIES / name)
        artifacts = [
            (block, write_artifact(directory, block, checkpoint.block(block), fmt).path)
            for block in range(checkpoint.spec.block_count)
        ]
        return Case(checkpoint.spec, Golden.load(FAMILIES / name), fmt, artifacts)

    @property
    def options(self) -> StageOptions:
        context_tokens = len(self.golden.inputs)
        return StageOptions(slots=1, context_tokens=context_tokens, threads=1, exact=True)

    def reference(self, dtype: type[np.floating[Any]] = np.float64) -> Rows:
        model = ReferenceModel.from_artifacts(self.spec, self.artifacts, dtype)
        return self.golden.run(model.forward)

    def stages(self, backend: Backend, count: int) -> Rows:
        """Run the blocks in ``count`` stages, as equal as they can be."""
        blocks = len(self.artifacts)
        cuts = [blocks * index // count for index in range(count + 1)]
        with ExitStack() as resources:
            loaded = [
                resources.enter_context(
                    closing(backend.load(self.spec, self.artifacts[begin:end], self.options))
                )
                for begin, end in pairwise(cuts)
            ]

            def step(tokens: Rows, position: int) -> Rows:
                rows = tokens
                for stage in loaded:
                    rows = stage.forward(0, position, rows)
                return rows

            return self.golden.run(step)

    def most_members(self) -> int:
        """Return how many devices can share the layers."""
        return most_members(self.spec, self.fmt.group_size)

    def team(self, backend: Backend, members: int) -> Rows:
        """Run shares of all layers and of the head, with the embedding by the reference."""
        spec = self.spec
        blocks = [(block, read_block(path, spec, block)[1]) for block, path in self.artifacts]
        embedding = ReferenceModel(spec, [blocks[0][1]])
        directory = self.artifacts[0][1].parent

        def member(share: Share, team_sum: TeamSum) -> Rows:
            artifacts = [
                (block, store_block(directory, block, tensors, self.fmt).path)
                for block, tensors in (
                    (block, share_tensors(spec, block, stored, share))
                    for block, stored in blocks[1:]
                )
            ]
            options = replace(self.options, team_sum=team_sum)
            with closing(backend.load(share_spec(spec, share), artifacts, options)) as stage:
                return self.golden.run(
                    lambda tokens, position: stage.forward(
                        0, position, embedding.forward(tokens, position)
                    )
                )

        shares = shares_of(spec, [1] * members, self.fmt.group_size)
        return np.concatenate(run_together([partial(member, share) for share in shares]), axis=1)

    def host(self) -> Rows:
        """Run the layers by the host's part of a chip, with exact products."""
        spec = self.spec
        blocks = [read_block(path, spec, block)[1] for block, path in self.artifacts]
        embedding = ReferenceModel(spec, blocks[:1])
        head = ReferenceModel(spec, blocks[-1:], first_block=spec.head_block)
        layers = [self._host_layer(block, blocks[block]) for block in range(1, spec.head_block)]

        def step(tokens: Rows, position: int) -> Rows:
            rows = embedding.forward(tokens, position)
            for layer in layers:
                rows = layer(rows, [Span(0, position, 0, len(rows))])
            return head.forward(rows)

        return self.golden.run(step)

    def _host_layer(self, block: int, tensors: Any) -> HostLayer:
        layer, context_tokens = self.spec.layer(block), self.options.context_tokens
        products = {}
        for name, parts in stacks(layer).items():
            matrix = np.concatenate([values_of(tensors[f"{part}.weight"]) for part in parts])
            products[name] = _product(matrix)
        vectors = {name: own for name, own in tensors.items() if name not in QUANTIZED_TENSORS}
        rotary = None
        if layer.rope is not None:
            rotary = rotary_table(layer.rope, layer.head_dim, context_tokens)
        return HostLayer(layer, vectors, products, rotary, 1, context_tokens)


def _product(matrix: Rows) -> Callable[[Rows], Rows]:
    return lambda rows: rows @ matrix.T


COLUMNS = (
    "fixture", "reference", "ONNX CPU in 1, 2, 3 stages", "torch in 1, 2, 3 stages",
    "team of 2: ONNX CPU, torch", "chip's host part", "8 bits: ONNX CPU, torch",
    "4 bits: ONNX CPU, torch", "distinct tokens",
)  # fmt: skip


def table_row(name: str, directory: Path) -> list[str]:
    """Return a fixture's cells of the table in docs/families.md."""
    backends = [backend_class(backend)() for backend in ("onnx_cpu", "torch_cpu")]
    plain = Case.store(name, Format.of(32), directory)
    golden = plain.golden

    def counts(runs: Iterable[Callable[[], Rows]]) -> str:
        return ", ".join(str(golden.agreeing(run())) for run in runs)

    cells = [name, counts([partial(plain.reference, np.float32)])]
    cells += [counts(partial(plain.stages, one, count) for count in (1, 2, 3)) for one in backends]
    shared = plain.most_members() > 1
    cells.append(counts(partial(plain.team, one, 2) for one in backends) if shared else "-")
    experts = any(layer.experts for layer in plain.spec.layers)
    cells.append("-" if experts else counts([plain.host]))
    for bits in (8, 4):
        narrow = Case.store(name, Format.of(bits, "rtn", 32), directory)
        best = narrow.reference().argmax(axis=1)
        rows = [narrow.stages(one, 1).argmax(axis=1) for one in backends]
        cells.append(", ".join(str(int((own == best).sum())) for own in rows))
    return [*cells, f"{golden.distinct_fraction:.0%}"]


def main() -> None:
    """Print the table of docs/families.md."""
    print(f"| {' | '.join(COLUMNS)} |\n| --- {'| ---: ' * (len(COLUMNS) - 1)}|")  # noqa: T201
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            print(f"| {' | '.join(table_row(name, Path(directory)))} |")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
