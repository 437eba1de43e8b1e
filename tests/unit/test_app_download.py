"""One read against pools that are late, wrong or gone, on a simulated network."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from droppexd.coding import encode_chunk
from droppexd.errors import NoSuchShard, NotEnoughShards, NotFound, PeerBusy, StaleRead
from droppexd.model import (
    MISSING,
    ClusterMap,
    Extent,
    ExtentId,
    Layout,
    PoolInfo,
    Role,
    Version,
    VersionId,
    chunk_count,
)
from droppexd.roles.app_download import PIECE_S, Download, Reader
from droppexd.roles.app_reporter import Reporter
from droppexd.roles.app_session import MapView
from droppexd.roles.master import MasterLink
from droppexd.roles.suspects import SUSPECT_S, Suspects
from droppexd.wire.messages import Found, Lookup, Piece, ReadPiece

CHUNK = 1000
LAYOUT = Layout(3, 2)
CONTENT = bytes(place * 7 % 251 for place in range(10 * CHUNK - 17))
PARTS = 10


class Pool:
    """Serves what it holds; `late_s` and `error` are its faults."""

    def __init__(self):
        self.pieces = {}
        self.reads = []
        self.late_s = 0.0
        self.error = None
        self.damage = None

    async def read(self, _call, request, _body):
        chunks = range(request.chunk, request.chunk + request.count)
        self.reads.extend((request.index, chunk) for chunk in chunks)
        await trio.sleep(self.late_s)
        if self.error is not None:
            raise self.error
        held = [self.pieces.get((request.extent, request.index, chunk)) for chunk in chunks]
        if None in held:
            raise NoSuchShard("not here")
        if self.damage is not None:
            held = [self.damage(piece, checksum) for piece, checksum in held]
        checksums = tuple(checksum for _, checksum in held)
        return Piece(checksum=checksums[0], following=checksums[1:]), [piece for piece, _ in held]


class Scene:
    """Five pools with one extent, the app's reader, and the master."""

    def __init__(self, stage):
        self.stage = stage
        self.pools = {number: Pool() for number in range(1, 8)}
        self.addresses = {}
        self.found = None
        self.lookups = []
        self.reader = None
        self.registration = None

    async def open(self):
        for number, pool in self.pools.items():
            self.addresses[number] = await self.stage.serve(f"pool-{number}", {ReadPiece: pool.read})
        controller = await self.stage.serve("controller", {Lookup: self._look_up}, role=Role.CONTROLLER)
        connections = await self.stage.connections("app")
        self.registration = SimpleNamespace(view=MapView(self.map_with()))
        self.reader = Reader(
            connections,
            self.registration,
            MasterLink(connections, [controller], self.stage.runtime),
            self.stage.runtime,
            Suspects(self.stage.runtime.clock),
            Reporter(connections, self.stage.runtime.clock),
        )
        extent = Extent(
            id=ExtentId(1, 1), layout=LAYOUT, size=len(CONTENT), chunk_size=CHUNK, pools=(1, 2, 3, 4, 5)
        )
        for chunk in range(chunk_count(extent.size, CHUNK)):
            encoded = encode_chunk(extent.id, LAYOUT, chunk, CONTENT[chunk * CHUNK : (chunk + 1) * CHUNK])
            for index, (piece, checksum) in enumerate(zip(*encoded, strict=True)):
                self.pools[index + 1].pieces[extent.id, index, chunk] = (bytes(piece), checksum)
        version = Version(id=VersionId(1, 2), size=len(CONTENT), blake3=bytes(32), extents=(extent.id,))
        self.found = Found(name="a/b", version=version, extents=(extent,))
        return self

    def map_with(self, **states):
        pools = tuple(
            PoolInfo(
                number=number,
                pool_id=bytes(16),
                name=f"pool-{number}",
                machine="m",
                zone="",
                address=address,
                state=states.get(f"pool_{number}", "up"),
                membership="member",
                capacity=1,
                free=1,
            )
            for number, address in self.addresses.items()
        )
        return ClusterMap(cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=pools)

    async def _look_up(self, _call, request, _body):
        self.lookups.append(request)
        if self.found is None:
            raise NotFound("gone")
        return self.found

    def placed_on(self, *pools):
        """What the master says now: the shards are on these pools."""
        return replace(self.found, extents=(replace(self.found.extents[0], pools=pools, edition=1),))

    async def read(self, start=0, length=None, parts=None):
        download = Download(self.reader, self.found, start, length)
        frames, rebuilt = [], 0
        for part in range(download.parts if parts is None else parts):
            found, was_rebuilt = await download.read_parts(part)
            frames += found
            rebuilt += was_rebuilt
        return b"".join(frames), rebuilt

    def reads_of(self, *numbers):
        return sum(len(self.pools[number].reads) for number in numbers)


def scene(play, body):
    async def story(stage):
        await body(await Scene(stage).open())

    play(story)


def test_nothing_is_decoded_when_nothing_is_wrong(play):
    async def body(one):
        assert await one.read() == (CONTENT, 0)
        assert [len(one.pools[number].reads) for number in range(1, 6)] == [PARTS] * 3 + [0, 0]
        assert not one.lookups

    scene(play, body)


def test_one_piece_is_read_from_one_pool(play):
    async def body(one):
        for _ in range(2):  # The second time over a connection that is there already.
            assert await one.read(400, 5) == (CONTENT[400:405], 0)
        assert one.reads_of(1, 3, 4, 5) == 0
        assert one.reads_of(2) == 2

    scene(play, body)


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_pools_that_are_gone_cost_a_rebuild_and_are_asked_last_then(play, how, connected):
    async def body(one):
        if connected:
            await one.read()
        for number in (1, 3):
            getattr(one.stage.network, how)(f"pool-{number}")
        with trio.fail_after(PIECE_S / 2):
            assert await one.read() == (CONTENT, PARTS)
            assert await one.read(10, 20) == (CONTENT[10:30], 1)

    scene(play, body)


def flipped(piece, checksum):
    return bytes([piece[0] ^ 1]) + piece[1:], checksum


def short(piece, checksum):
    return piece[:-1], checksum


def other_checksum(piece, checksum):
    return piece, flipped(checksum, b"")[0]


@pytest.mark.parametrize("damage", [flipped, short, other_checksum])
@pytest.mark.parametrize("length", [5, None])
def test_wrong_bytes_are_never_handed_on(play, damage, length):
    async def body(one):
        one.pools[1].damage = one.pools[2].damage = damage
        content, rebuilt = await one.read(0, length)
        assert content == CONTENT[:length]
        assert rebuilt

    scene(play, body)


def test_a_late_piece_is_replaced_and_its_pool_asked_last_for_a_while(play):
    async def body(one):
        await one.read()
        one.pools[2].late_s = 15.0
        before = trio.current_time()
        assert await one.read() == (CONTENT, PARTS)
        assert trio.current_time() - before < 5
        asked = one.reads_of(2)
        assert asked == PARTS + 1
        one.pools[2].late_s = 0.0
        await trio.sleep(SUSPECT_S + 15)
        assert await one.read() == (CONTENT, 0)

    scene(play, body)


def test_a_pool_that_helped_out_is_not_suspected_for_it(play):
    async def body(one):
        await one.read()
        one.pools[1].late_s = one.pools[2].late_s = 0.3
        one.pools[4].late_s = 0.35
        await one.read(parts=1)
        suspects = {number for number in range(1, 6) if number in one.reader._suspects}
        assert suspects <= {1, 2}

    scene(play, body)


def test_late_reads_have_a_budget_and_waiting_is_right_when_it_is_spent(play):
    async def body(one):
        await one.read()
        for pool in one.pools.values():
            pool.late_s = 3.0
        for _ in range(4):
            assert (await one.read())[0] == CONTENT
        healthy = 4 * PARTS * 3
        extra = one.reads_of(1, 2, 3, 4, 5) - PARTS * 3 - healthy
        assert extra <= 8 + (healthy + PARTS * 3) * 0.05 + 1

    scene(play, body)


def test_a_pool_that_hangs_while_others_answer_is_read_around_even_when_the_budget_is_spent(play):
    async def body(one):
        await one.read()
        while one.reader._pace.take_extra():
            pass
        one.pools[2].late_s = 15.0
        before = trio.current_time()
        assert (await one.read(parts=1))[1] == 1
        assert trio.current_time() - before < 5

    scene(play, body)


def test_too_many_lost_pools_are_named_with_what_is_wrong(play):
    async def body(one):
        one.found = one.placed_on(1, MISSING, 3, 99, 5)
        one.pools[3].pieces.clear()
        one.registration.view = MapView(one.map_with(pool_5="down"))
        one.stage.network.kill("pool-5")
        with pytest.raises(NotEnoughShards) as caught:
            await one.read()
        assert "only 1 of the 3 shards" in str(caught.value)
        assert caught.value.missing == (
            "extent 1-1 shard 1: missing",
            "extent 1-1 shard 2: not on pool-3",
            "extent 1-1 shard 3: pool 99 is unknown",
            f"extent 1-1 shard 4: pool-5 is down: {one.addresses[5]} is not reachable",
        )
        assert len(one.lookups) == 1

    scene(play, body)


def test_pools_that_the_map_calls_down_are_asked_when_nothing_else_is_left(play):
    async def body(one):
        one.found = one.placed_on(1, 2, 3, MISSING, MISSING)
        one.registration.view = MapView(one.map_with(pool_1="down", pool_3="down"))
        assert await one.read() == (CONTENT, 0)

    scene(play, body)


def test_pools_that_the_map_calls_down_are_left_alone_while_others_will_do(play):
    async def body(one):
        one.registration.view = MapView(one.map_with(pool_1="down", pool_3="down"))
        assert await one.read() == (CONTENT, PARTS)
        assert not one.reads_of(1, 3)

    scene(play, body)


def test_a_busy_pool_is_as_good_as_a_lost_one(play):
    async def body(one):
        one.pools[1].error = PeerBusy("come later")
        assert await one.read(0, 5) == (CONTENT[:5], 1)

    scene(play, body)


def test_shards_that_moved_meanwhile_are_found_again(play):
    async def body(one):
        download = Download(one.reader, one.found, 0, None)
        await download.read_parts(0)
        for number in (1, 2, 3):
            one.pools[number + 4].pieces.update(one.pools[number].pieces)
            if number != 1:
                one.pools[number].pieces.clear()
        one.pools[5].pieces = {**one.pools[5].pieces, **one.pools[1].pieces}
        one.pools[4].pieces.clear()
        one.found = one.placed_on(1, 6, 7, MISSING, 5)
        frames, rebuilt = await download.read_parts(1)
        assert (b"".join(frames), rebuilt) == (CONTENT[CHUNK : 2 * CHUNK], False)
        assert [request.version for request in one.lookups] == [VersionId(1, 2)]

    scene(play, body)


def test_a_file_that_was_removed_while_it_was_read_is_stale(play):
    async def body(one):
        download = Download(one.reader, one.found, 0, None)
        await download.read_parts(0)
        for number in (1, 2, 3):
            one.pools[number].pieces.clear()
        one.found = None
        with pytest.raises(StaleRead):
            await download.read_parts(1)

    scene(play, body)


def test_reads_that_were_given_up_leave_nothing_behind(play):
    async def body(one):
        for pool in one.pools.values():
            pool.late_s = 10.0
        with trio.move_on_after(1):
            await one.read()
        for pool in one.pools.values():
            pool.late_s = 0.0
        assert (await one.read())[0] == CONTENT

    scene(play, body)
