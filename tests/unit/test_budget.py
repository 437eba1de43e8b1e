"""The budget of all transfers: never more than there is, in order, and nothing gets lost."""

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from droppexd.roles.budget import Budget

MOST = 8


class Streams:
    """Tasks that hold or wait for a lease, and what must hold of them together."""

    def __init__(self, nursery, total):
        self.budget = Budget(total)
        self.held = {}
        self.waiting = {}
        self._nursery = nursery
        self._arrived = 0
        self._newest_held = -1

    async def arrive(self):
        arrival = self._arrived
        self._arrived += 1
        scope = self.waiting[arrival] = trio.CancelScope()
        self._nursery.start_soon(self._lease, arrival, scope)
        await wait_all_tasks_blocked()

    async def _lease(self, arrival, scope):
        with scope:
            lease = await self.budget.lease()
            self.held[arrival] = lease
            self._newest_held = max(self._newest_held, arrival)
        del self.waiting[arrival]

    def cancel(self, choice):
        if self.waiting:
            sorted(self.waiting.items())[choice % len(self.waiting)][1].cancel()

    def release(self, choice):
        if self.held:
            arrival = sorted(self.held)[choice % len(self.held)]
            lease = self.held.pop(arrival)
            lease.release()
            lease.release()
            assert lease.adjust() == 0

    def adjust(self, choice):
        if self.held:
            lease = sorted(self.held.items())[choice % len(self.held)][1]
            assert lease.adjust() == lease.units

    def check(self):
        units = [lease.units for lease in self.held.values()]
        assert sum(units) <= self.budget.total
        assert all(1 <= each <= MOST for each in units)
        assert self.budget.streams == len(self.held)
        if self.waiting:
            assert sum(units) == self.budget.total
            assert self._newest_held < min(self.waiting)


steps = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "release", "adjust", "adjust", "cancel"]),
        st.integers(0, 20),
        st.booleans(),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(total=st.integers(1, 24), steps=steps)
def test_units_are_never_lost_nor_made(total, steps):
    async def main():
        async with trio.open_nursery() as nursery:
            streams = Streams(nursery, total)
            for action, choice, settled in steps:
                if action == "arrive":
                    await streams.arrive()
                else:
                    getattr(streams, action)(choice)
                if settled:
                    await wait_all_tasks_blocked()
                    streams.check()
            await wait_all_tasks_blocked()
            streams.check()
            while streams.held:
                streams.release(0)
                await wait_all_tasks_blocked()
                streams.check()
            assert not streams.waiting
            for _ in range(total):
                await streams.arrive()
            assert len(streams.held) == total or sum(one.units for one in streams.held.values()) == total
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_lone_stream_gets_a_window_and_not_everything(play):
    async def story(stage):
        lease = await Budget(100).lease()
        assert lease.units == MOST

    play(story)


def test_streams_whose_clients_pause_leave_something_to_those_that_come(play):
    async def story(stage):
        budget = Budget(16)
        with trio.fail_after(1):
            paused = [await budget.lease() for _ in range(5)]
        assert [lease.units for lease in paused] == [8, 4, 2, 1, 1]

    play(story)


@pytest.mark.parametrize("total", [2, 3, 5, 7, 8, 9])
def test_a_lone_stream_never_has_everything(play, total):
    async def story(stage):
        budget = Budget(total)
        await budget.lease()
        with trio.fail_after(1):
            await budget.lease()

    play(story)


def test_a_stream_that_is_not_alone_any_more_comes_down_to_what_all_get(play):
    async def story(stage):
        budget = Budget(16)
        first, second = await budget.lease(), await budget.lease()
        for _ in range(8):
            first.adjust()
        assert (first.units, second.units) == (4, 4)
        second.release()
        assert first.adjust() == 8

    play(story)


def test_streams_that_run_give_way_to_those_that_wait(play):
    async def story(stage):
        budget = Budget(5)
        first = await budget.lease()
        assert first.units == 4
        with trio.fail_after(1):
            await budget.lease()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(budget.lease)
                await wait_all_tasks_blocked()
                first.adjust()
        assert first.units == 3

    play(story)


def test_a_running_request_of_a_closed_stream_takes_nothing(play):
    async def story(stage):
        budget = Budget(4)
        closed = await budget.lease()
        closed.release()
        assert closed.adjust() == 0
        other = await budget.lease()
        assert other.units == 3

    play(story)


def test_a_unit_given_to_a_stream_that_was_cancelled_goes_to_the_next(play):
    async def story(stage):
        budget = Budget(1)
        first = await budget.lease()
        scope = trio.CancelScope()
        served = trio.Event()

        async def given_up():
            with scope:
                await budget.lease()

        async def patient():
            await budget.lease()
            served.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(given_up)
            await wait_all_tasks_blocked()
            nursery.start_soon(patient)
            await wait_all_tasks_blocked()
            scope.cancel()
            first.release()
            with trio.fail_after(1):
                await served.wait()

    play(story)


def test_nobody_overtakes_a_stream_that_was_just_served(play):
    async def story(stage):
        budget = Budget(1)
        first = await budget.lease()
        order = []

        async def take(name):
            lease = await budget.lease()
            order.append(name)
            await trio.sleep(1)
            lease.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, "waited")
            await wait_all_tasks_blocked()
            first.release()
            await take("came later")
        assert order == ["waited", "came later"]

    play(story)
