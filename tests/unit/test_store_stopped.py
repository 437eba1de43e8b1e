"""The folder of a stopped pool: looked at as it stands, and left as it is."""

import hashlib
import os
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from droppexd.errors import IdentityError, IntegrityError, NoSuchShard, StoreError
from droppexd.model import ExtentId, Layout, ShardHeader, VersionId
from droppexd.store.disk import open_disk_store
from droppexd.store.stopped import open_stopped_pool

SIZE = 3000


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self.random.uniform(low, high)


def content(number):
    return random.Random(number).randbytes(SIZE)


def header_of(number):
    return ShardHeader(
        incarnation=b"i" * 16,
        extent=ExtentId(1, number),
        index=0,
        layout=Layout(1, 1),
        size=SIZE,
        chunk_size=SIZE,
        checksums=(bytes([number]) * 16,),
        version=VersionId(1, number),
    )


def put_large(store, number):
    writer = store.begin(SIZE)
    writer.write(0, content(number))
    writer.finish(header_of(number))


def put_small(store, number):
    (outcome,) = store.put_small([(header_of(number), content(number))])
    assert isinstance(outcome, int)


@pytest.fixture
def store(tmp_path):
    opened = open_disk_store(tmp_path / "pool", entropy=SeededEntropy(), ballast_bytes=0)
    for number in (1, 3):
        put_large(opened, number)
    for number in (2, 4):
        put_small(opened, number)
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path, store):
    """The folder of a pool that was closed in order."""
    store.close()
    return tmp_path / "pool"


@pytest.fixture
def killed(tmp_path, store):
    """A copy of a running pool's folder, which is what a killed process leaves."""
    return shutil.copytree(tmp_path / "pool", tmp_path / "killed")


def snapshot(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (state.st_mode, state.st_mtime_ns, state.st_size, digest)
    return found


@pytest.fixture(
    params=[
        "folder",
        "killed",
        "killed without shm",
        "killed with an empty shm",
        "killed with a torn shm",
        "killed without lock",
    ]
)
def stopped_folder(request, tmp_path):
    found = request.getfixturevalue(request.param.split()[0])
    if request.param == "killed without shm":
        (found / "index.db-shm").unlink()
    if request.param == "killed with an empty shm":
        (found / "index.db-shm").write_bytes(b"")
    if request.param == "killed with a torn shm":
        (found / "index.db-shm").write_bytes(random.Random(1).randbytes(32768))
    if request.param == "killed without lock":
        (found / "lock").unlink()
    return found


def test_everything_in_the_folder_is_there_to_be_read_and_nothing_changes(stopped_folder):
    before = snapshot(stopped_folder)
    pool = open_stopped_pool(stopped_folder)
    assert list(pool.complaints()) == []
    assert pool.shards == 4
    assert [held.extent.counter for held in pool.page(None, 3)] == [1, 2, 3]
    assert [held.extent.counter for held in pool.page((ExtentId(1, 3), 0), 3)] == [4]
    assert [held.extent.counter for held in pool.find([ExtentId(1, 4), ExtentId(1, 9)])] == [4]
    for number in range(1, 5):
        shard = pool.examine(ExtentId(1, number), 0)
        assert (shard.header, bytes(shard.read(0)[0])) == (header_of(number), content(number))
    with pytest.raises(NoSuchShard):
        pool.examine(ExtentId(1, 5), 0)
    assert list(pool.unlisted()) == []
    pool.close()
    pool.close()
    assert snapshot(stopped_folder) == before
    with closing(open_stopped_pool(stopped_folder)):  # It was unlocked.
        pass


def test_a_folder_in_use_is_refused_and_holds_nobody_up(store, tmp_path):
    with pytest.raises(IdentityError, match=f"in use by another droppexd .process {os.getpid()}"):
        open_stopped_pool(tmp_path / "pool")
    store.close()
    with (
        closing(open_stopped_pool(tmp_path / "pool")),
        pytest.raises(IdentityError, match="in use"),
    ):
        open_disk_store(tmp_path / "pool", entropy=SeededEntropy(), ballast_bytes=0)
    open_disk_store(tmp_path / "pool", entropy=SeededEntropy(), ballast_bytes=0).close()


def test_what_is_no_pool_is_refused(tmp_path):
    with pytest.raises(StoreError, match="there is no folder"):
        open_stopped_pool(tmp_path / "none")
    with pytest.raises(IdentityError, match=r"no pool\.json"):
        open_stopped_pool(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("record", ["pool.json", "boot.json"])
def test_damaged_records_are_complaints(folder, record):
    (folder / record).write_text("{}")
    with closing(open_stopped_pool(folder)) as pool:
        (complaint,) = pool.complaints()
        assert record in complaint
        assert pool.shards == 4


def test_a_missing_boot_record_and_a_missing_index_are_complaints(folder):
    (folder / "boot.json").unlink()
    with closing(open_stopped_pool(folder)) as pool:
        (complaint,) = pool.complaints()
        assert "boot.json is missing" in complaint
    (folder / "index.db").unlink()
    with closing(open_stopped_pool(folder)) as pool:
        (complaint,) = pool.complaints()
        assert "index.db is missing" in complaint
        assert pool.page(None, 10) == []
        assert {extent.counter for extent, _ in pool.unlisted()} == {1, 3}
        assert bytes(pool.examine(ExtentId(1, 3), 0).read(0)[0]) == content(3)


def test_files_without_rows_are_unlisted_and_rows_without_files_are_held(folder):
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("DELETE FROM shard WHERE key = ?", (ExtentId(1, 1).to_bytes() + b"\0",))
    database.close()
    next((folder / "large").glob(f"*/{ExtentId(1, 3).to_bytes().hex()}-00")).unlink()
    with closing(open_stopped_pool(folder)) as pool:
        assert list(pool.complaints()) == []
        assert list(pool.unlisted()) == [(ExtentId(1, 1), 0)]
        assert pool.find([ExtentId(1, 3)])
        with pytest.raises(NoSuchShard):
            pool.examine(ExtentId(1, 3), 0)


def test_small_shards_without_rows_are_complaints(folder):
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("DELETE FROM shard WHERE key = ?", (ExtentId(1, 2).to_bytes() + b"\0",))
    database.close()
    with closing(open_stopped_pool(folder)) as pool:
        (complaint,) = pool.complaints()
        assert "1 small shards are stored and not listed" in complaint


def test_a_broken_database_is_a_complaint_and_an_error_where_it_is_read(folder):
    data = bytearray((folder / "index.db").read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    (folder / "index.db").write_bytes(data)
    with closing(open_stopped_pool(folder)) as pool:
        assert any("index.db" in complaint for complaint in pool.complaints())
        with pytest.raises((IntegrityError, StoreError)):
            pool.page(None, 10)


def test_rows_that_name_no_shard_hide_nothing_behind_them(folder):
    with sqlite3.connect(folder / "index.db") as database:
        rows = [(b"", 1), (b"short", 1), ("text", 1), (7, 1), (ExtentId(1, 0).to_bytes() + b"\xf0", 1)]
        rows += [(ExtentId(1, 1).to_bytes() + b"\1", "text"), (ExtentId(1, 1).to_bytes() + b"\2", -1)]
        database.executemany("INSERT INTO shard VALUES (?, ?, 1)", rows)
    database.close()
    with closing(open_stopped_pool(folder)) as pool:
        assert [held.extent.counter for held in pool.page(None, 100)] == [1, 2, 3, 4]
