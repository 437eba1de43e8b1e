"""The faults that can be planted in a simulated disk, and that it repeats itself."""

import random

import pytest

from droppexd.errors import IntegrityError, NoSuchShard, StoreError, StoreFull
from droppexd.model import ExtentId, Holding, Layout, ShardHeader, VersionId
from droppexd.store.simulated import SimulatedDisk, SimulatedStore

EXTENT = ExtentId(1, 1)


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes: int) -> bytes:
        return self.random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)


def header_of(extent: ExtentId = EXTENT, size: int = 10) -> ShardHeader:
    return ShardHeader(
        incarnation=b"i" * 16,
        extent=extent,
        index=0,
        layout=Layout(1, 0),
        size=size,
        chunk_size=size,
        checksums=(b"c" * 16,),
        version=VersionId(1, 1),
    )


@pytest.fixture
def disk():
    return SimulatedDisk(capacity=100_000)


@pytest.fixture
def store(disk):
    return SimulatedStore(disk, entropy=SeededEntropy())


def test_a_flipped_piece_differs_in_one_bit(disk, store):
    store.put_small([(header_of(), b"0123456789")])
    disk.flip_piece(EXTENT, 0, 0)
    piece, checksum = store.read(EXTENT, 0, 0)
    assert sum((a ^ b).bit_count() for a, b in zip(piece, b"0123456789", strict=True)) == 1
    assert checksum == b"c" * 16
    disk.flip_piece(EXTENT, 0, 0)
    assert store.read(EXTENT, 0, 0)[0] == b"0123456789"


def test_a_flipped_checksum_leaves_the_piece_alone(disk, store):
    store.put_small([(header_of(), b"0123456789")])
    disk.flip_checksum(EXTENT, 0)
    piece, checksum = store.read(EXTENT, 0, 0)
    assert piece == b"0123456789"
    assert checksum != b"c" * 16
    assert store.header(EXTENT, 0).checksums == (checksum,)


def test_a_damaged_header_is_an_integrity_error_and_can_be_dropped(disk, store):
    (generation,) = store.put_small([(header_of(), b"0123456789")])
    disk.damage_header(EXTENT, 0)
    with pytest.raises(IntegrityError):
        store.read(EXTENT, 0, 0)
    with pytest.raises(IntegrityError):
        store.header(EXTENT, 0)
    held = [Holding(EXTENT, 0, generation)]
    assert store.page(None, 10) == held
    assert store.drop(held) == held


def test_faults_are_planted_only_where_there_is_a_shard(disk):
    with pytest.raises(NoSuchShard):
        disk.flip_piece(EXTENT, 0, 0)


def test_a_failed_flush_turns_this_start_read_only(disk, store):
    store.put_small([(header_of(), b"0123456789")])
    disk.fail_flush()
    writer = store.begin(10)
    writer.write(0, bytes(10))
    with pytest.raises(StoreError, match="read-only"):
        writer.finish(header_of(ExtentId(1, 2)))
    assert store.read_only
    (outcome,) = store.put_small([(header_of(ExtentId(1, 3)), bytes(10))])
    assert isinstance(outcome, StoreError)
    with pytest.raises(StoreError):
        store.begin(0)
    with pytest.raises(StoreError):
        store.drop(store.page(None, 1))
    assert store.read(EXTENT, 0, 0)[0] == b"0123456789"
    store.crash()
    again = SimulatedStore(disk, entropy=SeededEntropy())
    assert again.read_only == ""
    assert [holding.extent for holding in again.page(None, 10)] == [EXTENT]


def test_a_full_disk_refuses_and_gives_room_back(disk, store):
    free = store.usage().free
    writer = store.begin(0)
    writer.write(0, bytes(90_000))
    with pytest.raises(StoreFull):
        store.begin(90_000)
    with pytest.raises(StoreFull):
        writer.write(1, bytes(90_000))
    assert store.usage().free == free
    writer = store.begin(0)
    writer.write(0, bytes(90_000))
    generation = writer.finish(header_of(size=90_000))
    (outcome,) = store.put_small([(header_of(ExtentId(1, 2), size=6000), bytes(6000))])
    assert isinstance(outcome, StoreFull)
    store.drop([Holding(EXTENT, 0, generation)])
    assert store.usage().free == free


def test_one_seed_gives_one_identity_and_the_same_generations():
    def run() -> tuple[object, ...]:
        store = SimulatedStore(SimulatedDisk(), entropy=SeededEntropy())
        return (store.identity, store.put_small([(header_of(), bytes(10))]))

    assert run() == run()


def test_a_piece_that_cannot_be_read_is_an_integrity_error_until_it_can(disk, store):
    store.put_small([(header_of(), b"0123456789")])
    disk.unreadable.add((EXTENT, 0))
    with pytest.raises(IntegrityError):
        store.read(EXTENT, 0, 0)
    assert store.header(EXTENT, 0).size == 10
    disk.unreadable.clear()
    assert store.read(EXTENT, 0, 0)[0] == b"0123456789"


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_when_power_fails_between_write_and_flush_nothing_is_acknowledged_and_some_is_there(
    disk, store, kept
):
    lost = []
    disk.fail_power(kept, lambda: lost.append("now"))
    shards = [(header_of(ExtentId(1, number)), bytes(10)) for number in range(1, 4)]
    assert all(isinstance(outcome, StoreError) for outcome in store.put_small(shards))
    assert lost == ["now"]
    with pytest.raises(StoreError):
        store.usage()
    again = SimulatedStore(disk, entropy=SeededEntropy())
    assert [holding.extent.counter for holding in again.page(None, 10)] == [1, 2, 3][:kept]
    again.put_small([(header_of(ExtentId(1, 9)), bytes(10))])
    assert lost == ["now"]


@pytest.mark.parametrize("kept", [0, 1])
def test_when_power_fails_a_large_shard_is_there_whole_or_not_at_all(disk, store, kept):
    disk.fail_power(kept, lambda: None)
    writer = store.begin(10)
    writer.write(0, bytes(10))
    with pytest.raises(StoreError):
        writer.finish(header_of())
    again = SimulatedStore(disk, entropy=SeededEntropy())
    assert len(again.page(None, 10)) == kept
    assert disk.free() == 100_000 - disk.taken_bytes


@pytest.mark.parametrize("kept", [0, 1])
def test_when_power_fails_while_dropping_some_are_gone(disk, store, kept):
    generations = store.put_small([(header_of(ExtentId(1, number)), bytes(10)) for number in (1, 2)])
    disk.fail_power(kept, lambda: None)
    with pytest.raises(StoreError):
        store.drop([Holding(ExtentId(1, n), 0, generation) for n, generation in enumerate(generations, 1)])
    assert len(disk.shards) == 2 - kept


def test_a_restored_disk_is_what_it_was(disk, store):
    store.put_small([(header_of(), b"0123456789")])
    before = disk.snapshot()
    boot_id = store.identity.boot_id
    store.put_small([(header_of(ExtentId(1, 2)), bytes(10))])
    disk.flip_piece(EXTENT, 0, 0)
    store.crash()
    disk.restore(before)
    again = SimulatedStore(disk, entropy=SeededEntropy())
    assert again.identity.previous_boot_id == boot_id
    assert [holding.extent for holding in again.page(None, 10)] == [EXTENT]
    assert again.read(EXTENT, 0, 0)[0] == b"0123456789"
    disk.flip_piece(EXTENT, 0, 0)
    assert before.shards[EXTENT, 0].pieces == [b"0123456789"]


def test_a_slow_disk_is_noticed_by_reads_and_flushes(disk, store):
    accesses = []
    disk.on_access = lambda: accesses.append("slow")
    store.put_small([(header_of(), bytes(10))])
    store.read(EXTENT, 0, 0)
    assert accesses == ["slow", "slow"]
