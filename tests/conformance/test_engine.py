"""What every engine of the catalogue does: one suite for SQLite, etcd and the simulated one.

Revisions are told from where the engine was when it was opened: an election of etcd counts among them.
"""

import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from droppexd.catalog.engine import MAX_KEY_BYTES, Compare, Operation
from droppexd.catalog.etcd_group import EtcdSettings, open_etcd_group
from droppexd.catalog.simulated import SimulatedDisk, SimulatedEngine
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.errors import CatalogError, LocalProtocolError
from droppexd.runtime import Runtime
from tests.etcd_servers import Etcd, require_etcd, wipe

# A connection that breaks while a request is written leaves a generator of httpx's to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")


class FixedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1_700_000_000_000


class NoEntropy:
    def token(self, size_bytes):
        return bytes(size_bytes)

    def uniform(self, low, high):
        return low


class SomeEntropy:
    def token(self, size_bytes):
        return os.urandom(size_bytes)

    def uniform(self, low, high):
        return low


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


class SqliteHarness:
    """Opens the file; a crash is a copy of it as it is, opened elsewhere."""

    alone = True

    def __init__(self, folder: Path):
        self.path = folder / "catalogue"
        self.runtime = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=trio.to_thread.run_sync)

    @asynccontextmanager
    async def open(self, keep_revisions=1_000_000):
        async with open_sqlite_engine(self.path, self.runtime, keep_revisions=keep_revisions) as engine:
            yield engine

    def crash(self, engine):
        after = self.path.parent / "after-crash"
        after.mkdir()
        for file in self.path.parent.glob("catalogue*"):
            shutil.copy(file, after / file.name)
        self.path = after / "catalogue"

    def break_disk(self, engine):
        engine._file._writer.execute("PRAGMA query_only = 1")


class SimulatedHarness:
    alone = True

    def __init__(self, folder: Path):
        self.disk = SimulatedDisk()
        self.broken = False
        self.runtime = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=run_inline)

    async def flush(self):
        await trio.lowlevel.checkpoint()
        if self.broken:
            self.engine.crash()

    @asynccontextmanager
    async def open(self, keep_revisions=1_000_000):
        self.engine = SimulatedEngine(
            self.runtime, self.disk, flush=self.flush, keep_revisions=keep_revisions
        )
        yield self.engine
        await self.engine.close()

    def crash(self, engine):
        self.disk = engine.crash()

    def break_disk(self, engine):
        self.broken = True


class EtcdHarness:
    """Three real servers; a crash kills and starts them all, and each opening is a mandate of its own."""

    alone = False
    """Elections count among the revisions."""

    def __init__(self, etcd: Etcd):
        self.etcd = etcd
        self.runtime = Runtime(
            clock=FixedClock(), entropy=SomeEntropy(), run_blocking=trio.to_thread.run_sync
        )

    @asynccontextmanager
    async def open(self, keep_revisions=1_000_000):
        settings = EtcdSettings(self.etcd.endpoints, lease_s=5, txn_s=3.0, keep_revisions=keep_revisions)
        async with (
            open_etcd_group(settings, self.runtime) as group,
            group.campaign("tcp://127.0.0.1:1") as mandate,
        ):
            yield mandate.engine

    def crash(self, _engine):
        self.etcd.kill()
        self.etcd.start()

    def break_disk(self, _engine):
        self.etcd.kill()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    require_etcd()
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    yield etcd
    etcd.kill()


@pytest.fixture(params=["sqlite", "simulated", "etcd"])
def harness(request, tmp_path):
    if request.param == "etcd":
        etcd = request.getfixturevalue("etcd")
        etcd.start()
        wipe(etcd.endpoints[0])
        return EtcdHarness(etcd)
    return {"sqlite": SqliteHarness, "simulated": SimulatedHarness}[request.param](tmp_path)


def run(main):
    async def bounded():
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


async def put(engine, *pairs):
    return await engine.txn([], [Operation(key, value) for key, value in pairs])


def test_what_was_put_is_there_with_its_revision(harness):
    async def main():
        async with harness.open() as engine:
            first = engine.revision
            assert first == 0 or not harness.alone
            assert await put(engine, (b"a", b"1"), (b"b", b"2")) == first + 1
            assert await put(engine, (b"a", b"3")) == first + 2
            assert engine.revision == first + 2
            found = await engine.get([b"b", b"none", b"a"])
            assert found == [(b"b", b"2", first + 1), None, (b"a", b"3", first + 2)]
            assert await engine.get([b"a"]) == [(b"a", b"3", first + 2)]
            assert await engine.get([]) == []

    run(main)


def test_ranges_are_ordered_half_open_and_limited(harness):
    async def main():
        async with harness.open() as engine:
            keys = [b"k%04d" % i for i in range(300)]
            await put(engine, *[(key, key) for key in reversed(keys)])
            assert [e.key for e in await engine.range(b"k0010", b"k0013", 10)] == keys[10:13]
            assert [e.key for e in await engine.range(b"k0010", b"z", 2)] == keys[10:12]
            assert [e.key for e in await engine.range(b"", b"z", 1000)] == keys
            assert await engine.range(b"x", b"z", 1000) == []
            assert [e.value for e in await engine.get(keys)] == keys
            with pytest.raises(LocalProtocolError):
                await engine.range(b"", b"z", 0)

    run(main)


def test_deleting_removes_and_compares_as_absent(harness):
    async def main():
        async with harness.open() as engine:
            first = engine.revision
            await put(engine, (b"a", b"1"), (b"b", b"1"))
            await put(engine, (b"a", None), (b"never", None))
            assert await engine.get([b"a"]) == [None]
            assert [e.key for e in await engine.range(b"", b"z", 10)] == [b"b"]
            assert await engine.txn([Compare(b"a", 0)], [Operation(b"a", b"2")]) == first + 3

    run(main)


def test_a_transaction_whose_compare_fails_changes_nothing(harness):
    async def main():
        async with harness.open() as engine:
            one = await put(engine, (b"a", b"1"))
            assert await engine.txn([Compare(b"a", 0)], [Operation(b"b", b"2")]) is None
            assert await engine.txn([Compare(b"a", one), Compare(b"c", 7)], [Operation(b"b", b"2")]) is None
            assert await engine.get([b"b"]) == [None]
            assert engine.revision == one
            two = await engine.txn([Compare(b"a", one), Compare(b"b", 0)], [Operation(b"b", b"2")])
            assert two == one + 1
            assert await engine.txn([Compare(b"a", one)], []) == two

    run(main)


def test_of_rivals_at_the_same_time_just_one_wins(harness):
    async def main():
        async with harness.open() as engine:
            results = []
            first = engine.revision

            async def rival(i):
                revision = await engine.txn([Compare(b"lock", 0)], [Operation(b"lock", b"%d" % i)])
                results.append((revision, i))

            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(rival, i)
            winners = [(revision, i) for revision, i in results if revision is not None]
            assert len(winners) == 1
            (entry,) = await engine.get([b"lock"])
            assert entry.value == b"%d" % winners[0][1]
            assert engine.revision == first + 1

    run(main)


def test_transactions_that_wait_together_are_each_seen_when_acknowledged(harness):
    async def main():
        async with harness.open() as engine:
            revisions = []
            first = engine.revision

            async def one(i):
                revision = await put(engine, (b"k%d" % i, b"v"))
                (entry,) = await engine.get([b"k%d" % i])
                assert entry.revision == revision
                revisions.append(revision)

            async with trio.open_nursery() as nursery:
                for i in range(50):
                    nursery.start_soon(one, i)
            assert sorted(revisions) == list(range(first + 1, first + 51))

    run(main)


def test_what_was_acknowledged_survives_a_crash(harness):
    async def main():
        async with harness.open() as engine:
            for i in range(20):
                await put(engine, (b"k%02d" % i, b"v"))
            last = await put(engine, (b"k00", None))
            harness.crash(engine)
        async with harness.open() as engine:
            opened = engine.revision
            assert opened == last if harness.alone else opened > last
            assert len(await engine.range(b"", b"z", 100)) == 19
            assert await put(engine, (b"more", b"v")) == opened + 1

    run(main)


def test_closing_and_opening_keeps_everything(harness):
    async def main():
        async with harness.open() as engine:
            revision = await put(engine, (b"a", b"1"))
        with pytest.raises(CatalogError):
            await put(engine, (b"b", b"1"))
        async with harness.open() as engine:
            assert await engine.get([b"a"]) == [(b"a", b"1", revision)]
            await engine.close()
            await engine.close()

    run(main)


def test_after_a_failed_write_there_are_no_more(harness):
    async def main():
        async with harness.open() as engine:
            await put(engine, (b"a", b"1"))
            harness.break_disk(engine)
            with pytest.raises(CatalogError):
                await put(engine, (b"b", b"x" * 500_000))
            assert engine.failure
            with pytest.raises(CatalogError):
                await put(engine, (b"c", b"1"))

    run(main)


def test_a_watch_yields_its_keys_in_order_and_ends_with_the_engine(harness):
    async def main():
        async with harness.open() as engine:
            before = await put(engine, (b"a", b"before"))
            watch = engine.watch(b"a", b"c")
            await put(engine, (b"a", b"1"), (b"z", b"1"))
            await put(engine, (b"b", b"2"))
            await put(engine, (b"a", None))
        seen = [(entry.revision, entry.key, entry.value) async for entry in watch]
        assert seen == [(before + 1, b"a", b"1"), (before + 2, b"b", b"2"), (before + 3, b"a", None)]

    run(main)


def test_a_watcher_that_falls_behind_is_told(harness, monkeypatch):
    monkeypatch.setattr("droppexd.catalog.watching.Watch.__init__.__defaults__", (3,), raising=False)

    async def main():
        async with harness.open() as engine:
            watch = engine.watch(b"", b"z")
            for _ in range(5):
                await put(engine, (b"a", b"1"))
            for _ in range(3):
                await anext(watch)
            with pytest.raises(CatalogError, match="too far behind"):
                await anext(watch)

    run(main)


def test_the_log_has_whole_transactions_in_order(harness):
    async def main():
        async with harness.open() as engine:
            first = engine.revision
            for i in range(10):
                await put(engine, (b"a", b"%d" % i), (b"b", None if i % 2 else b"v"))
            entries = await engine.log(first, 1000)
            assert [(e.revision - first, e.key, e.value) for e in entries[:4]] == [
                (1, b"a", b"0"),
                (1, b"b", b"v"),
                (2, b"a", b"1"),
                (2, b"b", None),
            ]
            assert [e.revision - first for e in await engine.log(first + 4, 3)] == [5, 5, 6, 6]
            assert await engine.log(first + 10, 5) == []
            assert all(e.time_ms == 1_700_000_000_000 for e in entries)

    run(main)


def test_the_log_is_trimmed_and_says_so(harness, monkeypatch):
    monkeypatch.setattr("droppexd.catalog.sqlite.TRIM_EVERY", 10)

    async def main():
        async with harness.open(keep_revisions=20) as engine:
            first = engine.revision
            for i in range(60):
                await put(engine, (b"a", b"%d" % i))
            if not harness.alone:
                await engine.forget_until(first + 40)  # It does so itself once a second.
            entries = await engine.log(first + 40, 1000)
            assert [e.revision - first for e in entries] == list(range(41, 61))
            with pytest.raises(CatalogError, match="whole copy"):
                await engine.log(first + 5, 10)
        async with harness.open() as engine:
            assert engine.revision == first + 60 if harness.alone else engine.revision > first + 60

    run(main)


def test_bounds_are_held(harness):
    async def main():
        async with harness.open() as engine:
            with pytest.raises(LocalProtocolError):
                await put(engine, (b"k" * (MAX_KEY_BYTES + 1), b""))
            with pytest.raises(LocalProtocolError):
                await put(engine, (b"k", b"v" * (1024 * 1024 + 1)))
            assert await put(engine, (b"k" * MAX_KEY_BYTES, b"v" * 1024 * 1024)) is not None

    run(main)


def test_a_cancelled_caller_leaves_the_engine_working(harness):
    async def main():
        async with harness.open() as engine:
            for i in range(10):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(put, engine, (b"a", b"%d" % i))
                        await trio.testing.wait_all_tasks_blocked(0.0) if i % 2 else None
                        scope.cancel()
                await put(engine, (b"b", b"%d" % i))
                (entry,) = await engine.get([b"b"])
                assert entry.value == b"%d" % i

    run(main)
