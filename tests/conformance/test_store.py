"""What every store does: one suite for the real one on a folder and the simulated one."""

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from droppexd.errors import (
    DroppexError,
    IdentityError,
    InvalidRequest,
    LocalProtocolError,
    NoSuchShard,
    StoreError,
)
from droppexd.model import SMALL_SIZE, ExtentId, Holding, Layout, ShardHeader, VersionId
from droppexd.store.disk import open_disk_store
from droppexd.store.interface import NOTE_BYTES, ShardStore
from droppexd.store.simulated import SimulatedDisk, SimulatedStore

CHUNK = 256 * 1024


class SeededEntropy:
    def __init__(self, seed: int = 1):
        self.random = random.Random(seed)

    def token(self, size_bytes: int) -> bytes:
        return self.random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)


class DiskHarness:
    def __init__(self, folder: Path):
        self.entropy = SeededEntropy()
        self.folder = folder / "pool"
        self.crashes = 0
        self.store = self.open()

    def open(self) -> ShardStore:
        return open_disk_store(self.folder, entropy=self.entropy, ballast_bytes=0)

    def crash(self) -> None:
        """Go on with a copy of the folder as it is now, as a killed process leaves it."""
        self.crashes += 1
        copy = self.folder.with_name(f"pool-{self.crashes}")
        shutil.copytree(self.folder, copy)
        self.store.close()
        self.folder = copy


class SimulatedHarness:
    def __init__(self, folder: Path):
        self.entropy = SeededEntropy()
        self.disk = SimulatedDisk()
        self.store = self.open()

    def open(self) -> ShardStore:
        return SimulatedStore(self.disk, entropy=self.entropy)

    def crash(self) -> None:
        self.store.crash()


Harness = DiskHarness | SimulatedHarness


@pytest.fixture(params=[DiskHarness, SimulatedHarness], ids=["disk", "simulated"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    made = request.param(tmp_path)
    yield made
    made.store.close()


def restart(harness: Harness) -> ShardStore:
    harness.store.close()
    harness.store = harness.open()
    return harness.store


def crash(harness: Harness) -> ShardStore:
    harness.crash()
    harness.store = harness.open()
    return harness.store


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def header_of(
    number: int, size: int, *, index: int = 0, salt: int = 0, chunk_size: int = CHUNK, session: int = 1
) -> ShardHeader:
    """A header of a 1+1 shard; `salt` makes its checksums, and so its bytes, others."""
    chunks = -(-size // chunk_size)
    return ShardHeader(
        incarnation=b"i" * 16,
        extent=ExtentId(session, number),
        index=index,
        layout=Layout(1, 1),
        size=size,
        chunk_size=chunk_size,
        checksums=tuple(content(1000 * number + 10 * chunk + salt, 16) for chunk in range(chunks)),
        version=VersionId(1, number),
        name="files/ü",
    )


def put_large(store: ShardStore, header: ShardHeader, data: bytes) -> int:
    writer = store.begin(header.stored_size)
    for chunk in range(len(header.checksums)):
        offset, length = header.piece_range(chunk)
        writer.write(chunk, data[offset : offset + length])
    return writer.finish(header)


def put_one_small(store: ShardStore, header: ShardHeader, data: bytes) -> int:
    (outcome,) = store.put_small([(header, data)])
    if isinstance(outcome, DroppexError):
        raise outcome
    return outcome


Put = Callable[[ShardStore, ShardHeader, bytes], int]
either = pytest.mark.parametrize("put", [put_large, put_one_small], ids=["large", "small"])
SIZE = 5000


def test_a_large_shard_is_read_back_piece_by_piece_with_its_checksums(harness):
    size = 2 * CHUNK + 17
    header, data = header_of(7, size), content(7, size)
    generation = put_large(harness.store, header, data)
    pieces = []
    for chunk in range(3):
        piece, checksum = harness.store.read(header.extent, 0, chunk)
        assert checksum == header.checksums[chunk]
        pieces.append(bytes(piece))
    assert b"".join(pieces) == data
    assert harness.store.header(header.extent, 0) == header
    assert harness.store.find([header.extent]) == [Holding(header.extent, 0, generation)]


@pytest.mark.parametrize("size", [1, 4096, SMALL_SIZE])
def test_a_small_shard_is_read_back_with_its_checksum(harness, size):
    header, data = header_of(7, size), content(7, size)
    generation = put_one_small(harness.store, header, data)
    piece, checksum = harness.store.read(header.extent, 0, 0)
    assert (bytes(piece), checksum) == (data, header.checksums[0])
    assert harness.store.header(header.extent, 0) == header
    assert harness.store.find([header.extent]) == [Holding(header.extent, 0, generation)]


@pytest.mark.parametrize("expected", [0, 1, 10 * CHUNK])
def test_the_expected_size_is_only_a_hint(harness, expected):
    header, data = header_of(7, SIZE), content(7, SIZE)
    writer = harness.store.begin(expected)
    writer.write(0, memoryview(data))
    writer.finish(header)
    piece, _ = restart(harness).read(header.extent, 0, 0)
    assert bytes(piece) == data


@either
def test_an_examined_shard_says_what_it_is_and_is_read_piece_by_piece(harness, put):
    header, data = header_of(7, SIZE, chunk_size=CHUNK), content(7, SIZE)
    generation = put(harness.store, header, data)
    shard = harness.store.examine(header.extent, 0)
    assert (shard.header, shard.generation) == (header, generation)
    piece, checksum = shard.read(0)
    assert (bytes(piece), checksum) == (data, header.checksums[0])
    for chunk in (-1, 1):
        with pytest.raises(NoSuchShard):
            shard.read(chunk)
    with pytest.raises(NoSuchShard):
        harness.store.examine(header.extent, 1)


@either
def test_a_shard_that_is_dropped_while_it_is_examined_is_read_to_its_end(harness, put):
    header, data = header_of(7, SIZE), content(7, SIZE)
    held = [Holding(header.extent, 0, put(harness.store, header, data))]
    shard = harness.store.examine(header.extent, 0)
    assert harness.store.drop(held) == held
    assert bytes(shard.read(0)[0]) == data
    with pytest.raises(NoSuchShard):
        harness.store.examine(header.extent, 0)


@either
def test_what_is_not_held_is_no_such_shard(harness, put):
    header = header_of(7, SIZE)
    put(harness.store, header, content(7, SIZE))
    for extent, index, chunk in ((ExtentId(9, 9), 0, 0), (header.extent, 1, 0), (header.extent, 0, 1)):
        with pytest.raises(NoSuchShard):
            harness.store.read(extent, index, chunk)
    with pytest.raises(NoSuchShard):
        harness.store.header(header.extent, 1)
    assert harness.store.find([ExtentId(9, 9)]) == []


@either
def test_the_same_bytes_again_are_the_shard_that_is_there(harness, put):
    header, data = header_of(7, SIZE), content(7, SIZE)
    generation = put(harness.store, header, data)
    assert put(harness.store, header, data) == generation
    assert put_large(harness.store, header, data) == generation
    assert put_one_small(harness.store, header, data) == generation
    assert harness.store.usage().shards == 1


@either
def test_other_bytes_under_an_identity_are_refused_and_change_nothing(harness, put):
    header, data = header_of(7, SIZE), content(7, SIZE)
    generation = put(harness.store, header, data)
    for other_put in (put_large, put_one_small):
        with pytest.raises(StoreError, match="other bytes"):
            other_put(harness.store, header_of(7, SIZE, salt=1), content(8, SIZE))
    assert harness.store.find([header.extent]) == [Holding(header.extent, 0, generation)]
    assert bytes(harness.store.read(header.extent, 0, 0)[0]) == data
    assert harness.store.read_only == ""


def test_a_store_that_is_distrusted_takes_no_writes_and_serves_what_it_has(harness):
    header, data = header_of(7, SIZE), content(7, SIZE)
    put_large(harness.store, header, data)
    harness.store.distrust("reading back failed")
    harness.store.distrust("something later")
    assert "reading back failed" in harness.store.read_only
    assert "later" not in harness.store.read_only
    for put in (put_large, put_one_small):
        with pytest.raises(StoreError, match="reading back failed"):
            put(harness.store, header_of(8, SIZE), content(8, SIZE))
    with pytest.raises(StoreError, match="reading back failed"):
        harness.store.drop(harness.store.find([header.extent]))
    assert bytes(harness.store.read(header.extent, 0, 0)[0]) == data


def test_each_of_a_group_of_small_shards_has_its_own_outcome(harness):
    first = header_of(1, SIZE)
    put_one_small(harness.store, first, content(1, SIZE))
    outcomes = harness.store.put_small(
        [
            (header_of(2, SIZE), content(2, SIZE)),
            (header_of(1, SIZE, salt=1), content(9, SIZE)),
            (header_of(3, SIZE), content(3, SIZE - 1)),
            (header_of(4, SMALL_SIZE + 1), content(4, SMALL_SIZE + 1)),
            (header_of(2, SIZE), content(2, SIZE)),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [int, StoreError, InvalidRequest, InvalidRequest, int]
    assert outcomes[4] == outcomes[0]
    assert [holding.extent.counter for holding in harness.store.page(None, 10)] == [1, 2]


def test_an_empty_group_is_nothing(harness):
    assert harness.store.put_small([]) == []


def test_a_header_that_does_not_describe_what_was_written_is_refused(harness):
    writer = harness.store.begin(0)
    writer.write(0, content(1, SIZE))
    with pytest.raises(InvalidRequest):
        writer.finish(header_of(1, SIZE + 1))
    with pytest.raises(InvalidRequest):
        writer.finish(header_of(1, CHUNK + 1))
    writer.abort()
    assert harness.store.page(None, 10) == []


def test_pieces_come_in_order(harness):
    writer = harness.store.begin(0)
    with pytest.raises(LocalProtocolError):
        writer.write(1, b"x")
    writer.abort()


def test_an_aborted_shard_is_gone_and_abort_is_idempotent(harness):
    before = harness.store.usage().shards
    writer = harness.store.begin(SIZE)
    writer.write(0, content(1, SIZE))
    writer.abort()
    writer.abort()
    with pytest.raises(StoreError):
        writer.write(1, b"x")
    with pytest.raises(StoreError):
        writer.finish(header_of(1, SIZE))
    assert harness.store.usage().shards == before
    header = header_of(2, SIZE)
    writer = harness.store.begin(SIZE)
    writer.write(0, content(2, SIZE))
    writer.finish(header)
    writer.abort()
    assert bytes(harness.store.read(header.extent, 0, 0)[0]) == content(2, SIZE)


@pytest.mark.parametrize("again", [restart, crash])
def test_what_was_finished_survives_and_what_was_not_is_forgotten(harness, again):
    large = put_large(harness.store, header_of(1, 2 * CHUNK), content(1, 2 * CHUNK))
    small = put_one_small(harness.store, header_of(2, SIZE), content(2, SIZE))
    dropped = put_large(harness.store, header_of(3, SIZE), content(3, SIZE))
    dropped_small = put_one_small(harness.store, header_of(4, SIZE), content(4, SIZE))
    harness.store.drop([Holding(ExtentId(1, 3), 0, dropped), Holding(ExtentId(1, 4), 0, dropped_small)])
    unfinished = harness.store.begin(CHUNK)
    unfinished.write(0, content(5, CHUNK))

    store = again(harness)

    assert store.page(None, 10) == [Holding(ExtentId(1, 1), 0, large), Holding(ExtentId(1, 2), 0, small)]
    assert store.usage().shards == 2
    assert bytes(store.read(ExtentId(1, 1), 0, 1)[0]) == content(1, 2 * CHUNK)[CHUNK:]
    assert bytes(store.read(ExtentId(1, 2), 0, 0)[0]) == content(2, SIZE)
    unfinished.abort()


def test_a_writer_does_not_outlive_its_store(harness):
    writer = harness.store.begin(SIZE)
    writer.write(0, content(1, SIZE))
    store = restart(harness)
    with pytest.raises(StoreError):
        writer.finish(header_of(1, SIZE))
    writer.abort()
    assert store.page(None, 10) == []


@either
def test_generations_are_never_used_again(harness, put):
    header, data = header_of(1, SIZE), content(1, SIZE)
    seen = []
    for again in (None, restart, crash, None):
        if again:
            again(harness)
        seen.append(put(harness.store, header, data))
        assert harness.store.drop([Holding(header.extent, 0, seen[-1])])
    assert sorted(set(seen)) == seen
    assert seen[-1] < 2**63


@either
def test_drop_takes_only_the_instance_it_names(harness, put):
    header, data = header_of(1, SIZE), content(1, SIZE)
    old = Holding(header.extent, 0, put(harness.store, header, data))
    assert harness.store.drop([old]) == [old]
    with pytest.raises(NoSuchShard):
        harness.store.read(header.extent, 0, 0)
    new = Holding(header.extent, 0, put(harness.store, header, data))
    never = Holding(ExtentId(9, 9), 3, 1)
    assert harness.store.drop([old, never]) == [never]
    assert bytes(harness.store.read(header.extent, 0, 0)[0]) == data
    assert harness.store.page(None, 10) == [new]


@either
def test_a_dropped_shard_may_be_put_again_with_other_bytes_and_reads_see_them(harness, put):
    store = harness.store
    generation = put(store, header_of(1, SIZE), content(1, SIZE))
    store.read(ExtentId(1, 1), 0, 0)
    store.drop([Holding(ExtentId(1, 1), 0, generation)])
    put(store, header_of(1, SIZE, salt=1), content(2, SIZE))
    piece, checksum = store.read(ExtentId(1, 1), 0, 0)
    assert bytes(piece) == content(2, SIZE)
    assert checksum == header_of(1, SIZE, salt=1).checksums[0]


def test_dropping_many_in_one_call(harness):
    held = []
    for number in range(1, 301):
        put = put_large if number % 10 == 0 else put_one_small
        generation = put(harness.store, header_of(number, 10), content(number, 10))
        held.append(Holding(ExtentId(1, number), 0, generation))
    assert harness.store.drop(held[:290]) == held[:290]
    assert harness.store.page(None, 1000) == held[290:]
    assert harness.store.usage().shards == 10


def test_pages_are_ordered_and_complete_with_large_and_small_mixed(harness):
    identities = [
        (session, number, index)
        for session in (1, 255, 256, 2**40)
        for number in (1, 2**33, 300, 7)
        for index in (0, 5, 39)
    ]
    random.Random(3).shuffle(identities)
    for position, (session, number, index) in enumerate(identities):
        header = header_of(number, 10, index=index, session=session)
        put = put_large if position % 2 else put_one_small
        put(harness.store, header, content(number, 10))
    store = restart(harness)
    seen: list[Holding] = []
    after = None
    while page := store.page(after, 7):
        assert len(page) <= 7
        seen += page
        after = (page[-1].extent, page[-1].shard)
    assert [(*holding.extent, holding.shard) for holding in seen] == sorted(identities)
    wanted = [ExtentId(256, 7), ExtentId(1, 2), ExtentId(1, 300)]
    assert store.find(wanted) == [
        holding for extent in wanted for holding in seen if holding.extent == extent
    ]


def test_usage_counts_shards_and_bytes(harness):
    before = harness.store.usage()
    assert 0 < before.free <= before.capacity
    assert before.shards == 0
    put_large(harness.store, header_of(1, CHUNK), content(1, CHUNK))
    put_one_small(harness.store, header_of(2, SIZE), content(2, SIZE))
    assert harness.store.usage().shards == 2


def test_each_start_names_the_one_before(harness):
    first = harness.store.identity
    assert (len(first.pool_id), len(first.boot_id), first.previous_boot_id) == (16, 16, b"")
    second = restart(harness).identity
    third = crash(harness).identity
    assert second.previous_boot_id == first.boot_id
    assert third.previous_boot_id == second.boot_id
    assert len({first.boot_id, second.boot_id, third.boot_id}) == 3
    assert first.pool_id == second.pool_id == third.pool_id


def test_a_pool_joins_one_cluster_for_ever(harness):
    assert harness.store.identity.cluster_id == b""
    harness.store.join(b"c" * 16)
    harness.store.join(b"c" * 16)
    assert crash(harness).identity.cluster_id == b"c" * 16
    for other in (b"d" * 16, b"short", b""):
        with pytest.raises(IdentityError):
            harness.store.join(other)
    assert harness.store.identity.cluster_id == b"c" * 16


def test_a_store_is_open_once(harness):
    with pytest.raises(IdentityError, match="in use"):
        harness.open()
    assert harness.store.usage().shards == 0


def test_a_closed_store_refuses_everything(harness):
    generation = put_one_small(harness.store, header_of(1, SIZE), content(1, SIZE))
    put_large(harness.store, header_of(2, SIZE), content(2, SIZE))
    harness.store.read(ExtentId(1, 2), 0, 0)
    harness.store.close()
    harness.store.close()
    for number in (1, 2):
        with pytest.raises(StoreError):
            harness.store.read(ExtentId(1, number), 0, 0)
    with pytest.raises(StoreError):
        harness.store.page(None, 1)
    with pytest.raises(StoreError):
        harness.store.find([ExtentId(1, 1)])
    with pytest.raises(StoreError):
        harness.store.examine(ExtentId(1, 1), 0)
    with pytest.raises(StoreError):
        harness.store.drop([Holding(ExtentId(1, 1), 0, generation)])
    with pytest.raises(StoreError):
        put_one_small(harness.store, header_of(3, SIZE), content(3, SIZE))
    with pytest.raises(StoreError):
        put_large(harness.store, header_of(4, SIZE), content(4, SIZE))


def test_puts_reads_and_drops_at_once_see_whole_shards(harness):
    """Threads put, read and drop the same few identities; every read is whole or NoSuchShard."""
    store = harness.store
    numbers = range(1, 7)
    failures: list[BaseException] = []

    def check(number: int) -> None:
        try:
            piece, checksum = store.read(ExtentId(1, number), 0, 0)
        except NoSuchShard:
            return
        assert bytes(piece) == content(number, SIZE)
        assert checksum == header_of(number, SIZE).checksums[0]

    def work(seed: int) -> None:
        choices = random.Random(seed)
        try:
            for _ in range(60):
                number = choices.choice(numbers)
                match choices.randrange(4):
                    case 0:
                        put_large(store, header_of(number, SIZE), content(number, SIZE))
                    case 1:
                        put_one_small(store, header_of(number, SIZE), content(number, SIZE))
                    case 2:
                        held = store.find([ExtentId(1, number)])
                        assert set(store.drop(held)) <= set(held)
                    case _:
                        check(number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    held = harness.store.page(None, 100)
    assert len({(holding.extent, holding.shard) for holding in held}) == len(held)
    for holding in held:
        check(holding.extent.counter)
    assert crash(harness).page(None, 100) == held


@either
def test_a_damaged_instance_is_replaced_under_its_identity_and_stays_so_after_a_crash(harness, put):
    header, data = header_of(1, SIZE), content(1, SIZE)
    old = put(harness.store, header, data)
    harness.store.read(header.extent, 0, 0)
    mended, mended_data = header_of(1, SIZE, salt=5), content(2, SIZE)
    writer = harness.store.begin(SIZE)
    writer.write(0, mended_data)
    new = writer.finish(mended, replacing=old)
    assert new != old
    for again in (lambda one: one.store, crash, restart):
        store = again(harness)
        piece, checksum = store.read(header.extent, 0, 0)
        assert (bytes(piece), checksum) == (mended_data, mended.checksums[0])
        assert store.page(None, 10) == [Holding(header.extent, 0, new)]
        assert store.usage().shards == 1
    assert harness.store.drop([Holding(header.extent, 0, old)]) == []
    assert harness.store.drop([Holding(header.extent, 0, new)]) == [Holding(header.extent, 0, new)]
    assert restart(harness).page(None, 10) == []


def test_only_the_instance_that_is_named_is_replaced(harness):
    header, data = header_of(1, SIZE), content(1, SIZE)
    old = put_large(harness.store, header, data)
    writer = harness.store.begin(SIZE)
    writer.write(0, data)
    with pytest.raises(StoreError, match="other bytes"):
        writer.finish(header_of(1, SIZE, salt=5), replacing=old + 1)
    assert bytes(harness.store.read(header.extent, 0, 0)[0]) == data


def test_what_is_remembered_of_a_subject_is_recalled_also_after_a_crash(harness):
    assert harness.store.recall("scrub") is None
    notes = [
        {},
        {"text": "ü", "number": 2**60, "part": 0.1, "list": [1, None, {"deep": True}]},
        {"number": 2},
    ]
    for fields in notes:
        harness.store.remember("scrub", fields)
        harness.store.remember("other", {"of": "another"})
        for again in (lambda one: one.store, crash, restart):
            assert again(harness).recall("scrub") == fields
            assert harness.store.recall("other") == {"of": "another"}


@pytest.mark.parametrize(
    ("subject", "fields"),
    [("pool", {}), ("boot", {}), ("../scrub", {}), ("", {}), ("scrub", {"text": "x" * NOTE_BYTES})],
)
def test_only_small_notes_of_plain_subjects_are_remembered(harness, subject, fields):
    with pytest.raises(LocalProtocolError):
        harness.store.remember(subject, fields)


def test_a_closed_store_neither_remembers_nor_recalls(harness):
    harness.store.close()
    with pytest.raises(StoreError):
        harness.store.recall("scrub")
    if isinstance(harness, SimulatedHarness):
        with pytest.raises(StoreError):
            harness.store.remember("scrub", {})
