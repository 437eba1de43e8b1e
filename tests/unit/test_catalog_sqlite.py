"""The SQLite engine beside what every engine does: files, locks, damage, flushes."""

import math
import sqlite3

import pytest
import trio
import trio.testing

from droppexd.catalog.engine import Operation
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.errors import CatalogError, IdentityError
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


def test_what_its_user_raises_comes_out_as_it_is(tmp_path):
    async def main():
        async with open_sqlite_engine(tmp_path / "c", RUNTIME):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
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
