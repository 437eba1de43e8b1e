"""Crashes of the simulated engine."""

import pytest
import trio
import trio.testing

from droppexd.catalog.engine import Operation
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import CatalogError
from droppexd.runtime import Runtime


class FixedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1


async def slow_flush():
    await trio.sleep(1)


def make(disk=None):
    return SimulatedEngine(
        Runtime(clock=FixedClock(), entropy=None, run_blocking=None), disk, flush=slow_flush
    )


def run(main):
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_crash_loses_what_was_not_flushed_and_its_callers_learn_nothing(written):
    async def main():
        engine = make()
        failures = []

        async def put(key):
            try:
                await engine.txn([], [Operation(key, b"1")])
            except CatalogError:
                failures.append(key)

        await put(b"before")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, b"x")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(put, b"y")
            await trio.sleep(0.5)
            disk = engine.crash(written=written)
        assert sorted(failures) == [b"x", b"y"]
        again = make(disk)
        found = await again.range(b"", b"zz", 10)
        assert [entry.key for entry in found] == [b"before", b"x", b"y"][: written + 1]
        with pytest.raises(CatalogError):
            await engine.txn([], [Operation(b"z", b"1")])

    run(main)


def test_nothing_is_seen_before_its_flush():
    async def main():
        engine = make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.txn, [], [Operation(b"a", b"1")])
            await trio.sleep(0.9)
            assert await engine.get([b"a"]) == [None]
            await trio.sleep(0.2)
            assert await engine.get([b"a"]) == [(b"a", b"1", 1)]

    run(main)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_failed_flush_ends_the_engine_and_leaves_open_what_was_written(written):
    async def main():
        engine = make()
        failures = []

        async def put(key):
            try:
                await engine.txn([], [Operation(key, b"1")])
            except CatalogError as error:
                failures.append((key, str(error)))

        await put(b"before")
        engine.fail_flush(written=written)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, b"x")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(put, b"y")
        assert sorted(failures) == [(key, "flushing failed (Input/output error)") for key in (b"x", b"y")]
        assert engine.failure
        with pytest.raises(CatalogError):
            await engine.txn([], [Operation(b"z", b"1")])
        again = make(engine.crash())
        found = await again.range(b"", b"zz", 10)
        assert [entry.key for entry in found] == [b"before", b"x", b"y"][: written + 1]

    run(main)
