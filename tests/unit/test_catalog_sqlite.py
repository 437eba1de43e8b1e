"""The SQLite engine beside what every engine does: files, locks, damage, flushes."""

import math
import sqlite3
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from droppexd.catalog.engine import Entry, Operation
from droppexd.catalog.replica import LogRow, pack_operations
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.errors import CatalogError, CatalogFull, IdentityError
from droppexd.runtime import Runtime


class FixedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1


class NoEntropy:
    def token(self, size_bytes):
        return bytes(size_bytes)

    def uniform(self, low, high):
        return low


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


RUNTIME = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=run_inline)


async def open_and_put(path, key=b"a"):
    async with open_sqlite_engine(path, RUNTIME) as engine:
        return await engine.txn([], [Operation(key, b"1")])


def test_a_second_engine_on_the_same_file_is_refused(tmp_path):
    async def main():
        async with open_sqlite_engine(tmp_path / "c", RUNTIME) as engine:
            with pytest.raises(IdentityError, match="in use"):
                await open_and_put(tmp_path / "c")
            assert await engine.txn([], [Operation(b"a", b"1")]) == 1
        assert await open_and_put(tmp_path / "c") == 2

    trio.run(main)


def test_a_damaged_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "c"
    trio.run(open_and_put, path)
    damaged = b"no database" + path.read_bytes()[11:]
    path.write_bytes(damaged)
    with pytest.raises(CatalogError, match="droppexd catalog restore BACKUP"):
        trio.run(open_and_put, path)
    assert path.read_bytes() == damaged


def test_a_page_of_rubbish_is_a_catalog_error(tmp_path):
    path = tmp_path / "c"

    async def main():
        async with open_sqlite_engine(path, RUNTIME) as engine:
            for i in range(300):
                await engine.txn([], [Operation(b"k%05d" % i, bytes(400))])

    trio.run(main)
    content = bytearray(path.read_bytes())
    content[4096 * 3 :] = b"\xa5" * (len(content) - 4096 * 3)
    path.write_bytes(content)

    async def read():
        async with open_sqlite_engine(path, RUNTIME) as engine:
            await engine.range(b"", b"z", 1000)

    with pytest.raises(CatalogError, match="cannot be read"):
        trio.run(read)


def test_a_database_of_another_program_is_refused(tmp_path):
    path = tmp_path / "c"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    other.close()
    with pytest.raises(CatalogError, match="another program"):
        trio.run(open_and_put, path)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "c"
    trio.run(open_and_put, path)
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(CatalogError, match="format 99"):
        trio.run(open_and_put, path)


def test_a_path_that_cannot_be_is_a_catalog_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CatalogError, match="cannot be opened"):
        trio.run(open_and_put, tmp_path / "file" / "c")


def test_transactions_that_wait_together_share_one_flush(tmp_path):
    writes = 0

    async def counting(function, *args):
        nonlocal writes
        writes += function.__name__ == "apply"
        await trio.sleep(0.01)
        return function(*args)

    async def main():
        runtime = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=counting)
        async with open_sqlite_engine(tmp_path / "c", runtime) as engine:
            engine._commits._slow_until = math.inf  # A disk that has to be waited for.
            async with trio.open_nursery() as nursery:
                for i in range(40):
                    nursery.start_soon(engine.txn, [], [Operation(b"%d" % i, b"1")])
            assert engine.revision == 40

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert writes <= 2


def test_nothing_is_read_any_more_while_a_thread_closes_the_file(tmp_path):
    seen = []

    async def look_first(function, *args):
        await trio.lowlevel.checkpoint()
        if engines:
            try:
                engines[0].peek([b"a"])
            except CatalogError as error:
                seen.append((function.__name__, str(error)))
            else:
                seen.append((function.__name__, "was read"))
        return function(*args)

    async def main():
        async with open_sqlite_engine(tmp_path / "c", runtime) as engine:
            await engine.txn([], [Operation(b"a", b"1")])
            engines.append(engine)

    engines = []
    runtime = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=look_first)
    trio.run(main)
    assert seen == [("close", "the catalogue is closed")]


def test_what_its_user_raises_comes_out_as_it_is(tmp_path):
    async def main():
        async with open_sqlite_engine(tmp_path / "c", RUNTIME):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trio.run(main)


def test_rows_are_the_same_from_memory_and_from_the_file_while_others_write(tmp_path):
    threads = Runtime(clock=FixedClock(), entropy=NoEntropy(), run_blocking=trio.to_thread.run_sync)

    async def main():
        async with open_sqlite_engine(tmp_path / "c", threads) as engine:
            engine._commits._slow_until = math.inf  # As on a slow disk: commits go through threads.

            async def write():
                for number in range(600):
                    await engine.txn([], [Operation(b"k%d" % (number % 9), bytes(20_000))])

            async def follow():
                after = 0
                while after < 600:
                    for row in await engine.rows(after, 100_000):
                        after += 1
                        assert row.revision == after
                    await trio.sleep(0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)
                for _ in range(3):
                    nursery.start_soon(follow)
            late = await engine.rows(1195, 10_000_000)
            assert engine._recent.after(1195, 10_000_000) == late
            assert engine._recent.after(1, 1000) is None  # Long gone from memory, and in the file.
            assert [row.revision for row in late] == [1196, 1197, 1198, 1199, 1200]
            assert engine._file.read_rows(1195, 10_000_000) == late
            assert (await engine.rows(1, 1000))[0].revision == 2
            async with engine.install() as copy:
                await copy.append(late[:1])
            assert engine.revision == 1196
            assert [row.revision for row in await engine.rows(1195, 1000)] == [1196]
            assert await engine.rows(1196, 1000) == []

    trio.run(main)


def test_the_log_is_bounded_by_its_size_too(tmp_path):
    async def main():
        async with open_sqlite_engine(tmp_path / "c.sqlite", RUNTIME, keep_bytes=400_000) as engine:
            for number in range(3100):
                await engine.txn([], [Operation(b"k", bytes(1000)), Operation(b"n", b"%d" % number)])
            with pytest.raises(CatalogError, match="take a whole copy"):
                await engine.rows(1000, 1000)
            kept = await engine.rows(engine.revision - 300, 10_000_000)
            assert len(kept) == 300

    trio.run(main)


# -- a full disk -------------------------------------------------------------------------------------


class Ballast:
    """So many portions, and a disk that has room only while one was given up since the last write."""

    def __init__(self, portions, *, room=True):
        self.portions = portions
        self.made_way = 0
        self.room = room
        self.limit = None

    def make_way(self):
        self.made_way += 1

    def release(self):
        self.portions -= 1
        if self.portions >= 0:
            self.limit(1_000_000)
        return self.portions >= 0

    def refill(self):
        return self.room


@asynccontextmanager
async def open_on_full_disk(path, ballast=None):
    """An engine whose database may not get any larger, until some ballast is given up."""
    async with open_sqlite_engine(path, RUNTIME, ballast=ballast) as engine:
        writer = engine._file._writer

        def limit(pages):
            writer.execute(f"PRAGMA max_page_count = {pages}")

        await engine.txn([], [Operation(b"first", b"1")])
        limit(1)
        if ballast is not None:
            ballast.limit = limit
        yield engine, limit


LARGE = Operation(b"large", bytes(100_000))


def test_a_full_disk_changes_nothing_and_the_engine_goes_on_when_there_is_room(tmp_path):
    async def main():
        async with open_on_full_disk(tmp_path / "c") as (engine, limit):
            for _ in range(2):
                with pytest.raises(CatalogFull, match="is full, and nothing was changed"):
                    await engine.txn([], [Operation(b"b", b"1"), LARGE])
            with pytest.raises(CatalogFull):
                await engine.append([LogRow(2, 0, pack_operations([LARGE]))])
            assert (engine.failure, engine.shortage, engine.revision) == ("", "", 1)
            assert await engine.get([b"b", b"large"]) == [None, None]
            limit(1_000_000)
            assert await engine.txn([], [Operation(b"b", b"1")]) == 2

    trio.run(main)


def test_all_that_waits_on_a_full_disk_is_refused_together(tmp_path):
    async def main():
        async with open_on_full_disk(tmp_path / "c") as (engine, _):
            refused = []

            async def put(number):
                with pytest.raises(CatalogFull):
                    await engine.txn([], [Operation(b"%d" % number, bytes(100_000))])
                refused.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(put, number)
            assert sorted(refused) == list(range(5))

    trio.run(main)


def test_the_ballast_makes_room_for_a_change_and_nothing_is_added_until_it_is_whole(tmp_path):
    async def main():
        ballast = Ballast(portions=1)
        async with open_on_full_disk(tmp_path / "c", ballast) as (engine, limit):
            assert (ballast.made_way, engine.shortage) == (1, "")
            ballast.room = False
            assert await engine.txn([], [LARGE]) == 2
            assert f"the disk of the catalogue {tmp_path / 'c'} is full" in engine.shortage
            limit(1)
            with pytest.raises(CatalogFull):
                await engine.txn([], [Operation(b"larger", bytes(200_000))])
            await trio.sleep(2)
            assert engine.shortage
            ballast.room = True
            await trio.sleep(2)
            assert engine.shortage == ""

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_start_on_a_disk_without_room_for_the_ballast_is_short_of_room(tmp_path):
    async def main():
        ballast = Ballast(portions=0, room=False)
        async with open_sqlite_engine(tmp_path / "c", RUNTIME, ballast=ballast) as engine:
            assert engine.shortage
            assert await engine.txn([], [Operation(b"a", b"1")]) == 1

    trio.run(main)


def test_a_copy_that_finds_no_room_leaves_everything_as_it_was(tmp_path):
    async def main():
        async with open_on_full_disk(tmp_path / "c") as (engine, _):
            with pytest.raises(CatalogFull):
                async with engine.install() as copy:
                    await copy.put([Entry(b"large", bytes(100_000), 1)])
            assert engine.failure == ""
            (entry,) = await engine.get([b"first"])
            assert entry.value == b"1"

    trio.run(main)


def test_a_file_that_cannot_be_opened_for_want_of_room_is_no_damage(tmp_path, monkeypatch):
    trio.run(open_and_put, tmp_path / "c")
    full = SimpleNamespace(f_bavail=0, f_frsize=4096)
    monkeypatch.setattr("droppexd.catalog.sqlite.os.statvfs", lambda _: full)
    monkeypatch.setattr("droppexd.catalog.sqlite._prepare", refuse_to_open)
    with pytest.raises(CatalogFull, match="on a disk without any room: make a little"):
        trio.run(open_and_put, tmp_path / "c")


def refuse_to_open(*_):
    raise sqlite3.OperationalError("disk I/O error")
