"""The store on a folder: whose it is, what a failing or full disk does, and damage in its files."""

import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from droppexd.errors import DroppexError, IdentityError, IntegrityError, NoSuchShard, StoreError, StoreFull
from droppexd.model import ExtentId, Holding, Layout, ShardHeader, VersionId
from droppexd.store.disk import DiskStore, open_disk_store, usual_reserve
from droppexd.store.files import Files, Space
from droppexd.store.identity import BOOT_FILE, POOL_FILE, lock_folder
from droppexd.store.index_reader import IndexReader
from droppexd.store.large import OPEN_FILES

SIZE = 5000
MEBIBYTE = 1024 * 1024


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes: int) -> bytes:
        return self.random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)


class FaultyFiles(Files):
    """The real files, until a fault is planted: `faults` maps an operation to the errno it fails with."""

    def __init__(self):
        self.faults: dict[str, int] = {}
        self.free: int | None = None
        self.calls: list[str] = []
        self.flushed_folders: list[str] = []

    def _maybe_fail(self, operation: str) -> None:
        self.calls.append(operation)
        if operation in self.faults:
            raise OSError(self.faults[operation], "planted")

    def create(self, path):
        self._maybe_fail("create")
        return super().create(path)

    def pwrite(self, fd, data, offset):
        self._maybe_fail("pwrite")
        super().pwrite(fd, data, offset)

    def allocate(self, fd, size):
        self._maybe_fail("allocate")
        return super().allocate(fd, size)

    def fdatasync(self, fd):
        self._maybe_fail("fdatasync")
        super().fdatasync(fd)

    def fsync_folder(self, path):
        self._maybe_fail("fsync_folder")
        self.flushed_folders.append(path)
        super().fsync_folder(path)

    def rename(self, source, target):
        self._maybe_fail("rename")
        super().rename(source, target)

    def unlink(self, path):
        self._maybe_fail("unlink")
        super().unlink(path)

    def commit(self, connection):
        self.calls.append("commit")
        if "commit" in self.faults:
            error = sqlite3.OperationalError("planted")
            error.sqlite_errorcode = self.faults["commit"]
            raise error
        super().commit(connection)

    def space(self, folder):
        space = super().space(folder)
        return space if self.free is None else Space(space.capacity, self.free)


@pytest.fixture
def files():
    return FaultyFiles()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pool"


@pytest.fixture
def opener(folder, files):
    """Opens the pool folder; what it opened is closed at the end."""
    opened: list[DiskStore] = []

    def open_it(where: Path = folder, **options) -> DiskStore:
        options = {"entropy": SeededEntropy(), "files": files, "ballast_bytes": 0, **options}
        opened.append(open_disk_store(where, **options))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(opener):
    return opener()


def header_of(number: int, size: int = SIZE, *, salt: int = 0) -> ShardHeader:
    return ShardHeader(
        incarnation=b"i" * 16,
        extent=ExtentId(1, number),
        index=0,
        layout=Layout(1, 1),
        size=size,
        chunk_size=4 * MEBIBYTE,
        checksums=(bytes((number % 256, salt)) * 8,) * -(-size // (4 * MEBIBYTE)),
        version=VersionId(1, number),
    )


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def put_large(store: DiskStore, number: int, *, size: int = SIZE) -> int:
    header, data = header_of(number, size), content(number, size)
    writer = store.begin(size)
    for chunk in range(len(header.checksums)):
        offset, length = header.piece_range(chunk)
        writer.write(chunk, data[offset : offset + length])
    return writer.finish(header)


def put_small(store: DiskStore, number: int) -> int:
    (outcome,) = store.put_small([(header_of(number), content(number))])
    if isinstance(outcome, DroppexError):
        raise outcome
    return outcome


def shard_file(folder: Path, number: int) -> Path:
    (found,) = (folder / "large").glob(f"*/{ExtentId(1, number).to_bytes().hex()}-00")
    return found


def left_behind(folder: Path) -> list[Path]:
    return list((folder / "incoming").iterdir())


# -- whose folder it is ------------------------------------------------------------------------------


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(opener, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(IdentityError, match="not empty"):
        opener(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_fresh_file_system_with_its_lost_and_found_becomes_a_pool(opener, folder):
    (folder / "lost+found").mkdir(parents=True)
    assert opener().usage().shards == 0


def test_a_start_that_was_interrupted_before_the_identity_is_begun_again(opener, folder, files):
    files.faults["rename"] = errno.EIO
    with pytest.raises(StoreError):
        opener()
    files.faults.clear()
    assert len(opener().identity.pool_id) == 16


def test_a_start_that_was_interrupted_after_the_identity_is_begun_again(opener, folder, store):
    pool_id = store.identity.pool_id
    store.close()
    for name in (BOOT_FILE, "index.db"):
        (folder / name).unlink()
    assert opener().identity.pool_id == pool_id


def test_folders_that_a_killed_start_made_are_flushed_by_the_next(opener, folder, files, store):
    store.close()
    files.flushed_folders.clear()
    opener()
    assert [path for path in files.flushed_folders if path == str(folder / "large")]
    first_flush_of_the_folder = files.flushed_folders.index(str(folder))
    assert first_flush_of_the_folder < files.flushed_folders.index(str(folder / "large"))


def test_a_folder_in_use_is_refused_and_the_error_says_by_whom(opener, store, folder):
    with pytest.raises(IdentityError, match=r"in use by another droppexd \(process \d+\): stop that one"):
        opener()
    store.close()
    opener()


def ended_process():
    """Return the number of a process that has ended: whoever gets it next is none of ours."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("broken", ["ftruncate", "pwrite"])
def test_whoever_could_not_write_its_number_into_the_lock_leaves_no_other(
    opener, store, folder, monkeypatch, broken
):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    store.close()
    (folder / "lock").write_text("1\n")  # A process that lives, and not the one that holds the folder next.
    with monkeypatch.context() as failing:
        failing.setattr(f"droppexd.store.identity.os.{broken}", refuse)
        lock = lock_folder(folder)
    expected = rf" \(process {os.getpid()}\)" if broken == "ftruncate" else ""
    with pytest.raises(IdentityError, match=rf"in use by another droppexd{expected}: stop that one"):
        lock_folder(folder)
    os.close(lock)


@pytest.mark.parametrize("left", ["ended", "", "-1\n", "0\n", "9" * 40, "9" * 30 + "\n", "12", "rubbish\n"])
def test_a_lock_that_names_no_process_that_lives_is_told_without_a_number(opener, store, folder, left):
    (folder / "lock").write_text(f"{ended_process()}\n" if left == "ended" else left)
    with pytest.raises(IdentityError, match=r"in use by another droppexd: stop that one"):
        opener()


def test_a_disk_that_takes_no_writes_is_told_with_its_folder(opener, store, folder, files, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    store.close()
    monkeypatch.setattr("droppexd.store.identity.os.ftruncate", refuse)
    files.faults["create"] = errno.EROFS
    with pytest.raises(StoreError, match=f"data folder {folder}"):
        opener()


def test_a_failed_start_unlocks_the_folder(opener, store, folder):
    store.close()
    (folder / POOL_FILE).rename(folder / "kept")
    with pytest.raises(IdentityError):
        opener()
    (folder / "kept").rename(folder / POOL_FILE)
    (folder / "index.db").write_bytes(b"no database, that is for sure" * 100)
    for _ in range(2):
        with pytest.raises(StoreError, match="database"):
            opener()


@pytest.mark.parametrize("name", [POOL_FILE, BOOT_FILE])
@pytest.mark.parametrize(
    "damage", [b"", b"\xff\x00", b"[]", b"{}", None], ids=["empty", "binary", "list", "bare", "edited"]
)
def test_a_damaged_record_is_told_and_not_replaced(opener, store, folder, name, damage):
    store.close()
    path = folder / name
    if damage is None:
        fields = json.loads(path.read_text())
        damage = json.dumps({**fields, "pool_id": "00" * 16, "boot_id": "00" * 16}).encode()
    path.write_bytes(damage)
    with pytest.raises(StoreError, match="damaged"):
        opener()
    assert path.read_bytes() == damage


def test_a_folder_of_a_later_release_is_refused(opener, store, folder, monkeypatch):
    store.close()
    monkeypatch.setattr("droppexd.store.identity.FORMAT", 2)
    opener(folder.with_name("later")).close()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="format 2, and this release knows only 1"):
        opener(folder.with_name("later"))


@pytest.mark.parametrize("put", [put_small, put_large])
def test_a_boot_record_that_is_missing_where_there_are_shards_is_told(opener, store, folder, put):
    put(store, 1)
    store.close()
    (folder / BOOT_FILE).unlink()
    with pytest.raises(StoreError, match=f"{BOOT_FILE} is missing"):
        opener()


def test_a_database_that_is_missing_is_told(opener, store, folder):
    store.close()
    (folder / "index.db").unlink()
    with pytest.raises(StoreError, match=r"index\.db is missing"):
        opener()


def test_the_boot_record_is_durable_before_anything_is_served(opener, files, store):
    store.close()
    files.faults["fdatasync"] = errno.EIO
    with pytest.raises(StoreError):
        opener()


CHILD = """
import random, sys
from pathlib import Path
from droppexd.model import ExtentId, Layout, ShardHeader, VersionId
from droppexd.store.disk import open_disk_store

class Entropy:
    def token(self, size): return random.randbytes(size)
    def uniform(self, low, high): return low

def header_of(number):
    return ShardHeader(incarnation=b"i" * 16, extent=ExtentId(1, number), index=0, layout=Layout(1, 1),
        size=5000, chunk_size=4 << 20, checksums=(b"c" * 16,), version=VersionId(1, number))

store = open_disk_store(Path(sys.argv[1]), entropy=Entropy())
print(*store.put_small([(header_of(1), b"s" * 5000)]))
writer = store.begin(0)
writer.write(0, b"l" * 5000)
print(writer.finish(header_of(2)))
unfinished = store.begin(5000)
unfinished.write(0, b"u" * 5000)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_loses_nothing_it_acknowledged(opener, folder):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        lines = [child.stdout.readline().strip() for _ in range(3)]
        assert lines[2] == "ready"
        with pytest.raises(IdentityError, match=f"process {child.pid}"):
            opener()
        child.send_signal(signal.SIGKILL)
    store = opener()
    assert store.page(None, 10) == [
        Holding(ExtentId(1, 1), 0, int(lines[0])),
        Holding(ExtentId(1, 2), 0, int(lines[1])),
    ]
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == b"s" * 5000
    assert bytes(store.read(ExtentId(1, 2), 0, 0)[0]) == b"l" * 5000
    assert left_behind(folder) == []


# -- the index follows the files ---------------------------------------------------------------------


def test_files_that_the_index_lost_are_found_again_with_their_generations(opener, store, folder):
    generations = [put_large(store, number) for number in (1, 2, 3)]
    small = put_small(store, 4)
    store.close()
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("DELETE FROM shard WHERE large")
    database.close()
    store = opener()
    assert [holding.generation for holding in store.page(None, 10)] == [*generations, small]
    assert store.usage().shards == 4
    assert bytes(store.read(ExtentId(1, 2), 0, 0)[0]) == content(2)


def test_rows_whose_files_are_gone_are_forgotten(opener, store, folder):
    put_large(store, 1)
    kept = put_large(store, 2)
    store.close()
    shard_file(folder, 1).unlink()
    store = opener()
    assert store.page(None, 10) == [Holding(ExtentId(1, 2), 0, kept)]
    assert store.usage().shards == 1


def test_a_found_file_with_a_damaged_header_is_held_so_that_it_can_be_dropped(opener, store, folder):
    old = put_large(store, 1)
    store.close()
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("DELETE FROM shard")
    database.close()
    shard_file(folder, 1).write_bytes(b"damaged")
    store = opener()
    (held,) = store.page(None, 10)
    assert held.generation > old
    assert store.drop([held]) == [held]
    assert store.page(None, 10) == []


def test_foreign_names_among_the_shards_are_left_alone(opener, store, folder):
    store.close()
    foreign = folder / "large" / "00" / "notes.txt"
    foreign.write_text("mine")
    assert opener().page(None, 10) == []
    assert foreign.read_text() == "mine"


def test_a_file_that_the_index_does_not_know_is_not_replaced(store, folder):
    generation = put_large(store, 1)
    path = shard_file(folder, 1)
    kept = path.read_bytes()
    store.drop([Holding(ExtentId(1, 1), 0, generation)])
    path.write_bytes(kept)
    with pytest.raises(StoreError, match="in the way"):
        put_large(store, 1)
    assert path.read_bytes() == kept
    assert store.usage().shards == 0


# -- damage --------------------------------------------------------------------------------------------


def test_flipped_bits_of_a_large_piece_are_returned_with_the_checksum_as_stored(store, folder):
    put_large(store, 1)
    data = bytearray(shard_file(folder, 1).read_bytes())
    data[4096 + 100] ^= 1
    shard_file(folder, 1).write_bytes(data)
    piece, checksum = store.read(ExtentId(1, 1), 0, 0)
    assert bytes(piece) != content(1)
    assert len(piece) == SIZE
    assert checksum == header_of(1).checksums[0]


@pytest.mark.parametrize("position", [0, 9, 20, 60])
def test_a_damaged_header_of_a_large_shard_is_an_integrity_error(store, folder, position):
    generation = put_large(store, 1)
    data = bytearray(shard_file(folder, 1).read_bytes())
    data[position] ^= 1
    shard_file(folder, 1).write_bytes(data)
    for ask in (lambda: store.read(ExtentId(1, 1), 0, 0), lambda: store.header(ExtentId(1, 1), 0)):
        with pytest.raises(IntegrityError):
            ask()
    with pytest.raises(IntegrityError):
        put_large(store, 1)
    held = [Holding(ExtentId(1, 1), 0, generation)]
    assert store.page(None, 10) == held
    assert store.drop(held) == held
    put_large(store, 1)
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == content(1)


def test_a_file_under_another_ones_name_is_an_integrity_error(store, folder):
    put_large(store, 1)
    put_large(store, 2)
    shard_file(folder, 1).write_bytes(shard_file(folder, 2).read_bytes())
    with pytest.raises(IntegrityError, match="holds shard 0 of extent 1-2"):
        store.read(ExtentId(1, 1), 0, 0)


def test_a_short_file_loses_only_the_pieces_it_lacks(store, folder):
    put_large(store, 1, size=5 * MEBIBYTE)
    path = shard_file(folder, 1)
    path.write_bytes(path.read_bytes()[:-1])
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == content(1, 5 * MEBIBYTE)[: 4 * MEBIBYTE]
    with pytest.raises(IntegrityError, match="ends within piece 1"):
        store.read(ExtentId(1, 1), 0, 1)


def test_a_file_that_went_away_is_no_such_shard(store, folder):
    put_large(store, 1)
    shard_file(folder, 1).unlink()
    with pytest.raises(NoSuchShard):
        store.read(ExtentId(1, 1), 0, 0)


@pytest.mark.parametrize(
    "damaged",
    ["CAST(substr(header, 1, 40) || x'00' || substr(header, 42) AS BLOB)", "'text'", "7", "x''"],
)
def test_a_damaged_header_of_a_small_shard_is_an_integrity_error(opener, store, folder, damaged):
    put_small(store, 1)
    store.close()
    with sqlite3.connect(folder / "index.db") as database:
        database.execute(f"UPDATE small SET header = {damaged}")
    database.close()
    store = opener()
    for ask in (lambda: store.read(ExtentId(1, 1), 0, 0), lambda: store.header(ExtentId(1, 1), 0)):
        with pytest.raises(IntegrityError):
            ask()


def test_more_shards_are_read_than_files_stay_open(store):
    for number in range(OPEN_FILES + 20):
        put_large(store, number)
    for _ in range(2):
        for number in range(OPEN_FILES + 20):
            assert bytes(store.read(ExtentId(1, number), 0, 0)[0]) == content(number)


# -- a disk that fails ---------------------------------------------------------------------------------


def assert_read_only(store: DiskStore) -> None:
    assert store.read_only
    with pytest.raises(StoreError, match="read-only"):
        store.begin(0)
    with pytest.raises(StoreError, match="read-only"):
        put_small(store, 98)
    with pytest.raises(StoreError, match="read-only"):
        store.drop(store.page(None, 1))
    with pytest.raises(StoreError, match="read-only"):
        store.join(b"c" * 16)


@pytest.mark.parametrize("operation", ["fdatasync", "fsync_folder"])
def test_a_failed_flush_of_a_large_shard_turns_the_store_read_only_for_good(
    opener, store, files, folder, operation
):
    put_large(store, 1)
    put_small(store, 2)
    files.faults[operation] = errno.EIO
    with pytest.raises(StoreError, match="flushing"):
        put_large(store, 3)
    files.calls.clear()
    files.faults.clear()
    assert_read_only(store)
    assert not {"fdatasync", "fsync_folder", "commit"} & set(files.calls)
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == content(1)
    assert bytes(store.read(ExtentId(1, 2), 0, 0)[0]) == content(2)
    assert left_behind(folder) == []
    store.close()
    store = opener()
    assert store.read_only == ""
    put_large(store, 4)


def test_a_failed_commit_turns_the_store_read_only_for_good(opener, store, files):
    put_small(store, 1)
    files.faults["commit"] = sqlite3.SQLITE_IOERR_FSYNC
    outcomes = store.put_small([(header_of(number), content(number)) for number in (2, 3)])
    assert [type(outcome) for outcome in outcomes] == [StoreError, StoreError]
    files.faults.clear()
    assert_read_only(store)
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == content(1)
    store.close()
    assert [holding.extent.counter for holding in opener().page(None, 10)] == [1]


def test_a_large_shard_is_flushed_before_it_has_its_name_and_its_name_before_it_is_acknowledged(store, files):
    files.calls.clear()
    put_large(store, 1)
    order = [call for call in files.calls if call not in ("create", "allocate", "unlink")]
    assert order == ["pwrite", "pwrite", "fdatasync", "rename", "commit", "fsync_folder"]


def test_a_dropped_shard_loses_its_row_then_its_file_and_both_are_flushed(store, files):
    held = [Holding(ExtentId(1, number), 0, put_large(store, number)) for number in (1, 2)]
    files.calls.clear()
    store.drop(held)
    assert files.calls == ["commit", "unlink", "unlink", "fsync_folder", "fsync_folder"]


def test_a_failed_flush_while_dropping_is_not_acknowledged(store, files):
    generation = put_large(store, 1)
    files.faults["fsync_folder"] = errno.EIO
    with pytest.raises(StoreError, match="read-only"):
        store.drop([Holding(ExtentId(1, 1), 0, generation)])
    assert store.read_only


def test_a_failed_flush_of_the_identity_is_not_a_join(store, files):
    files.faults["fdatasync"] = errno.EIO
    with pytest.raises(StoreError):
        store.join(b"c" * 16)
    assert store.identity.cluster_id == b""
    assert store.read_only


@pytest.mark.parametrize("operation", ["create", "allocate", "pwrite", "rename"])
def test_a_full_disk_refuses_a_large_shard_and_the_store_stays_usable(store, files, folder, operation):
    files.faults[operation] = errno.ENOSPC
    with pytest.raises(StoreFull):
        put_large(store, 1)
    assert left_behind(folder) == []
    assert store.read_only == ""
    assert store.usage().shards == 0
    files.faults.clear()
    put_large(store, 1)
    assert bytes(store.read(ExtentId(1, 1), 0, 0)[0]) == content(1)


def test_a_row_that_finds_no_room_takes_the_large_shard_back(store, files, folder):
    files.faults["commit"] = sqlite3.SQLITE_FULL
    with pytest.raises(StoreFull):
        put_large(store, 1)
    assert list((folder / "large").glob("*/*")) == []
    with pytest.raises(StoreFull):
        put_small(store, 2)
    files.faults.clear()
    put_large(store, 1)
    put_small(store, 2)
    assert store.usage().shards == 2


def test_a_write_error_of_the_disk_turns_the_store_read_only(store, files):
    files.faults["pwrite"] = errno.EIO
    with pytest.raises(StoreError):
        put_large(store, 1)
    files.faults.clear()
    assert_read_only(store)


def test_below_its_reserve_the_store_takes_no_shards_but_drops_them(opener, files):
    store = opener(reserve_bytes=MEBIBYTE)
    held = Holding(ExtentId(1, 1), 0, put_large(store, 1))
    files.free = MEBIBYTE + SIZE
    put_small(store, 2)
    files.free = MEBIBYTE + SIZE - 1
    for put in (put_large, put_small):
        with pytest.raises(StoreFull):
            put(store, 3)
    assert store.usage().free == SIZE - 1
    files.free = 0
    assert store.usage().free == 0
    assert store.drop([held]) == [held]
    assert store.read_only == ""


def test_half_of_what_stays_free_of_shards_is_for_the_journal(opener, files):
    store = opener(reserve_bytes=MEBIBYTE)
    for free, usage in ((3, (2, 2.5)), (1, (0, 0.5)), (0.75, (0, 0.25)), (0.5, (0, 0)), (0, (0, 0))):
        files.free = int(free * MEBIBYTE)
        found = store.usage()
        assert (found.free / MEBIBYTE, found.spare / MEBIBYTE) == usage


def test_a_long_shard_of_unknown_size_stops_at_the_reserve(opener, files, folder):
    store = opener(reserve_bytes=MEBIBYTE)
    writer = store.begin(0)
    files.free = 2 * MEBIBYTE
    writer.write(0, bytes(MEBIBYTE))
    files.free = MEBIBYTE
    with pytest.raises(StoreFull):
        writer.write(1, bytes(1))
    assert left_behind(folder) == []


# -- ballast -------------------------------------------------------------------------------------------


def test_ballast_makes_room_for_a_delete_and_returns_when_there_is_room(opener, files, folder):
    store = opener(ballast_bytes=MEBIBYTE)
    ballast = folder / "ballast"
    assert ballast.stat().st_size == MEBIBYTE
    held = Holding(ExtentId(1, 1), 0, put_small(store, 1))
    files.free = 0
    full = files.commit

    def commit_once_there_is_room(connection):
        if ballast.exists():
            files.faults["commit"] = sqlite3.SQLITE_FULL
        full(connection)

    files.commit = commit_once_there_is_room
    released: list[bool] = []
    unlink = files.unlink

    def watch(path):
        unlink(path)
        released.append(path == str(ballast))
        files.faults.clear()

    files.unlink = watch
    assert store.drop([held]) == [held]
    assert released == [True]
    assert not ballast.exists()
    files.free = None
    store.drop([held])
    assert ballast.stat().st_size == MEBIBYTE


def test_without_ballast_a_delete_on_a_full_disk_says_so(store, files):
    held = Holding(ExtentId(1, 1), 0, put_small(store, 1))
    files.faults["commit"] = sqlite3.SQLITE_FULL
    with pytest.raises(StoreFull):
        store.drop([held])
    files.faults.clear()
    assert store.drop([held]) == [held]


def test_a_tiny_disk_has_no_ballast(opener, files, folder):
    files.space = lambda _: Space(32 * MEBIBYTE, 32 * MEBIBYTE)
    opener(ballast_bytes=16 * MEBIBYTE)
    assert not (folder / "ballast").exists()


def test_a_full_disk_is_opened_with_the_room_of_the_ballast(opener, files, folder):
    ballast = folder / "ballast"
    opener(ballast_bytes=MEBIBYTE).close()
    files.free = 0
    left = []
    for _ in range(9):
        store = opener(ballast_bytes=MEBIBYTE)
        assert store.usage().free == 0
        store.close()
        left.append(ballast.stat().st_size // 1024 if ballast.exists() else None)
    assert left == [896, 768, 640, 512, 384, 256, 128, None, None]
    files.free = None
    opener(ballast_bytes=MEBIBYTE)
    assert ballast.stat().st_size == MEBIBYTE


def test_what_is_left_of_the_ballast_stays_when_there_is_no_room_to_refill_it(opener, files, folder):
    opener(ballast_bytes=MEBIBYTE).close()
    files.free = 0
    opener(ballast_bytes=MEBIBYTE).close()
    files.free = None
    files.faults["allocate"] = errno.ENOSPC
    opener(ballast_bytes=MEBIBYTE).close()
    assert (folder / "ballast").stat().st_size == 896 * 1024


# -- room -----------------------------------------------------------------------------------------------


def test_dropped_small_shards_give_their_room_back_to_the_disk(opener, store, folder):
    big = 128 * 1024
    held = []
    for start in range(0, 320, 32):
        group = [(header_of(number, big), bytes(big)) for number in range(start, start + 32)]
        held += [
            Holding(header.extent, 0, generation)
            for (header, _), generation in zip(group, store.put_small(group), strict=True)
        ]
    store.close()
    full = (folder / "index.db").stat().st_size
    store = opener()
    store.drop(held)
    store.close()
    assert (folder / "index.db").stat().st_size < full / 2


def test_the_log_of_the_database_does_not_grow_with_what_was_put(store, folder):
    for start in range(0, 400, 40):
        store.put_small([(header_of(number, 65536), bytes(65536)) for number in range(start, start + 40)])
    assert (folder / "index.db-wal").stat().st_size < 14 * MEBIBYTE


class Unreadable:
    """A connection to a database on bad sectors."""

    def __init__(self, code: int) -> None:
        self._code = code

    def execute(self, query, *_):
        if query.startswith("PRAGMA"):
            return
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = self._code
        raise error

    def close(self):
        pass


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_IOERR_READ, IntegrityError),
        (sqlite3.SQLITE_IOERR_SHORT_READ, IntegrityError),
        (sqlite3.SQLITE_IOERR_NOMEM, StoreError),
        (sqlite3.SQLITE_CANTOPEN, StoreError),
    ],
)
def test_a_small_shard_on_bad_sectors_is_damaged_and_one_that_lacks_memory_is_not(
    store, monkeypatch, code, expected
):
    put_small(store, 1)
    monkeypatch.setattr(IndexReader, "_connect", staticmethod(lambda uri: Unreadable(code)))
    while store._index._readers:
        store._index._readers.pop().close()
    with pytest.raises(expected):
        store.examine(ExtentId(1, 1), 0)


@pytest.mark.parametrize(("code", "expected"), [(errno.EIO, IntegrityError), (errno.EMFILE, StoreError)])
def test_a_large_shard_that_cannot_be_opened_is_damaged_only_if_the_disk_says_so(
    opener, store, folder, monkeypatch, code, expected
):
    put_large(store, 1)
    store.close()
    again = opener()
    real = os.open

    def failing(path, *args, **options):
        if "/large/" in str(path):
            raise OSError(code, "planted")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(expected):
        again.examine(ExtentId(1, 1), 0)


@pytest.mark.parametrize(
    ("capacity", "reserve"),
    [
        (1000 * MEBIBYTE, 50 * MEBIBYTE),
        (10**12, 10 * 1024 * MEBIBYTE),
        (200 * 1024 * MEBIBYTE, 10 * 1024 * MEBIBYTE),
    ],
)
def test_what_stays_free_is_a_part_of_the_disk_and_not_too_much(tmp_path, capacity, reserve):
    class OneSize(Files):
        def space(self, _folder):
            return Space(capacity, capacity)

    assert usual_reserve(tmp_path, files=OneSize()) == reserve


def test_a_disk_that_cannot_be_looked_at_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot look at the disk"):
        usual_reserve(tmp_path / "absent")
