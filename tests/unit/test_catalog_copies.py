"""Backups of a catalogue, and the check of all its records."""

import random
import sqlite3
from contextlib import closing

import pytest
import trio

from droppexd.catalog import copies
from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.checking import check_catalogue
from droppexd.catalog.copies import back_up, open_stopped_catalogue, read_facts
from droppexd.catalog.keys import (
    TOTALS,
    degraded_key,
    extent_key,
    garbage_key,
    large_key,
    name_key,
    outcome_key,
    pool_key,
    session_key,
    version_key,
    work_key,
)
from droppexd.catalog.records import (
    Name,
    Totals,
    pack_extent,
    pack_fields,
    pack_name,
    pack_version,
    unpack_extent,
    unpack_garbage,
    unpack_name,
    unpack_version,
)
from droppexd.catalog.sqlite import CATALOGUE_FILE, open_sqlite_engine
from droppexd.errors import CatalogError, IdentityError
from droppexd.model import (
    EXTENT_CHUNKS,
    MISSING,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolRecord,
    Version,
    VersionId,
)
from droppexd.runtime import Runtime

CHUNK = 4096
FULL = CHUNK * EXTENT_CHUNKS
POOLS = (1, 2, 3, 4, 5, 6)


class FixedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1_700_000_000_000


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


RUNTIME = Runtime(clock=FixedClock(), entropy=SeededEntropy(), run_blocking=run_inline)


class Author:
    """Writes files, in a session of its own."""

    def __init__(self, catalogue, session):
        self.catalogue = catalogue
        self.session = session
        self.counter = 0

    def operation(self):
        self.counter += 1
        return OperationId(self.session, self.counter)

    async def put(self, name, *sizes, pools=POOLS):
        self.counter += 1
        version = VersionId(self.session, self.counter)
        extents = []
        for size in sizes:
            self.counter += 1
            extent = ExtentId(self.session, self.counter)
            extents.append(Extent(id=extent, layout=Layout(4, 2), size=size, chunk_size=CHUNK, pools=pools))
        record = Version(
            id=version,
            size=sum(sizes),
            blake3=bytes(32),
            extents=tuple(extent.id for extent in extents),
            metadata=(("mode", "644"),),
        )
        await self.catalogue.commit(self.operation(), name, Expected(), record, extents)
        return version, extents


async def fill(author):
    """Write at least one record of each kind."""
    catalogue = author.catalogue
    for number in POOLS:
        await catalogue.save_pool(
            PoolRecord(
                number=0,
                pool_id=bytes([number]) * 16,
                name=f"pool{number}",
                machine=f"machine{number}",
                zone="",
                address=f"tcp://127.0.0.1:{number}",
            )
        )
    await author.put("docs/one", 1000)
    await author.put("docs/large", FULL, FULL, 17)
    await author.put("docs/empty")
    await author.put("docs/degraded", 1000, pools=(1, 2, MISSING, 4, 5, 6))
    await catalogue.rename(author.operation(), "docs/large", "docs/copy", Expected(), keep=True)
    await catalogue.rename(author.operation(), "docs/one", "docs/moved", Expected(), keep=False)
    await author.put("docs/dead", 1000)
    await catalogue.remove(author.operation(), "docs/dead", Expected())


@pytest.fixture
def path(tmp_path):
    """A catalogue with some of everything, whose controller has stopped."""

    async def main():
        async with (
            open_sqlite_engine(tmp_path / CATALOGUE_FILE, RUNTIME) as engine,
            open_catalogue(engine, RUNTIME) as catalogue,
        ):
            await fill(Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))))

    trio.run(main)
    return tmp_path / CATALOGUE_FILE


def checked(path):
    with open_stopped_catalogue(path) as connection:
        return check_catalogue(connection, lambda _done, _total: None)


class Records:
    """The records of a file, to be damaged."""

    def __init__(self, path):
        self.path = path

    def run(self, statement, *values):
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            return connection.execute(statement, values).fetchall()

    def find(self, prefix, at=0):
        """Return a key with this prefix, and its value."""
        query = "SELECT key, value FROM kv WHERE substr(key, 1, 2) = ? ORDER BY key"
        return self.run(query, prefix)[at]

    def value(self, key):
        ((value,),) = self.run("SELECT value FROM kv WHERE key = ?", key)
        return value

    def put(self, key, value):
        self.run("INSERT OR REPLACE INTO kv VALUES (?, ?, 1)", key, value)

    def delete(self, key):
        self.run("DELETE FROM kv WHERE key = ?", key)

    def version_of(self, name):
        version = unpack_name(self.value(name_key(name))).version
        return version, unpack_version(version, self.value(version_key(version)))


@pytest.fixture
def records(path):
    return Records(path)


# -- check -----------------------------------------------------------------------------------------


def test_a_sound_catalogue_is_sound_and_left_as_it_is(path):
    before = path.read_bytes(), {file.name for file in path.parent.iterdir()}
    report = checked(path)
    assert report.problems == []
    assert report.sound
    assert report.records == {
        "pools": 6,
        "sessions": 1,
        "versions": 4,
        "files": 5,
        "extents": 5,
        "degraded": 1,
        "garbage": 1,
        "outcomes": 8,
    }
    assert report.facts.files == 5
    assert before == (path.read_bytes(), {file.name for file in path.parent.iterdir()})


def test_what_lies_in_the_log_of_a_killed_controller_counts(tmp_path):
    killed = tmp_path / "killed"
    killed.mkdir()

    async def main():
        async with (
            open_sqlite_engine(tmp_path / CATALOGUE_FILE, RUNTIME) as engine,
            open_catalogue(engine, RUNTIME) as catalogue,
        ):
            await fill(Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))))
            for file in (CATALOGUE_FILE, f"{CATALOGUE_FILE}-wal"):
                (killed / file).write_bytes((tmp_path / file).read_bytes())

    trio.run(main)
    assert (killed / f"{CATALOGUE_FILE}-wal").stat().st_size
    before = {file.name: file.read_bytes() for file in killed.iterdir()}
    report = checked(killed / CATALOGUE_FILE)
    assert report.sound, report.problems
    assert report.records["files"] == 5
    assert before == {file.name: file.read_bytes() for file in killed.iterdir()}


@pytest.mark.parametrize("prefix", [b"n/", b"v/", b"e/", b"g/", b"p/", b"s/", b"o/", b"c/"])
@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x01", b"\x91\x01", b"\x93\x02\x01\x01", b"\x9a\x01" * 2])
def test_a_record_that_does_not_decode_is_told(records, prefix, value):
    key, _ = records.find(prefix)
    records.put(key, value)
    report = checked(records.path)
    assert not report.sound
    assert any("does not decode" in problem for problem in report.problems) or prefix == b"c/"


def name_without_version(records):
    version, _ = records.version_of("docs/moved")
    records.delete(version_key(version))
    return "'docs/moved' points at version"


def version_without_a_name(records):
    records.delete(name_key("docs/moved"))
    return "1 fewer names than it counts"


def name_too_many(records):
    records.put(name_key("docs/second"), records.value(name_key("docs/moved")))
    return "1 more names than it counts"


def name_of_another_size(records):
    name = unpack_name(records.value(name_key("docs/moved")))
    records.put(name_key("docs/moved"), pack_name(Name(name.version, name.size + 1, name.created_ms)))
    return "'docs/moved' has another size"


def name_that_is_none(records):
    records.put(b"n/docs//x", records.value(name_key("docs/moved")))
    return "has an empty part"


def version_without_an_extent(records):
    _, version = records.version_of("docs/large")
    records.delete(extent_key(version.extents[1]))
    return f"extent {version.extents[1]} of version {version.id} has no record"


def extent_without_a_version(records):
    _, version = records.version_of("docs/moved")
    stray = ExtentId(9, 9)
    stored = unpack_extent(version.extents[0], records.value(extent_key(version.extents[0])))
    records.put(extent_key(stray), pack_extent(stored.extent, version.id))
    return "extent 9-9 is listed by no version"


def extent_of_another_version(records):
    _, version = records.version_of("docs/moved")
    stored = unpack_extent(version.extents[0], records.value(extent_key(version.extents[0])))
    records.put(extent_key(version.extents[0]), pack_extent(stored.extent, VersionId(9, 9)))
    return "is of version 9-9"


def version_of_another_size(records):
    version, record = records.version_of("docs/large")
    records.put(
        version_key(version),
        pack_version(
            Version(id=version, size=record.size + 1, blake3=bytes(32), extents=record.extents, names=2)
        ),
    )
    return f"and its extents {record.size}"


def change_pools(records, name, pools):
    _, version = records.version_of(name)
    stored = unpack_extent(version.extents[0], records.value(extent_key(version.extents[0])))
    extent = Extent(
        id=version.extents[0],
        layout=stored.extent.layout,
        size=stored.extent.size,
        chunk_size=CHUNK,
        pools=pools,
    )
    records.put(extent_key(extent.id), pack_extent(extent, version.id))
    return extent.id


def extent_on_a_strange_pool(records):
    change_pools(records, "docs/moved", (1, 2, 3, 4, 5, 77))
    return "names pool 77"


def extent_twice_on_a_pool(records):
    change_pools(records, "docs/moved", (1, 2, 3, 4, 5, 5))
    return "two shards on one pool"


def extent_with_too_few_shards(records):
    change_pools(records, "docs/moved", (1, 2, 3, 4, 5))
    return "layout 4+2 with 5 shards"


def extent_missing_in_the_degraded_index(records):
    key, _ = records.find(b"d/")
    records.delete(key)
    return "is not in the degraded index"


def degraded_extent_that_is_whole(records):
    _, version = records.version_of("docs/moved")
    records.put(degraded_key(1, version.extents[0]), b"")
    return "which lacks no shard"


def degraded_extent_at_the_wrong_place(records):
    key, _ = records.find(b"d/")
    records.put(key[:2] + b"\x83" + key[3:], b"")
    return "it survives 1"


def degraded_extent_that_is_none(records):
    records.put(degraded_key(1, ExtentId(9, 9)), b"")
    return "has extent 9-9, which has no record"


def large_version_not_in_its_index(records):
    version, _ = records.version_of("docs/large")
    records.delete(large_key(version))
    return "index of large versions"


def large_version_that_is_none(records):
    version, _ = records.version_of("docs/moved")
    records.put(large_key(version), b"")
    return "index of large versions has 2 entries, and there are 1"


def garbage_without_work(records):
    key, value = records.find(b"g/")
    extent, garbage = ExtentId.from_bytes(key[2:]), unpack_garbage(value)
    records.delete(work_key(garbage.pools[0], garbage.epoch, extent))
    return f"dead extent {extent} does not stand in the work of pool"


def work_without_garbage(records):
    records.put(work_key(1, 5, ExtentId(9, 9)), b"")
    return "the pools have 7 dead extents to drop; the garbage records name 6"


def garbage_that_lives(records):
    _, value = records.find(b"g/")
    _, version = records.version_of("docs/moved")
    records.put(garbage_key(version.extents[0]), value)
    return "is dead, and has a record"


def totals_that_are_wrong(records):
    records.put(TOTALS, pack_fields(Totals(files=4, size=1, extents=1)))
    return "the totals say 4 files, and there are 5"


def placement_that_is_wrong(records):
    key, _ = records.find(b"c/")
    records.put(key, pack_fields((7, 7)))
    return "counts [7, 7]"


def placement_that_is_gone(records):
    key, _ = records.find(b"c/")
    records.delete(key)
    return "and no count"


def pool_of_another_number(records):
    records.put(pool_key(3), records.value(pool_key(4)))
    return "says that its number is 4"


def session_without_a_number(records):
    _, value = records.find(b"s/")
    records.put(session_key(0), value)
    return "a number that no session has"


def outcome_of_nothing(records):
    records.put(outcome_key(OperationId(9, 9)), b"\x92\x01\x07")
    return "outcome 9-9 does not decode"


def record_of_the_future(records):
    records.put(b"z/later", b"")
    return "which this release does not know"


def log_with_a_gap(records):
    records.run("DELETE FROM log WHERE revision = 3")
    return "of the revisions from 1 to"


def log_of_rubbish(records):
    records.run("UPDATE log SET operations = x'c1' WHERE revision = 3")
    return "the log's revision 3 does not decode"


def records_that_are_newer_than_the_log(records):
    records.run("UPDATE kv SET revision = 1000000 WHERE key = ?", TOTALS)
    return "1 records are of a later revision"


@pytest.mark.parametrize(
    "harm",
    [
        name_without_version,
        version_without_a_name,
        name_too_many,
        name_of_another_size,
        name_that_is_none,
        version_without_an_extent,
        extent_without_a_version,
        extent_of_another_version,
        version_of_another_size,
        extent_on_a_strange_pool,
        extent_twice_on_a_pool,
        extent_with_too_few_shards,
        extent_missing_in_the_degraded_index,
        degraded_extent_that_is_whole,
        degraded_extent_at_the_wrong_place,
        degraded_extent_that_is_none,
        large_version_not_in_its_index,
        large_version_that_is_none,
        garbage_without_work,
        work_without_garbage,
        garbage_that_lives,
        totals_that_are_wrong,
        placement_that_is_wrong,
        placement_that_is_gone,
        pool_of_another_number,
        session_without_a_number,
        outcome_of_nothing,
        record_of_the_future,
        log_with_a_gap,
        log_of_rubbish,
        records_that_are_newer_than_the_log,
    ],
)
def test_what_does_not_agree_is_told(records, harm):
    expected = harm(records)
    report = checked(records.path)
    assert any(expected in problem for problem in report.problems), report.problems
    assert report.wrong == len(report.problems) > 0


def test_pages_of_rubbish_are_problems_and_no_crash(path):
    whole = bytearray(path.read_bytes())
    pages = len(whole) // 4096
    assert pages >= 3
    for page in range(pages):
        damaged = bytearray(whole)
        damaged[page * 4096 : (page + 1) * 4096] = b"\xa5" * 4096
        path.write_bytes(damaged)
        assert not checked(path).sound, page


def test_other_files_are_no_catalogues(tmp_path):
    with pytest.raises(CatalogError, match="there is no catalogue"):
        checked(tmp_path / "nothing")
    (tmp_path / "text").write_bytes(b"no database " * 1000)
    (tmp_path / "nothing").write_bytes(b"")
    with closing(sqlite3.connect(tmp_path / "theirs")) as theirs:
        theirs.execute("CREATE TABLE kv (x)")
        theirs.commit()
    for name in ("text", "nothing", "theirs"):
        assert not checked(tmp_path / name).sound


def test_a_catalogue_in_use_is_not_checked(path):
    async def main():
        async with open_sqlite_engine(path, RUNTIME):
            checked(path)

    with pytest.raises(IdentityError, match="in use"):
        trio.run(main)


# -- backup ----------------------------------------------------------------------------------------


def backed_up(path, target, *, force=False):
    return back_up(path, target, force=force, progress=lambda _done, _total: None)


def entries(path):
    with open_stopped_catalogue(path) as connection:
        found = connection.execute("SELECT key, value, revision FROM kv ORDER BY key").fetchall()
        return found, connection.execute("SELECT * FROM log ORDER BY revision").fetchall()


def test_a_backup_of_a_stopped_controller_is_what_it_was_made_of(path, tmp_path):
    before = entries(path)
    facts = backed_up(path, tmp_path / "backup")
    assert entries(tmp_path / "backup") == before == entries(path)
    assert facts.revision == before[1][-1][0]
    assert checked(tmp_path / "backup").facts == facts
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


def test_a_backup_beside_a_running_controller_is_one_revision_of_it(tmp_path, monkeypatch):
    """While it is copied, page by page, more is committed."""
    monkeypatch.setattr(copies, "_PAGES_AT_ONCE", 8)
    path, target = tmp_path / CATALOGUE_FILE, tmp_path / "backup"
    progress_calls = []

    async def main():
        async with (
            open_sqlite_engine(path, RUNTIME) as engine,
            open_catalogue(engine, RUNTIME) as catalogue,
        ):
            author = Author(catalogue, await catalogue.open_session("tcp://127.0.0.1:1", bytes(16)))
            await fill(author)
            for number in range(20):
                await author.put(f"many/{number}", *[FULL] * 40, 5)
            before = engine.revision

            def progress(done, total):
                progress_calls.append((done, total))
                trio.from_thread.run(author.put, f"meanwhile/{len(progress_calls)}", 1000)

            facts = await trio.to_thread.run_sync(
                lambda: back_up(path, target, force=False, progress=progress)
            )
            assert facts.revision == before
            assert engine.revision == before + len(progress_calls)

    trio.run(main)
    assert len(progress_calls) > 1
    report = checked(target)
    assert report.sound, report.problems
    assert report.records["files"] == 25
    assert checked(path).records["files"] == 25 + len(progress_calls)


def test_a_backup_is_replaced_with_force_alone(path, tmp_path):
    target = tmp_path / "backup"
    target.write_bytes(b"dear")
    with pytest.raises(FileExistsError, match="--force"):
        backed_up(path, target)
    assert target.read_bytes() == b"dear"
    backed_up(path, target, force=True)
    assert checked(target).sound


def test_a_backup_never_takes_the_place_of_the_catalogue(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    for target in (path, path.with_name(f"{path.name}-wal"), tmp_path / "link"):
        with pytest.raises(CatalogError, match="back it up to another disk"):
            backed_up(path, target, force=True)
    with pytest.raises(IsADirectoryError):
        backed_up(path, tmp_path, force=True)
    assert checked(path).sound


def test_a_damaged_catalogue_gives_no_backup_and_keeps_the_last(path, tmp_path):
    target = tmp_path / "backup"
    backed_up(path, target)
    last = target.read_bytes()
    content = bytearray(path.read_bytes())
    content[-4096:] = b"\xa5" * 4096
    path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"not sound|cannot be copied"):
        backed_up(path, target, force=True)
    assert target.read_bytes() == last
    assert {file.name for file in tmp_path.iterdir()} <= {
        "backup",
        CATALOGUE_FILE,
        f"{CATALOGUE_FILE}.lock",
        f"{CATALOGUE_FILE}-wal",
        f"{CATALOGUE_FILE}-shm",
    }


def test_there_must_be_a_catalogue(tmp_path):
    with pytest.raises(CatalogError, match="there is no catalogue"):
        backed_up(tmp_path / "nothing", tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / CATALOGUE_FILE)) as empty:
        empty.execute("CREATE TABLE theirs (x)")
        empty.commit()
    with pytest.raises(CatalogError, match="not a catalogue"):
        backed_up(tmp_path / CATALOGUE_FILE, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_facts_are_those_of_the_records(path):
    with open_stopped_catalogue(path) as connection:
        facts = read_facts(connection)
    assert (facts.term, facts.files, facts.size) == (1, 5, 1000 + FULL + FULL + 17 + 1000)
    assert facts.written_ms == 1_700_000_000_000
