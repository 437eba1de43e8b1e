"""What comes out of a background nursery."""

import pytest
import trio
import trio.testing

from droppexd.background import open_background
from droppexd.errors import PeerError


def run(main):
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def fail():
    raise ValueError


async def lose(task, before=lambda: None):
    """Have a peer go while a background task runs."""
    async with open_background() as nursery:
        nursery.start_soon(task)
        before()
        raise PeerError("gone")


def test_a_lone_exception_is_raised_as_it_is():
    async def main():
        with pytest.raises(PeerError):
            await lose(trio.sleep_forever)

    run(main)


def test_a_failure_at_the_moment_of_a_cancellation_from_outside_is_no_group():
    async def main():
        with trio.CancelScope() as scope, pytest.raises(PeerError):
            await lose(trio.sleep_forever, scope.cancel)

    run(main)


def test_a_cancellation_from_outside_passes_through():
    async def main():
        with trio.move_on_after(1) as scope:
            async with open_background() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        assert scope.cancelled_caught

    run(main)


def test_two_failures_stay_a_group():
    async def main():
        with pytest.raises(BaseExceptionGroup) as caught:
            await lose(fail)
        assert {type(one) for one in caught.value.exceptions} == {ValueError, PeerError}

    run(main)
