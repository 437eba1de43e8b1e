"""Background work gives way to clients, and only to them."""

import trio

from droppexd.roles.throttle import BUSY_S, Throttle


class Served:
    def __init__(self):
        self.requests = 0

    def __call__(self):
        return self.requests


class TrioClock:
    def now(self):
        return trio.current_time()


def test_nothing_waits_while_no_client_is_served(play):
    async def story(_stage):
        start = trio.current_time()
        throttle = Throttle(TrioClock(), 1000, Served())
        for _ in range(100):
            await throttle.wait(1000)
        assert trio.current_time() == start

    play(story)


def test_callers_share_the_limit_while_clients_are_served_and_it_ends_soon_after(play):
    async def story(_stage):
        served = Served()
        throttle = Throttle(TrioClock(), 1000, served)
        done = []

        async def work():
            for _ in range(10):
                served.requests += 1
                await throttle.wait(500)
                done.append(trio.current_time())

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(work)
        assert done[-1] - start == 10.0  # 20 * 500 bytes at 1000 a second, both callers together.
        served.requests += 1
        assert throttle.busy
        await trio.sleep(BUSY_S)
        assert not throttle.busy
        before = trio.current_time()
        await throttle.wait(10**9)
        assert trio.current_time() == before

    play(story)
