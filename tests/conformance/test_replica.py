"""What every engine does whose log is kept in several places: one suite for SQLite and the simulated one."""

import pytest
import trio

from droppexd.catalog.engine import Operation
from droppexd.catalog.replica import LogRow, pack_operations
from droppexd.errors import CatalogError, RemoteProtocolError
from tests.conformance.test_engine import SimulatedHarness, SqliteHarness

EVERYTHING = b"", b"\xff"


@pytest.fixture(params=[SqliteHarness, SimulatedHarness], ids=["sqlite", "simulated"])
def harness(request, tmp_path):
    """Return what opens engines, each with a disk of its own by name."""

    def make(name):
        (tmp_path / name).mkdir()
        return request.param(tmp_path / name)

    return make


def run(main):
    async def bounded():
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


async def write(engine, count, start=0):
    for number in range(start, start + count):
        key = b"k%03d" % (number % 40)
        value = None if number % 7 == 6 else b"%d" % number
        await engine.txn([], [Operation(key, value), Operation(b"last", b"%d" % number)])


async def content(engine):
    return await engine.range(*EVERYTHING, 1000)


async def follow(source, target):
    while rows := await source.rows(target.revision, 500):
        await target.append(rows)


def test_a_replica_that_took_the_whole_log_is_the_same_and_goes_on(harness):
    async def main():
        async with harness("source").open() as source, harness("target").open() as target:
            await write(source, 100)
            await follow(source, target)
            assert target.revision == source.revision == 100
            assert await content(target) == await content(source)
            assert await target.log(0, 1000) == await source.log(0, 1000)
            await write(source, 10, 100)
            await follow(source, target)
            assert await content(target) == await content(source)
            await write(target, 1, 110)
            assert target.revision == 111

    run(main)


def test_what_was_appended_survives_a_crash(harness):
    async def main():
        kept = harness("target")
        async with harness("source").open() as source:
            await write(source, 30)
            async with kept.open() as target:
                await follow(source, target)
                kept.crash(target)
            async with kept.open() as target:
                assert target.revision == 30
                assert await content(target) == await content(source)

    run(main)


def test_rows_are_pages_of_whole_transactions(harness):
    async def main():
        async with harness("source").open() as source:
            await write(source, 50)
            page = await source.rows(10, 200)
            assert [row.revision for row in page] == list(range(11, 11 + len(page)))
            assert 1 < len(page) < 40
            assert len(await source.rows(10, 1)) == 1
            assert await source.rows(50, 200) == []

    run(main)


def test_what_does_not_follow_or_decode_is_refused_and_nothing_is_changed(harness):
    async def main():
        async with harness("source").open() as source, harness("target").open() as target:
            await write(source, 10)
            rows = await source.rows(0, 10_000)
            with pytest.raises(CatalogError, match="does not follow"):
                await target.append(rows[1:])
            for broken in (
                b"\xc1",
                b"\x91\x01",
                pack_operations([Operation(b"k" * 5000, b"")]),
                b"\x91\x92\x01\x02",
            ):
                with pytest.raises(RemoteProtocolError):
                    await target.append([rows[0], LogRow(2, 0, broken)])
            assert target.revision == 0
            await target.append(rows)
            with pytest.raises(CatalogError, match="does not follow"):
                await target.append(rows)
            assert await content(target) == await content(source)

    run(main)


def test_rows_that_are_trimmed_are_told(harness):
    async def main():
        async with harness("source").open(keep_revisions=20) as source:
            await write(source, 2100)
            with pytest.raises(CatalogError, match="take a whole copy"):
                await source.rows(100, 1000)
            assert (await source.rows(source.revision - 10, 10_000))[-1].revision == source.revision

    run(main)


def test_a_copy_that_is_made_while_the_source_is_written_to_is_the_same_in_the_end(harness):
    async def main():
        async with harness("source").open() as source, harness("target").open() as target:
            await write(source, 60)
            await write(target, 75, 1000)
            before = await content(target)
            began = source.revision
            async with target.install() as copy:
                start = b""
                while page := await source.range(start, EVERYTHING[1], 7):
                    await copy.put(page)
                    await write(source, 9, source.revision)
                    start = page[-1].key + b"\0"
                assert await content(target) == before
                assert target.revision == 75
                await copy.append(await source.rows(began - 1, 10_000_000))
            assert target.revision == source.revision
            assert await content(target) == await content(source)
            await write(source, 5, source.revision)
            await follow(source, target)
            assert await content(target) == await content(source)

    run(main)


async def install(target, entries, pages, error=None):
    async with target.install() as copy:
        await copy.put(entries)
        for rows in pages:
            await copy.append(rows)
        if error is not None:
            raise error


def test_a_copy_that_breaks_off_leaves_everything_as_it_was(harness):
    async def main():
        kept = harness("target")
        async with harness("source").open() as source, kept.open() as target:
            await write(source, 20)
            await write(target, 10, 500)
            before = await content(target)
            with pytest.raises(ZeroDivisionError):
                await install(target, await content(source), [], ZeroDivisionError())
            with pytest.raises(CatalogError, match="last transaction"):
                await install(target, await content(source), [])
            gap = [await source.rows(0, 100), await source.rows(15, 100)]
            with pytest.raises(CatalogError, match="does not follow"):
                await install(target, [], gap)
            assert await content(target) == before
            assert target.revision == 10
            await write(target, 1, 10)
            assert target.revision == 11

    run(main)
