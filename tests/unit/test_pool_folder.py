"""The check of a stopped pool's folder, over a folder that is only imagined."""

import random

import pytest

from droppexd.coding import piece_checksum
from droppexd.errors import StoreError
from droppexd.model import ExtentId, Layout, ShardHeader, VersionId
from droppexd.roles.pool_check import ShardState
from droppexd.roles.pool_folder import MOST_FINDINGS, check_folder
from droppexd.store.simulated import SimulatedDisk, SimulatedStore

SIZE = 100


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self.random.uniform(low, high)


class ImaginedPool:
    """A simulated store, some shards of which the index does not list."""

    def __init__(self, held, unlisted=()):
        self.disk = SimulatedDisk()
        self.store = SimulatedStore(self.disk, entropy=SeededEntropy())
        self.hidden = set(unlisted)
        self.lines = []
        self.page_error = None
        self.shards = held
        for number in [*range(1, held + 1), *unlisted]:
            extent, piece = ExtentId(1, number), random.Random(number).randbytes(SIZE)
            header = ShardHeader(
                incarnation=bytes(16),
                extent=extent,
                index=0,
                layout=Layout(1, 1),
                size=SIZE,
                chunk_size=SIZE,
                checksums=(piece_checksum(extent, Layout(1, 1), 0, 0, piece),),
                version=VersionId(1, number),
                name=f"files/{number}",
            )
            self.store.put_small([(header, piece)])

    def complaints(self):
        return self.lines

    def page(self, after, limit):
        if self.page_error is not None and after is not None:
            raise self.page_error
        return [held for held in self.store.page(after, limit) if held.extent.counter not in self.hidden]

    def find(self, extents):
        return [held for held in self.store.find(extents) if held.extent.counter not in self.hidden]

    def examine(self, extent, index):
        return self.store.examine(extent, index)

    def unlisted(self):
        for number in sorted(self.hidden):
            if number < 0:
                raise StoreError("cannot list the large shards")
            yield ExtentId(1, number), 0


def check(pool):
    seen = []
    report = check_folder(pool, lambda so_far, listed: seen.append((so_far.shards, listed)))
    assert seen[0] == (0, 0)
    assert seen == sorted(seen)
    return report


def test_a_sound_folder_is_sound():
    report = check(ImaginedPool(500))
    assert report.sound
    assert (report.shards, report.size, report.unlisted, report.findings) == (500, 500 * SIZE, 0, [])


def test_damaged_shards_are_found_listed_or_not():
    pool = ImaginedPool(500, unlisted=(900, 901))
    pool.disk.flip_piece(ExtentId(1, 300), 0, 0)
    pool.disk.damage_header(ExtentId(1, 901), 0)
    report = check(pool)
    assert not report.sound
    assert (report.shards, report.unlisted) == (502, 1)
    assert report.states == {ShardState.DAMAGED: 2}
    assert [(found.extent.counter, found.name) for found in report.findings] == [
        (300, "files/300"),
        (901, ""),
    ]


def test_a_shard_that_is_listed_and_not_there_is_absent():
    pool = ImaginedPool(3)
    gone = ImaginedPool(0)
    pool.examine = lambda extent, index: (gone if extent.counter == 2 else pool).store.examine(extent, index)
    assert check(pool).states == {ShardState.ABSENT: 1}


def test_complaints_and_what_cannot_be_listed_are_problems():
    pool = ImaginedPool(500)
    pool.lines = ["boot.json is missing"]
    pool.page_error = StoreError("the database is damaged here")
    pool.hidden = {-1}
    report = check(pool)
    assert not report.sound
    assert report.shards == 200
    assert report.problems == [
        "boot.json is missing",
        "the index cannot be read to its end: the database is damaged here",
        "cannot list the large shards",
    ]


@pytest.mark.parametrize("more", [0, 7])
def test_findings_beyond_the_most_are_only_counted(more):
    pool = ImaginedPool(MOST_FINDINGS + more)
    for number in range(1, MOST_FINDINGS + more + 1):
        pool.disk.damage_header(ExtentId(1, number), 0)
    report = check(pool)
    assert report.states == {ShardState.DAMAGED: MOST_FINDINGS + more}
    assert len(report.findings) == MOST_FINDINGS
