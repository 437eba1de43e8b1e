"""The app between real clients and small pools and masters: memory, credit, and order under load."""

from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from blake3 import blake3

from droppexd.client import open_client
from droppexd.coding import chunk_checksum
from droppexd.errors import (
    CatalogError,
    DroppexError,
    IntegrityError,
    InvalidRequest,
    NoSuchShard,
    NotEnoughShards,
    NotFound,
    PeerError,
    SessionClosed,
)
from droppexd.model import SMALL_SIZE, ClusterMap, Layout, PoolInfo, Receipt, Role
from droppexd.roles.app import AppSettings, serve_app
from droppexd.wire.messages import (
    ANYTHING,
    AbortShard,
    CloseSession,
    Commit,
    Committed,
    Done,
    Found,
    GetPart,
    KeepSession,
    Lookup,
    OpenSession,
    Piece,
    PieceWritten,
    PutAbort,
    PutChunk,
    PutOpen,
    PutSmall,
    ReadPiece,
    SessionKept,
    SessionOpened,
    WritePiece,
)

CHUNK = 4000
UNITS = 4
LARGE = bytes(place * 31 % 251 for place in range(SMALL_SIZE + 20 * CHUNK + 17))


class Pool:
    """Keeps pieces in memory, each after a time of its own."""

    def __init__(self, entropy):
        self.pieces = {}
        self.delay_s = (0.0, 0.0)
        self.busy = 0
        self.most_busy = 0
        self._entropy = entropy

    @asynccontextmanager
    async def work(self):
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            await trio.sleep(self._entropy.uniform(*self.delay_s))
            yield
        finally:
            self.busy -= 1

    async def write(self, _call, request, body):
        async with self.work():
            for place, checksum in enumerate((request.checksum, *request.following)):
                key = (request.extent, request.index, request.chunk + place)
                self.pieces[key] = (bytes(body[place]), checksum)
            return PieceWritten(boot_id=bytes(16), credit=8)

    async def read(self, _call, request, _body):
        async with self.work():
            if (request.extent, request.index, request.chunk) not in self.pieces:
                raise NoSuchShard("not here")
            chunks = range(request.chunk, request.chunk + request.count)
            held = [self.pieces[request.extent, request.index, chunk] for chunk in chunks]
            checksums = tuple(checksum for _, checksum in held)
            return Piece(checksum=checksums[0], following=checksums[1:]), [piece for piece, _ in held]

    async def abort(self, _call, _request, _body):
        return Done()


class Master:
    """Sessions and names, and what it is told to refuse."""

    def __init__(self):
        self.map = None
        self.names = {}
        self.sessions = 0
        self.floors = []
        self.refuse_sessions = []
        self.refuse_keeping = []

    def handlers(self):
        return {
            OpenSession: self.open_session,
            KeepSession: self.keep,
            CloseSession: self.close,
            Commit: self.commit,
            Lookup: self.look_up,
        }

    async def open_session(self, _call, _request, _body):
        if self.refuse_sessions:
            raise self.refuse_sessions.pop(0)
        self.sessions += 1
        return SessionOpened(session=self.sessions, lease_ms=10_000, map=self.map)

    async def keep(self, _call, request, _body):
        if self.refuse_keeping:
            raise self.refuse_keeping.pop(0)
        self.floors.append(request.floor)
        return SessionKept(map=self.map if request.map_version < self.map.version else None)

    async def close(self, _call, _request, _body):
        return Done()

    async def commit(self, _call, request, _body):
        version = request.version
        self.names[request.name] = Found(name=request.name, version=version, extents=request.extents)
        receipt = Receipt(
            name=request.name,
            version=version.id,
            size=version.size,
            blake3=version.blake3,
            layout="2+1",
            survives_pools=min((extent.survives for extent in request.extents), default=0),
            survives_machines=0,
        )
        return Committed(receipt=receipt)

    async def look_up(self, _call, request, _body):
        if request.name not in self.names:
            raise NotFound("no such name")
        return self.names[request.name]


class Scene:
    def __init__(self, stage):
        self.stage = stage
        self.pools = [Pool(stage.runtime.entropy) for _ in range(4)]
        self.master = Master()
        self.address = ""
        self._clients = 0

    async def open(self):
        addresses = [
            await self.stage.serve(
                f"pool-{number}", {WritePiece: pool.write, ReadPiece: pool.read, AbortShard: pool.abort}
            )
            for number, pool in enumerate(self.pools, 1)
        ]
        infos = tuple(
            PoolInfo(
                number=number,
                pool_id=bytes(16),
                name=f"pool-{number}",
                machine=f"machine-{number}",
                zone="",
                address=address,
                state="up",
                membership="member",
                capacity=1,
                free=1,
            )
            for number, address in enumerate(addresses, 1)
        )
        self.master.map = ClusterMap(
            cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=infos
        )
        controller = await self.stage.serve("controller", self.master.handlers(), role=Role.CONTROLLER)
        settings = AppSettings(
            name="app", layout=Layout(2, 1), buffer_bytes=UNITS * CHUNK * 3 // 2, chunk_size=CHUNK
        )
        transport = await self.stage.transport("app", Role.APP)
        self.address = await self.stage.nursery.start(
            partial(
                serve_app,
                transport=transport,
                address="tcp://127.0.0.1:0",
                controllers=[controller],
                runtime=self.stage.runtime,
                settings=settings,
            )
        )
        return self

    @asynccontextmanager
    async def client(self):
        self._clients += 1
        async with (
            self.stage.network.transport(f"client-{self._clients}", Role.CLIENT) as transport,
            open_client(self.address, transport, self.stage.runtime) as client,
        ):
            yield client

    def change_pools(self, **fields):
        """Have the master know all pools differently from now on."""
        old = self.master.map
        pools = tuple(replace(pool, **fields) for pool in old.pools)
        self.master.map = replace(old, version=old.version + 1, pools=pools)

    def slow(self, low, high):
        for pool in self.pools:
            pool.delay_s = (low, high)


@pytest.fixture
def scene(play):
    def run(body, prepare=lambda one: None):
        async def story(stage):
            one = Scene(stage)
            prepare(one)
            await body(await one.open())

        play(story)

    return run


def test_many_transfers_share_the_memory_and_none_fails(scene):
    async def body(one):
        one.slow(0.001, 0.08)  # Chunks and parts are done in any order.
        done = []

        async def transfer(client, number):
            await trio.sleep(0.3 * number)
            name = f"a/{number}"
            await client.put_bytes(name, LARGE)
            assert await client.get_bytes(name) == LARGE
            done.append(number)

        async with one.client() as client, one.client() as other, trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(transfer, (client, other)[number % 2], number)
        assert sorted(done) == list(range(6))

    scene(body)


def test_a_transfer_that_comes_later_is_not_kept_waiting_to_the_end_of_another(scene):
    async def body(one):
        one.slow(1.0, 1.0)
        async with one.client() as client:
            ended = []

            async def put(name, data):
                await client.put_bytes(name, data)
                ended.append(name)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(put, "a/long", LARGE * 4)
                await trio.sleep(5)
                nursery.start_soon(put, "a/short", LARGE[: SMALL_SIZE + 1])
            assert ended == ["a/short", "a/long"]

    scene(body)


def test_reads_that_were_left_early_give_their_memory_back(scene):
    async def body(one):
        async with one.client() as client:
            await client.put_bytes("a/b", LARGE)
            one.slow(0.01, 0.05)
            for _ in range(3 * UNITS):
                async with client.open_read("a/b") as download:
                    async for _frames in download:
                        break
            with trio.fail_after(60):
                assert await client.get_bytes("a/b") == LARGE

    scene(body)


def test_puts_that_failed_give_their_memory_back(scene):
    async def body(one):
        one.slow(0.01, 0.05)
        async with one.client() as client:
            for _ in range(3 * UNITS):
                with trio.move_on_after(0.3):
                    await client.put_bytes("a/b", LARGE)
            with trio.fail_after(60):
                await client.put_bytes("a/b", LARGE, condition=ANYTHING)
                assert await client.get_bytes("a/b") == LARGE

    scene(body)


def test_clients_that_vanished_give_their_memory_back(scene):
    async def body(one):
        one.slow(0.01, 0.05)
        async with one.client() as client:
            await client.put_bytes("a/b", LARGE)
        for number in range(2 * UNITS):
            with trio.move_on_after(0.3):
                async with one.client() as client:
                    if number % 2:
                        await client.put_bytes("a/c", LARGE)
                    else:
                        async with client.open_read("a/b") as download:
                            async for _frames in download:
                                one.stage.network.kill(f"client-{one._clients}")
                                await trio.sleep_forever()
        await trio.sleep(200)
        async with one.client() as client:
            with trio.fail_after(60):
                assert await client.get_bytes("a/b") == LARGE
        await trio.sleep(10)
        assert one.master.floors[-1] > 1

    scene(body)


def test_more_small_files_than_a_pool_takes_at_once_wait_for_each_other(scene):
    async def body(one):
        one.slow(0.5, 1.0)
        async with one.client() as client, one.client() as other, one.client() as third:
            clients = (client, other, third)

            async def put_and_get(number):
                await trio.sleep(0)
                name, data = f"a/{number}", str(number).encode()
                await clients[number % 3].put_bytes(name, data)
                assert await clients[number % 3].get_bytes(name) == data

            async with trio.open_nursery() as nursery:
                for number in range(600):
                    nursery.start_soon(put_and_get, number)
        assert max(pool.most_busy for pool in one.pools) <= 200
        assert all(found.extents[0].present == 2 for found in one.master.names.values())

    scene(body)


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_a_put_right_after_the_pools_came_back_is_not_refused(scene, data):
    async def body(one):
        async with one.client() as client:
            one.change_pools(state="down")
            await trio.sleep(5)
            with pytest.raises(NotEnoughShards, match="no pool takes writes now"):
                await client.put_bytes("a/early", data)
            one.change_pools(state="up")
            await client.put_bytes("a/late", data)
            assert await client.get_bytes("a/late") == data

    scene(body)


def test_chunks_out_of_order_or_beyond_the_credit_are_refused(scene):
    async def body(one):
        connections = await one.stage.connections("raw", Role.CLIENT)
        opened, _ = await connections.call(one.address, PutOpen(name="a/b", condition=ANYTHING), timeout_s=5)
        one.slow(5.0, 5.0)

        def send(sequence):
            checksum = chunk_checksum(sequence, bytes(CHUNK))
            request = PutChunk(stream=opened.stream, sequence=sequence, checksums=(checksum,))
            return connections.begin(one.address, request, (bytes(CHUNK),), timeout_s=60)

        ahead = send(1)
        with pytest.raises(Exception, match="where 0 was due"):
            await ahead.answer()
        taken = [send(number) for number in range(opened.credit)]
        beyond = send(opened.credit)
        with pytest.raises(Exception, match="more chunks came than credit"):
            await beyond.answer()
        for one_chunk in taken:
            await one_chunk.answer()

    scene(body)


def test_a_transfer_belongs_to_the_client_that_opened_it(scene):
    async def body(one):
        mine = await one.stage.connections("mine", Role.CLIENT)
        theirs = await one.stage.connections("theirs", Role.CLIENT)
        opened, _ = await mine.call(one.address, PutOpen(name="a/b", condition=ANYTHING), timeout_s=5)
        for request in (PutChunk(stream=opened.stream, sequence=0), GetPart(stream=opened.stream, part=0)):
            with pytest.raises(Exception, match="there is no such"):
                await theirs.call(one.address, request, timeout_s=5)

    scene(body)


@pytest.mark.parametrize(
    ("changes", "body", "error"),
    [
        ({}, [bytes(CHUNK), bytes(CHUNK)], None),
        ({}, [bytes(CHUNK), bytes(CHUNK - 1) + b"1"], "chunk 1 arrived damaged"),
        (
            {"checksums": (chunk_checksum(1, bytes(CHUNK)),) * 2},
            [bytes(CHUNK)] * 2,
            "chunk 0 arrived damaged",
        ),
        ({"checksums": (chunk_checksum(0, bytes(CHUNK)),)}, [bytes(CHUNK)] * 2, "1 checksums of 2 chunks"),
        ({"checksums": ()}, [bytes(CHUNK)] * 2, "0 checksums of 2 chunks"),
        ({"last": True}, [bytes(CHUNK)] * 2, "BLAKE3 of the whole comes with the last"),
        ({"blake3": bytes(32)}, [bytes(CHUNK)] * 2, "BLAKE3 of the whole comes with the last"),
        ({}, [], "a chunk of 0 bytes"),
    ],
)
def test_chunks_are_taken_when_they_are_what_was_sent(scene, changes, body, error):
    async def story(one):
        connections = await one.stage.connections("raw", Role.CLIENT)
        opened, _ = await connections.call(one.address, PutOpen(name="a/b", condition=ANYTHING), timeout_s=5)
        checksums = tuple(chunk_checksum(number, bytes(CHUNK)) for number in range(2))
        fields = {"stream": opened.stream, "sequence": 0, "checksums": checksums, **changes}
        if error is None:
            await connections.call(one.address, PutChunk(**fields), body, timeout_s=5)
        else:
            with pytest.raises(DroppexError, match=error):
                await connections.call(one.address, PutChunk(**fields), body, timeout_s=5)
            with pytest.raises(InvalidRequest, match="no such put"):
                await connections.call(one.address, PutAbort(stream=opened.stream), timeout_s=5)
        assert not one.master.names

    scene(story)


def test_a_small_file_that_arrived_damaged_is_refused(scene):
    async def body(one):
        connections = await one.stage.connections("raw", Role.CLIENT)
        request = PutSmall(name="a/b", condition=ANYTHING, blake3=blake3(b"right").digest())
        with pytest.raises(IntegrityError):
            await connections.call(one.address, request, (b"wrong",), timeout_s=5)
        assert not one.master.names

    scene(body)


def test_an_app_outlives_a_master_that_refuses_it(scene):
    def prepare(one):
        one.master.refuse_sessions = [CatalogError("the disk is full")] * 3

    async def body(one):
        assert one.master.sessions == 1
        one.master.refuse_keeping = [SessionClosed("too late")]
        one.master.refuse_sessions = [CatalogError("the disk is full")] * 3
        await trio.sleep(3)
        async with one.client() as client:
            with pytest.raises(PeerError):
                await client.put_bytes("a/b", b"data")
            await trio.sleep(20)
            assert one.master.sessions == 2
            await client.put_bytes("a/b", b"data")

    scene(body, prepare)


def test_an_idle_transfer_holds_the_floor_until_it_is_forgotten(scene):
    async def body(one):
        connections = await one.stage.connections("raw", Role.CLIENT)
        await connections.call(one.address, PutOpen(name="a/b", condition=ANYTHING), timeout_s=5)
        async with one.client() as client:
            for number in range(5):
                await client.put_bytes(f"a/{number}", b"data")
        await trio.sleep(10)
        assert one.master.floors[-1] == 1
        await trio.sleep(120)
        assert one.master.floors[-1] > 5

    scene(body)


def test_an_app_asks_all_whom_it_knows_who_they_are(scene):
    async def body(one):
        async with one.client() as client:
            assert (await client.examine_app()).name == "app"
            peers = (await client.examine_peers(timeout_s=20)).peers
        # The peers of this scene answer no Ping: that is told of each, by its name.
        assert [(peer.role, peer.name, peer.code) for peer in peers] == [
            ("controller", "", "remote-protocol"),
            *(("pool", f"pool-{number}", "remote-protocol") for number in range(1, 5)),
        ]

    scene(body)
