"""Turns come in the order of their numbers, and end for all when the order is broken."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from droppexd.errors import StoreError
from droppexd.roles.ordered import Turns


def test_turns_come_in_order_whoever_asks_first(play):
    async def story(stage):
        turns, taken = Turns(), []

        async def take(number):
            await turns.wait(number)
            taken.append(number)
            await trio.lowlevel.checkpoint()
            turns.pass_on()

        async with trio.open_nursery() as nursery:
            for number in (4, 2, 0, 3, 1):
                nursery.start_soon(take, number)
                await wait_all_tasks_blocked()
        assert taken == [0, 1, 2, 3, 4]

    play(story)


def test_nobody_has_a_turn_before_the_one_before_is_over(play):
    async def story(stage):
        turns = Turns()
        await turns.wait(0)
        with trio.move_on_after(100) as scope:
            await turns.wait(1)
        assert scope.cancelled_caught
        turns.pass_on()
        await turns.wait(1)

    play(story)


def test_a_broken_order_ends_the_waiting_with_its_reason(play):
    async def story(stage):
        turns, ended = Turns(), []

        async def wait(number):
            with pytest.raises(StoreError, match="disk gone"):
                await turns.wait(number)
            ended.append(number)

        async with trio.open_nursery() as nursery:
            for number in (1, 2, 5):
                nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
            turns.break_off(StoreError("disk gone"))
            turns.break_off(StoreError("something later"))
        await wait(0)
        await wait(9)
        assert sorted(ended) == [0, 1, 2, 5, 9]
        with pytest.raises(StoreError, match="disk gone"):
            turns.check()

    play(story)


def test_a_break_after_the_turn_was_given_is_still_seen(play):
    async def story(stage):
        turns = Turns()

        async def wait():
            with pytest.raises(StoreError):
                await turns.wait(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            turns.pass_on()
            turns.break_off(StoreError("disk gone"))

    play(story)


def test_an_unbroken_order_checks_out():
    Turns().check()
