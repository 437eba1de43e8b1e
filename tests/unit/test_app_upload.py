"""One put against pools that fail, stall and come back, on a simulated network."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio
from blake3 import blake3

from droppexd.coding import chunk_checksum, piece_checksum, rebuild_pieces
from droppexd.errors import (
    ClusterFull,
    Conflict,
    DroppexError,
    IntegrityError,
    NotEnoughShards,
    PeerError,
    RemoteProtocolError,
    StoreFull,
)
from droppexd.model import (
    DISK_FULL,
    MISSING,
    ClusterMap,
    ExtentId,
    Layout,
    PoolInfo,
    Receipt,
    Role,
    chunk_length,
)
from droppexd.roles.app_session import MapView, Session
from droppexd.roles.app_upload import STALL_S, Outlets, Upload, Wanted
from droppexd.roles.master import MasterLink
from droppexd.roles.suspects import Suspects
from droppexd.wire.messages import (
    ANYTHING,
    MOST_TOGETHER,
    AbortShard,
    Commit,
    Committed,
    Done,
    PieceWritten,
    WritePiece,
)

CHUNK = 1000
LAYOUT = Layout(2, 2)


class Pool:
    """Takes pieces, in order; `hold` keeps answers back from a chunk on, `fail` refuses from a chunk on."""

    def __init__(self, number):
        self.number = number
        self.boot_id = bytes([number]) * 16
        self.pieces = {}
        self.sizes = {}
        self.aborted = []
        self.fail = {}
        self.hold = None
        self.released = trio.Event()
        self.pace_s = 0.0
        self.restart_at = None
        self.messages = []
        self._turn = trio.Lock()
        self._arrived = {}

    def admit(self, _peer, request, body):
        arrived = self._arrived.get((request.extent, request.index), 0)
        assert request.chunk == arrived
        self._arrived[request.extent, request.index] = arrived + len(body)
        self.messages.append((request.chunk, len(body)))

    async def write(self, _call, request, body):
        if request.chunk in self.fail:
            raise self.fail[request.chunk]
        if self.hold is not None and request.chunk >= self.hold:
            await self.released.wait()
        if self.pace_s:
            async with self._turn:
                await trio.sleep(self.pace_s)
        if self.restart_at is None:
            assert request.boot_id == (self.boot_id if request.chunk else b"")
        held = self.pieces.setdefault((request.extent, request.index), {})
        checksums = (request.checksum, *request.following)
        for chunk, (piece, checksum) in enumerate(zip(body, checksums, strict=True), request.chunk):
            assert checksum == piece_checksum(request.extent, request.layout, request.index, chunk, piece)
            held[chunk] = bytes(piece)
        if request.last:
            self.sizes[request.extent] = request.size
        boot_id = b"another start---" if request.chunk == self.restart_at else self.boot_id
        return PieceWritten(boot_id=boot_id, credit=8, generation=1)

    async def abort(self, _call, request, _body):
        self.aborted.append((request.extent, request.index))
        return Done()


class Master:
    """Commits, or refuses."""

    def __init__(self):
        self.commit = None
        self.error = None

    async def take(self, _call, request, _body):
        if self.error is not None:
            raise self.error
        self.commit = request
        return Committed(
            receipt=Receipt(
                name=request.name,
                version=request.version.id,
                size=request.version.size,
                blake3=request.version.blake3,
                layout=str(request.extents[0].layout),
                survives_pools=min(extent.survives for extent in request.extents),
                survives_machines=0,
                note=request.note,
            )
        )


class Scene:
    """An app's outlets, its pools and its master."""

    def __init__(self, stage):
        self.stage = stage
        self.pools = {}
        self.addresses = {}
        self.master = Master()
        self.outlets = None
        self.session = Session(1)

    async def open(self, pools, layout=LAYOUT):
        stage = self.stage
        for number in range(1, pools + 1):
            pool = self.pools[number] = Pool(number)
            self.addresses[number] = await stage.serve(
                f"pool-{number}",
                {WritePiece: pool.write, AbortShard: pool.abort},
                admissions={WritePiece: pool.admit},
            )
        controller = await stage.serve("controller", {Commit: self.master.take}, role=Role.CONTROLLER)
        connections = await stage.connections("app")
        self.outlets = Outlets(
            connections=connections,
            registration=SimpleNamespace(view=MapView(self._map())),
            master=MasterLink(connections, [controller], stage.runtime),
            runtime=stage.runtime,
            suspects=Suspects(stage.runtime.clock),
            layout=layout,
            chunk_size=CHUNK,
        )
        return self

    def _map(self):
        pools = tuple(
            PoolInfo(
                number=number,
                pool_id=bytes([number]) * 16,
                name=f"pool-{number}",
                machine=f"machine-{number}",
                zone="",
                address=address,
                state="up",
                membership="member",
                capacity=1000,
                free=1000,
            )
            for number, address in self.addresses.items()
        )
        return ClusterMap(cluster_id=bytes(16), incarnation=b"i" * 16, term=1, version=1, pools=pools)

    def upload(self, ids, *, size=None):
        wanted = Wanted(name="a/b", condition=ANYTHING, layout=None, metadata=(), size=size)
        return Upload(self.outlets, wanted, ids)

    async def put(self, data, *, window=4, together=1):
        """Send the chunks of `data`, so many a message and `window` messages side by side, and commit."""
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        with self.session.work() as ids:
            upload = self.upload(ids)
            try:
                room = trio.Semaphore(window)
                async with trio.open_nursery() as nursery:

                    async def send(number):
                        some = chunks[number : number + together]
                        await upload.send_chunks(number, some, last=number + together >= len(chunks))
                        room.release()

                    for number in range(0, len(chunks), together):
                        await room.acquire()
                        nursery.start_soon(send, number)
                return await upload.finish(blake3(data).digest())
            except BaseException:
                await upload.abort()
                raise

    def content(self):
        """Rebuild what was committed, for each extent from the last k pools that it names."""
        parts = []
        for extent in self.master.commit.extents:
            held = [index for index, number in enumerate(extent.pools) if number != MISSING]
            columns = {
                index: self.pools[extent.pools[index]].pieces[extent.id, index]
                for index in held[-extent.layout.k :]
            }
            for chunk in range(-(-extent.size // extent.chunk_size)):
                pieces = {index: column[chunk] for index, column in columns.items()}
                data = rebuild_pieces(extent.layout, pieces, range(extent.layout.k))
                length = chunk_length(extent.size, extent.chunk_size, chunk)
                parts.append(b"".join(bytes(data[index]) for index in range(extent.layout.k))[:length])
        return b"".join(parts)


def content_of(chunks, rest=10):
    return b"".join(bytes([number % 251]) * CHUNK for number in range(chunks)) + b"r" * rest


def leaf(group):
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def scene(play, pools, body, layout=LAYOUT):
    async def story(stage):
        await body(await Scene(stage).open(pools, layout))

    play(story)


def test_a_put_is_with_all_pools_before_it_is_committed(play):
    async def body(one):
        data = content_of(5)
        receipt = await one.put(data)
        assert receipt.blake3 == blake3(data).digest()
        assert one.content() == data
        (extent,) = one.master.commit.extents
        assert MISSING not in extent.pools
        assert len(set(extent.pools)) == 4
        assert {one.pools[number].sizes[extent.id] for number in extent.pools} == {len(data)}
        assert one.master.commit.version.extents == (extent.id,)

    scene(play, 6, body)


def test_a_new_extent_begins_after_64_chunks(play):
    async def body(one):
        data = content_of(130)
        await one.put(data)
        assert [extent.size for extent in one.master.commit.extents] == [
            64 * CHUNK,
            64 * CHUNK,
            2 * CHUNK + 10,
        ]
        assert len(set(one.master.commit.version.extents)) == 3
        assert one.content() == data

    scene(play, 5, body)


@pytest.mark.parametrize("together", [2, 3, MOST_TOGETHER])
def test_chunks_that_come_together_go_out_together_within_their_extent(play, together):
    async def body(one):
        data = content_of(130)
        await one.put(data, window=2, together=together)
        assert one.content() == data
        assert [extent.size for extent in one.master.commit.extents] == [
            64 * CHUNK,
            64 * CHUNK,
            2 * CHUNK + 10,
        ]
        for pool in one.pools.values():
            assert all(chunk + count <= 64 for chunk, count in pool.messages)
            assert all(count == 1 for chunk, count in pool.messages if chunk == 0)
            assert max(count for _, count in pool.messages) == together

    scene(play, 4, body)


def test_pieces_go_one_by_one_while_pools_are_slow(play):
    async def body(one):
        for pool in one.pools.values():
            pool.pace_s = 1.5
        await one.put(content_of(12), window=1, together=4)
        for pool in one.pools.values():
            assert [count for _, count in pool.messages] == [1] * 13
            pool.pace_s = 0.0
            pool.messages.clear()
        await one.put(content_of(12), window=1, together=4)
        for pool in one.pools.values():
            assert [count for _, count in pool.messages] == [1, 3, 4, 4, 1]

    scene(play, 4, body)


@pytest.mark.parametrize("error", [StoreFull("full"), IntegrityError("damaged"), PeerError("busy")])
def test_a_pool_that_refuses_the_first_piece_is_replaced(play, error):
    async def body(one):
        for number in (1, 2):
            one.pools[number].fail = {0: error}
        data = content_of(4)
        receipt = await one.put(data)
        (extent,) = one.master.commit.extents
        assert not {1, 2, MISSING}.intersection(extent.pools)
        assert receipt.survives_pools == 2
        assert one.content() == data

    scene(play, 6, body)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_pool_that_is_not_there_is_replaced(play, how):
    async def body(one):
        getattr(one.stage.network, how)("pool-3")
        data = content_of(4)
        await one.put(data)
        (extent,) = one.master.commit.extents
        assert not {3, MISSING}.intersection(extent.pools)
        assert one.content() == data

    scene(play, 5, body)


def test_without_a_pool_to_spare_its_shard_is_missing(play):
    async def body(one):
        one.pools[2].fail = {0: StoreFull("full")}
        data = content_of(4)
        receipt = await one.put(data)
        assert one.master.commit.extents[0].pools.count(MISSING) == 1
        assert receipt.survives_pools == 1
        assert one.content() == data

    scene(play, 4, body)


def test_a_pool_that_fails_later_is_missing_and_the_next_extent_avoids_it(play):
    async def body(one):
        first_id = ExtentId(1, 3)  # After the mark of the work and the version.
        failing = one.outlets.registration.view.placement.order(first_id, Layout(3, 2))[0]
        one.pools[failing].fail = {3: StoreFull("full")}
        data = content_of(70)
        await one.put(data)
        first, second = one.master.commit.extents
        assert first.id == first_id
        assert first.pools.count(MISSING) == 1
        assert failing not in first.pools
        assert not {failing, MISSING}.intersection(second.pools)
        assert one.content() == data

    scene(play, 6, body, Layout(3, 2))


@pytest.mark.parametrize("chunk", [0, 2])
def test_too_few_pools_are_an_error_that_names_each(play, chunk):
    async def body(one):
        for number in (1, 2):
            one.pools[number].fail = {chunk: StoreFull(f"disk {number} is full")}
        with pytest.raises((NotEnoughShards, ExceptionGroup)) as caught:
            await one.put(content_of(6))
        error = leaf(caught.value)
        assert isinstance(error, NotEnoughShards)
        assert "others had no room: delete files or add a pool" in str(error)
        assert sum("is full" in line for line in error.missing) == 2
        assert one.master.commit is None
        alive = [one.pools[number] for number in (3, 4)]
        assert all(pool.aborted for pool in alive)

    scene(play, 4, body)


def test_a_cluster_whose_disks_are_full_says_so_before_anything_is_sent(play):
    async def body(one):
        registration = one.outlets.registration
        before = registration.view.map
        full = [replace(pool, state="read-only", trouble=DISK_FULL) for pool in before.pools[:3]]
        registration.view = MapView(replace(before, pools=(*full, before.pools[3])))
        with pytest.raises(ClusterFull, match="the disks of 3 pools are full"):
            await one.put(content_of(1))
        down = [replace(pool, state="down") for pool in before.pools]
        registration.view = MapView(replace(before, pools=(*down,)))
        with pytest.raises(NotEnoughShards) as caught:
            await one.put(content_of(1))
        assert not isinstance(caught.value, ClusterFull)

    scene(play, 4, body)


def test_no_chunk_waits_for_ever_behind_one_that_failed(play):
    async def body(one):
        for number in (1, 2):
            one.pools[number].fail = {0: StoreFull("full")}
        with one.session.work() as ids:
            upload = one.upload(ids)
            errors = []

            async def send(number):
                try:
                    await upload.send_chunks(number, [bytes(CHUNK)], last=False)
                except DroppexError as error:
                    errors.append(error)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(4):
                        nursery.start_soon(send, number)
            assert [type(error) for error in errors] == [NotEnoughShards] * 4
            with pytest.raises(NotEnoughShards):
                await upload.finish(bytes(32))

    scene(play, 4, body)


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_pool_that_stalls_while_others_go_on_is_given_up(play, chunk):
    async def body(one):
        one.pools[1].hold = chunk
        data = content_of(20)
        with trio.fail_after(2 * STALL_S):
            await one.put(data)
        pools = one.master.commit.extents[0].pools
        assert 1 not in pools
        assert pools.count(MISSING) == 1
        assert one.content() == data

    scene(play, 4, body)


def test_pools_that_stall_together_are_given_up_together(play):
    async def body(one):
        for number in (1, 2):
            one.pools[number].hold = 2
        data = content_of(20)
        with trio.fail_after(1.5 * STALL_S):
            await one.put(data)
        assert one.master.commit.extents[0].pools.count(MISSING) == 2
        assert one.content() == data

    scene(play, 5, body, Layout(2, 3))


def test_when_all_pools_stall_the_put_waits_for_them(play):
    async def body(one):
        for pool in one.pools.values():
            pool.hold = 3

        async def go_on():
            await trio.sleep(10 * STALL_S)
            for pool in one.pools.values():
                pool.released.set()

        one.stage.nursery.start_soon(go_on)
        data = content_of(20)
        receipt = await one.put(data, window=1)
        assert receipt.survives_pools == 2
        assert MISSING not in one.master.commit.extents[0].pools
        assert one.content() == data

    scene(play, 4, body)


def test_a_slow_pool_that_gets_on_is_not_given_up(play):
    async def body(one):
        one.pools[1].pace_s = 0.6 * STALL_S
        data = content_of(12)
        receipt = await one.put(data)
        assert receipt.survives_pools == 2
        assert one.content() == data

    scene(play, 4, body)


def test_a_replacement_gets_the_time_that_the_first_had(play):
    async def body(one):
        for number in (1, 2):
            one.pools[number].hold = 0
        for number in (3, 4, 5, 6):
            one.pools[number].pace_s = 0.5 * STALL_S
        data = content_of(3)
        receipt = await one.put(data)
        assert receipt.survives_pools == 2
        assert one.content() == data

    scene(play, 6, body)


def test_a_pool_that_was_restarted_within_a_shard_is_given_up(play):
    async def body(one):
        one.pools[1].restart_at = 7
        data = content_of(20)
        await one.put(data)
        assert 1 not in one.master.commit.extents[0].pools
        assert one.content() == data

    scene(play, 4, body)


def test_what_arrived_damaged_is_not_committed(play):
    async def body(one):
        with one.session.work() as ids:
            upload = one.upload(ids)
            with pytest.raises(IntegrityError, match="chunk 0 arrived damaged"):
                await upload.send_chunks(
                    0, [b"content"], last=True, checksums=[chunk_checksum(0, b"Content")]
                )
        with one.session.work() as ids:
            upload = one.upload(ids, size=8)
            await upload.send_chunks(0, [b"content"], last=True)
            with pytest.raises(IntegrityError):
                await upload.finish(blake3(b"content").digest())
        assert one.master.commit is None

    scene(play, 4, body)


def test_a_refused_commit_is_told_as_it_is(play):
    async def body(one):
        one.master.error = Conflict("the name exists")
        with pytest.raises(Conflict):
            await one.put(content_of(2))

    scene(play, 4, body)


@pytest.mark.parametrize(
    ("length", "last"), [(0, False), (0, True), (CHUNK - 1, False), (CHUNK + 1, False), (CHUNK + 1, True)]
)
def test_a_chunk_of_the_wrong_length_is_refused(play, length, last):
    async def body(one):
        with one.session.work() as ids:
            upload = one.upload(ids)
            with pytest.raises(RemoteProtocolError):
                await upload.send_chunks(0, [bytes(length)], last=last)
            with pytest.raises(RemoteProtocolError):
                await upload.send_chunks(1, [bytes(CHUNK)], last=True)

    scene(play, 4, body)


def test_an_aborted_put_commits_nothing_and_ends_what_waits(play):
    async def body(one):
        for pool in one.pools.values():
            pool.hold = 1
        with one.session.work() as ids:
            upload = one.upload(ids)
            await upload.send_chunks(0, [bytes(CHUNK)], last=False)
            ended = []

            async def send():
                with pytest.raises(PeerError):
                    await upload.send_chunks(2, [bytes(CHUNK)], last=False)
                ended.append(2)

            one.stage.nursery.start_soon(send)
            await trio.sleep(1)
            await upload.abort()
            await trio.sleep(1)
            assert ended == [2]
            with pytest.raises(PeerError):
                await upload.finish(bytes(32))
        assert all(len(pool.aborted) == 1 for pool in one.pools.values())

    scene(play, 4, body)


def test_what_broke_the_put_off_is_told_and_not_what_came_of_it(play):
    async def body(one):
        for pool in one.pools.values():
            pool.hold = 0
        with one.session.work() as ids:
            upload = one.upload(ids)
            errors = {}

            async def send(number, data):
                try:
                    await upload.send_chunks(number, [data], last=False)
                except DroppexError as error:
                    errors[number] = error

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, 0, bytes(CHUNK))
                await trio.sleep(1)
                nursery.start_soon(send, 1, b"too short")
                await trio.sleep(1)
                for number in one.pools:
                    one.stage.network.kill(f"pool-{number}")
        assert {number: type(error) for number, error in errors.items()} == dict.fromkeys(
            (0, 1), RemoteProtocolError
        )

    scene(play, 4, body)
