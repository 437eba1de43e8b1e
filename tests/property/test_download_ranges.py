"""Any range of any file is exactly those bytes, whichever m pieces are missing or wrong."""

from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.coding import encode_chunk
from droppexd.errors import InvalidRequest, NoSuchShard, PeerError
from droppexd.model import (
    ClusterMap,
    Extent,
    ExtentId,
    Layout,
    PoolInfo,
    Version,
    VersionId,
    chunk_count,
    piece_size,
)
from droppexd.roles.app_download import Download, Reader
from droppexd.roles.app_session import MapView
from droppexd.roles.suspects import Suspects
from droppexd.wire.messages import MOST_TOGETHER, Found, GetData, Piece

relaxed = settings(deadline=None, max_examples=200)
POOLS = 7


class StoredFile:
    """A file cut into extents of various layouts, chunk sizes and lengths, coded, on pools 1, 2, ..."""

    def __init__(self, shapes):
        self.content = b""
        self.extents = []
        self.pieces = {}
        for number, (k, m, chunk_size, size) in enumerate(shapes, 1):
            data = bytes((number * 31 + place * 7) % 256 for place in range(size))
            extent = Extent(
                id=ExtentId(1, number),
                layout=Layout(k, m),
                size=size,
                chunk_size=chunk_size,
                pools=tuple(range(1, k + m + 1)),
            )
            for chunk in range(chunk_count(size, chunk_size)):
                part = data[chunk * chunk_size : (chunk + 1) * chunk_size]
                encoded = encode_chunk(extent.id, extent.layout, chunk, part)
                for index, (piece, checksum) in enumerate(zip(*encoded, strict=True)):
                    self.pieces[extent.id, index, chunk] = (bytes(piece), checksum)
            self.extents.append(extent)
            self.content += data

    def found(self):
        version = Version(
            id=VersionId(1, 1),
            size=len(self.content),
            blake3=bytes(32),
            extents=tuple(extent.id for extent in self.extents),
        )
        return Found(name="a/b", version=version, extents=tuple(self.extents))


class Answered:
    """A request that has its answer."""

    done = True

    def __init__(self, answer):
        self._answer = answer

    async def settled(self, timeout_s):
        return True

    async def answer(self):
        await trio.lowlevel.checkpoint()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def abandon(self):
        pass


class Connections:
    """Pools in memory. `faults` says what is wrong with pools, `wrong` which (shard, chunk) have a bit flipped."""

    def __init__(self, stored, faults, wrong=()):
        self._stored = stored
        self._faults = faults
        self._wrong = wrong

    def connected(self, address):
        return True

    async def connect(self, address, *, timeout_s):
        await trio.lowlevel.checkpoint()

    def begin(self, address, request, *, timeout_s):
        fault = self._faults.get(int(address))
        if fault == "unreachable":
            raise PeerError("gone")
        if fault == "lost":
            return Answered(PeerError("lost"))
        if fault == "not there":
            return Answered(NoSuchShard("no"))
        chunks = range(request.chunk, request.chunk + request.count)
        held = [self._read(request.extent, request.index, chunk, fault) for chunk in chunks]
        checksums = tuple(checksum for _, checksum in held)
        return Answered((Piece(checksum=checksums[0], following=checksums[1:]), [piece for piece, _ in held]))

    def _read(self, extent, index, chunk, fault):
        piece, checksum = self._stored.pieces[extent, index, chunk]
        if fault == "flipped" or (index, chunk) in self._wrong:
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        if fault == "short":
            piece = piece[:-1]
        if fault == "other piece":
            piece, checksum = self._stored.pieces[extent, (index + 1) % 2, chunk]
        return piece, checksum


def reader_of(stored, faults, wrong=()):
    pools = tuple(
        PoolInfo(
            number=number,
            pool_id=bytes(16),
            name=f"pool-{number}",
            machine="m",
            zone="",
            address=str(number),
            state="up",
            membership="member",
            capacity=1,
            free=1,
        )
        for number in range(1, POOLS + 1)
    )
    cluster = ClusterMap(cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=pools)
    clock = SimpleNamespace(now=trio.current_time)
    return Reader(
        Connections(stored, faults, wrong),
        SimpleNamespace(view=MapView(cluster)),
        None,
        SimpleNamespace(clock=clock, run_blocking=trio.to_thread.run_sync),
        Suspects(clock),
        SimpleNamespace(note=lambda *_: None),
    )


async def read_all(download, together=1):
    parts, rebuilt, part = [], 0, 0
    while part < download.parts:
        count = min(together, download.together, download.parts - part)
        frames, was_rebuilt = await download.read_parts(part, count)
        assert frames
        assert len(frames) <= GetData.body_frames
        assert all(len(frame) for frame in frames)
        assert 0 <= was_rebuilt <= count
        parts += frames
        rebuilt += was_rebuilt
        part += count
    return b"".join(parts), rebuilt


def check(stored, start, length, faults, together=1, wrong=()):
    async def main():
        if start > len(stored.content):
            with pytest.raises(InvalidRequest):
                Download(reader_of(stored, faults), stored.found(), start, length)
            return 0
        download = Download(reader_of(stored, faults, wrong), stored.found(), start, length)
        expected = stored.content[start:] if length is None else stored.content[start : start + length]
        assert (download.start, download.end) == (start, start + len(expected))
        content, rebuilt = await read_all(download, together)
        assert content == expected
        for part, count in ((-1, 1), (download.parts, 1), (0, download.parts + 1), (0, MOST_TOGETHER + 1)):
            with pytest.raises(InvalidRequest):
                await download.read_parts(part, count)
        return rebuilt

    return trio.run(main)


def shapes_of(least_parity):
    shape = st.tuples(
        st.integers(1, 5), st.integers(least_parity, 2), st.integers(1, 16), st.integers(1, 60)
    ).map(lambda one: (*one[:3], min(one[3], 64 * one[2])))  # At most 64 chunks in an extent.
    return st.lists(shape, max_size=4)


starts = st.integers(0, 250)
lengths = st.none() | st.integers(0, 250) | st.just(2**62)
togethers = st.integers(1, MOST_TOGETHER)
faults = st.sampled_from(["unreachable", "lost", "not there", "flipped", "short", "other piece"])


@relaxed
@given(shapes_of(0), starts, lengths, togethers)
def test_parts_together_are_the_range(shapes, start, length, together):
    assert check(StoredFile(shapes), start, length, {}, together) == 0


@relaxed
@given(shapes_of(2), starts, lengths, togethers, st.dictionaries(st.integers(1, POOLS), faults, max_size=2))
def test_the_range_is_right_whichever_pieces_are_not(shapes, start, length, together, faults):
    check(StoredFile(shapes), start, length, faults, together)


@relaxed
@given(shapes_of(2), starts, lengths, togethers, st.randoms(use_true_random=False))
def test_the_range_is_right_when_other_shards_are_wrong_in_each_chunk(
    shapes, start, length, together, random
):
    shards = min((k + m for k, m, _, _ in shapes), default=3)
    wrong = {(index, chunk) for chunk in range(64) for index in random.sample(range(shards), 2)}
    check(StoredFile(shapes), start, length, {}, together, wrong)


def test_a_range_within_one_piece_asks_one_pool_only():
    stored = StoredFile([(4, 2, 16, 60)])
    asked = []

    class Counting(Connections):
        def begin(self, address, request, *, timeout_s):
            asked.append(request.index)
            return super().begin(address, request, timeout_s=timeout_s)

    async def main():
        reader = reader_of(stored, {})
        reader._connections = Counting(stored, {})
        download = Download(reader, stored.found(), 21, 2)
        assert await read_all(download) == (stored.content[21:23], 0)

    trio.run(main)
    assert piece_size(16, 4) == 4
    assert asked == [1]


def test_whole_pieces_are_handed_on_without_a_copy():
    stored = StoredFile([(4, 2, 16, 16)])

    async def main():
        download = Download(reader_of(stored, {}), stored.found(), 0, None)
        frames, _ = await download.read_parts(0)
        for index, frame in enumerate(frames):
            assert frame is stored.pieces[ExtentId(1, 1), index, 0][0]

    trio.run(main)
