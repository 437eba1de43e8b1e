"""Asking peers who they are: what they say, how fast, and what time it is there."""

from functools import partial

import trio

from droppexd import __version__
from droppexd.model import Role
from droppexd.wire.examining import ASK_S, Acquaintance, examine_peers, pong
from droppexd.wire.messages import Ping, Pong


class ClockAhead:
    def __init__(self, clock, ahead_ms):
        self._clock = clock
        self._ahead_ms = ahead_ms

    def now(self):
        return self._clock.now()

    def wall_ms(self):
        return self._clock.wall_ms() + self._ahead_ms


def answering(role, name, clock, delay_s=0.0):
    async def ping(_call, _request, _body):
        await trio.sleep(delay_s)
        return pong(role, name, bytes(16), clock)

    return {Ping: ping}


async def examined(stage, *peers):
    connections = await stage.connections("asker")
    return await examine_peers(connections, stage.runtime.clock, peers)


def test_each_says_what_it_runs_and_how_far_its_clock_is_ahead(play):
    async def story(stage):
        clock = stage.runtime.clock
        right = await stage.serve("a", answering(Role.POOL, "attic", clock))
        wrong = await stage.serve("c", answering(Role.CONTROLLER, "nas", ClockAhead(clock, -3_600_000)))
        pool, controller = await examined(
            stage, Acquaintance(Role.POOL, "old name", right), Acquaintance(Role.CONTROLLER, "", wrong)
        )
        assert (pool.name, pool.code, pool.release) == ("attic", "", __version__)
        assert abs(pool.ahead_ms) <= pool.round_trip_us / 1000 + 1
        assert controller.name == "nas"
        assert abs(controller.ahead_ms + 3_600_000) <= controller.round_trip_us / 1000 + 1

    play(story)


def test_one_that_is_not_there_and_one_that_is_silent_cost_the_others_no_time(play):
    async def story(stage):
        clock = stage.runtime.clock
        there = await stage.serve("a", answering(Role.POOL, "a", clock))
        silent = await stage.serve("b", answering(Role.POOL, "b", clock, delay_s=1000))
        names = [Acquaintance(Role.POOL, "a", there), Acquaintance(Role.POOL, "b", silent)]
        names += [Acquaintance(Role.POOL, "c", "tcp://127.0.0.1:1")]
        began = trio.current_time()
        answered, timed_out, absent = await examined(stage, *names)
        assert trio.current_time() - began <= 2 * ASK_S + 1
        assert not answered.code
        assert (timed_out.name, timed_out.code, timed_out.ahead_ms) == ("b", "timeout", None)
        assert absent.code
        assert "127.0.0.1:1" in absent.failure

    play(story)


def test_another_role_at_the_address_is_a_failure(play):
    async def story(stage):
        address = await stage.serve("a", answering(Role.APP, "nas", stage.runtime.clock))
        (report,) = await examined(stage, Acquaintance(Role.POOL, "attic", address))
        assert (report.code, report.name) == ("identity", "attic")
        assert "is the app nas" in report.failure

    play(story)


def test_an_older_release_says_no_time(play):
    async def story(stage):
        async def ping(_call, _request, _body):
            return Pong(role="pool", name="attic", boot_id=bytes(16))

        address = await stage.serve("a", {Ping: ping})
        (report,) = await examined(stage, Acquaintance(Role.POOL, "attic", address))
        assert (report.code, report.release, report.ahead_ms) == ("", "", None)

    play(story)


def test_hundreds_are_asked_some_at_a_time(play):
    async def story(stage):
        running, most = 0, 0

        async def ping(_call, _request, _body):
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            await trio.sleep(0.01)
            running -= 1
            return pong(Role.POOL, "a", bytes(16), stage.runtime.clock)

        address_of = partial(stage.serve, handlers={Ping: ping})
        peers = [Acquaintance(Role.POOL, "", await address_of(f"p{number}")) for number in range(100)]
        reports = await examined(stage, *peers)
        assert [report.address for report in reports] == [peer.address for peer in peers]
        assert 1 < most <= 64

    play(story)
