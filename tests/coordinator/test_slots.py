"""Which slot a prompt gets, and what it keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from coordinator.loading.slots import Held, Slots


async def run(slots: Slots, prompt: Sequence[int], answer: Sequence[int] = ()) -> tuple[int, int]:
    """Hold a slot for a prompt and its answer. Return the slot and the cached tokens."""
    async with slots.one(prompt) as held:
        for token in answer:
            held.sampled(token)
        return held.slot, held.cached


def test_a_chat_goes_on_in_its_slot() -> None:
    async def test() -> None:
        slots = Slots(3)
        assert await run(slots, (1, 2, 3), (4, 5, 6)) == (0, 0)
        assert await run(slots, (9, 8, 7), (6, 5, 4)) == (1, 0)
        # No stage has the row of the last token of an answer.
        assert await run(slots, (1, 2, 3, 4, 5, 6, 7), (8,)) == (0, 5)
        assert await run(slots, (9, 8, 7, 6, 1), (2,)) == (1, 4)
        assert slots.kept_tokens == 7 + 5

    asyncio.run(test())


def test_at_least_one_token_of_a_prompt_runs() -> None:
    async def test() -> None:
        slots = Slots(1)
        for cached in (0, 2, 2):
            assert await run(slots, (1, 2, 3), (4, 5)) == (0, cached)
        assert await run(slots, (1,), (2,)) == (0, 0)

    asyncio.run(test())


def test_strange_prompts_get_an_empty_slot_and_then_the_one_used_longest_ago() -> None:
    async def test() -> None:
        slots = Slots(2)
        prompts = [(begin, *range(100, 120)) for begin in range(5)]
        assert [(await run(slots, prompt, (1,)))[0] for prompt in prompts] == [0, 1, 0, 1, 0]
        # What the slots keep now is of the last two.
        assert await run(slots, prompts[3], (1,)) == (1, 20)
        assert await run(slots, prompts[2], (1,)) == (0, 0)

    asyncio.run(test())


def test_a_short_common_beginning_takes_no_chat_away() -> None:
    async def test() -> None:
        slots = Slots(2)
        chat = (0, *range(100, 140))
        assert await run(slots, chat, (1, 2)) == (0, 0)
        assert await run(slots, (0, *range(200, 240)), (1,)) == (1, 0)
        assert await run(slots, (*chat, 1, 7), (1,)) == (0, 42)

    asyncio.run(test())


def test_of_equal_slots_the_one_that_loses_least_is_taken() -> None:
    async def test() -> None:
        slots = Slots(2)
        system = tuple(range(50))
        async with AsyncExitStack() as stack:
            for answer in (range(300, 340), range(400, 410)):
                held = await stack.enter_async_context(slots.one(system))
                for token in answer:
                    held.sampled(token)
        assert await run(slots, (*system, 7)) == (1, 50)

    asyncio.run(test())


def test_who_stands_in_line_goes_on_from_the_slot_that_it_gets() -> None:
    async def test() -> None:
        slots = Slots(1)
        async with slots.one((1, 2, 3)) as held:
            following = asyncio.ensure_future(run(slots, (1, 2, 3, 4, 9)))
            await asyncio.sleep(0)
            held.sampled(4)
            held.sampled(5)
        assert await following == (0, 4)

    asyncio.run(test())


def test_a_slot_keeps_what_it_had_if_its_request_ends_before_the_first_token() -> None:
    async def test() -> None:
        slots = Slots(1)
        await run(slots, (1, 2, 3), (4,))
        # The rest of the prompt may have run on some stages only.
        assert await run(slots, (1, 2, 7, 8, 9)) == (0, 2)
        assert await run(slots, (1, 2, 7, 8, 9)) == (0, 2)

    asyncio.run(test())


def test_what_a_stage_may_lack_is_not_kept() -> None:
    async def test() -> None:
        slots = Slots(1)
        async with slots.one((1, 2, 3)) as held:
            held.sampled(4)
            held.forget()
        assert await run(slots, (1, 2, 3, 4)) == (0, 0)

    asyncio.run(test())


def test_a_request_may_refuse_what_is_kept() -> None:
    async def test() -> None:
        slots = Slots(2)
        await run(slots, (1, 2, 3), (4,))
        async with slots.one((1, 2, 3), reuse=False) as held:
            assert (held.slot, held.cached) == (1, 0)

    asyncio.run(test())


def test_rows_run_again_after_forgetting() -> None:
    held = Held(0, (1, 2, 3), 2)
    held.forget()
    assert (held.cached, held.kept.tolist()) == (0, [])
    held.sampled(4)
    assert held.kept.tolist() == [1, 2, 3]
