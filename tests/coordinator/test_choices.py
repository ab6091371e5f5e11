"""Several answers to one request, over real control connections."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from coordinator.serving import choices
from coordinator.serving.pieces import Piece, Timing
from tests.coordinator.test_gateway import Cluster, Run, collect, ended, run, text_of
from wire.messages import Sampling

__all__ = ["run"]  # The fixture of these tests.

ONE = Sampling(1, ())


def test_many_answers_of_one_request_let_others_in_between(run: Run) -> None:
    """All of them stood in line at once. One request could fill the line for everybody."""

    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        runs = [choices.Run((1, 2), ONE) for _ in range(3)]

        async def many() -> list[tuple[int, Piece]]:
            timings = [Timing() for _ in runs]
            pieces = choices.answers(cluster.gateway, deployment, runs, (), timings)
            async with aclosing(pieces):
                return [piece async for piece in pieces]

        task = asyncio.ensure_future(many())
        first = await cluster.begun()
        assert deployment.slots.waiting == 0
        other = asyncio.ensure_future(collect(cluster, (7,), ONE))
        await cluster.sample(first.sequence, "a", "length")
        await ended(cluster, first.sequence)
        between = await cluster.begun()
        assert between.prompt == (7,)
        await cluster.sample(between.sequence, "b", "length")
        assert text_of(await other) == "b"
        await ended(cluster, between.sequence)
        for letter in "cd":
            begun = await cluster.begun()
            await cluster.sample(begun.sequence, letter, "length")
            await ended(cluster, begun.sequence)
        assert [(index, piece.text) for index, piece in await task] == [
            (0, "a"),
            (1, "c"),
            (2, "d"),
        ]

    run(test)
