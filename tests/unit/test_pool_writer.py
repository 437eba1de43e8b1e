"""Shards on their way into a pool: small ones in groups, large ones piece by piece."""

import math
import threading
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from droppexd.coding import piece_checksum
from droppexd.errors import (
    DroppexError,
    IntegrityError,
    InvalidRequest,
    NoSuchShard,
    PeerBusy,
    RemoteProtocolError,
    StoreError,
    StoreFull,
)
from droppexd.model import EXTENT_CHUNKS, SMALL_SIZE, ExtentId, Layout, VersionId
from droppexd.roles.pool_writer import (
    CREDIT,
    ShardStreams,
    SmallWriter,
    header_of,
    is_small,
    verify_piece,
)
from droppexd.runtime import Runtime
from droppexd.store.interface import Identity
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.messages import WritePiece

EXTENT = ExtentId(3, 4)
LAYOUT = Layout(1, 1)
CHUNK = 300_000


def piece_of(chunk, length=CHUNK):
    return bytes([chunk + 1]) * length


def request_for(store, chunk, *, last=False, length=CHUNK, extent=EXTENT, **changes):
    fields = {
        "extent": extent,
        "index": 1,
        "layout": LAYOUT,
        "chunk": chunk,
        "chunk_size": CHUNK,
        "checksum": piece_checksum(extent, LAYOUT, 1, chunk, piece_of(chunk, length)),
        "boot_id": store.identity.boot_id if chunk else b"",
        "incarnation": bytes(16),
        "version": VersionId(3, 5),
        "last": last,
        "size": chunk * CHUNK + length if last else 0,
        "name": "a/b" if chunk == 0 else "",
    }
    return WritePiece(**{**fields, **changes})


def simulated_store(stage, capacity=2**30):
    return SimulatedStore(SimulatedDisk(capacity), entropy=stage.runtime.entropy)


async def write(streams, store, chunk, *, length=CHUNK, body=None, **changes):
    request = request_for(store, chunk, length=length, **changes)
    body = [piece_of(chunk, length)] if body is None else body
    return await streams.write(streams.admit(request, body), request, body)


# -- small shards ----------------------------------------------------------------------------------


class CommitLog:
    """A store that only takes small shards, and a thread that may be held up."""

    def __init__(self, stage):
        self.groups = []
        self.failure = None
        self.open = trio.Event()
        self.open.set()
        self.runtime = Runtime(
            clock=stage.runtime.clock, entropy=stage.runtime.entropy, run_blocking=self.run_blocking
        )

    async def run_blocking(self, function, *args):
        await self.open.wait()
        return function(*args)

    def put_small(self, shards):
        self.groups.append(len(shards))
        if self.failure is not None:
            raise self.failure
        return [header.extent.counter for header, _ in shards]


async def put_small(writer, shard):
    """Submit a shard and wait for what becomes of it."""
    outcome, settled = [], trio.Event()

    def done(result):
        outcome.append(result)
        settled.set()

    writer.submit(shard, done)
    await settled.wait()
    if isinstance(outcome[0], DroppexError):
        raise outcome[0]
    return outcome[0]


async def small_writer(stage):
    log = CommitLog(stage)
    writer = SmallWriter(log, log.runtime)
    writer._work._slow_until = math.inf  # A disk that has to be waited for: commits go through threads.
    stage.nursery.start_soon(writer.run)
    return log, writer


def small_shard(stage, number):
    store = simulated_store(stage)
    extent = ExtentId(3, number)
    piece = piece_of(0, 100)
    request = request_for(store, 0, last=True, length=100, extent=extent)
    return header_of(request, request.size, (request.checksum,)), piece


async def put_all(stage, writer, numbers, outcomes):
    async def put(number):
        try:
            outcomes[number] = await put_small(writer, small_shard(stage, number))
        except (StoreError, PeerBusy) as error:
            outcomes[number] = error

    for number in numbers:
        stage.nursery.start_soon(put, number)
    await wait_all_tasks_blocked()


def test_shards_that_arrive_during_a_commit_share_the_next(play):
    async def story(stage):
        log, writer = await small_writer(stage)
        outcomes = {}
        log.open = trio.Event()
        await put_all(stage, writer, [1], outcomes)
        await put_all(stage, writer, range(2, 52), outcomes)
        assert log.groups == []
        log.open.set()
        await wait_all_tasks_blocked()
        assert log.groups == [1, 50]
        assert outcomes == {number: number for number in range(1, 52)}

    play(story)


def test_a_commit_takes_only_so_many(play):
    async def story(stage):
        log, writer = await small_writer(stage)
        outcomes = {}
        log.open = trio.Event()
        await put_all(stage, writer, range(1300), outcomes)
        log.open.set()
        await wait_all_tasks_blocked()
        assert log.groups == [512, 512, 276]
        assert len(outcomes) == 1300

    play(story)


def test_more_waiting_shards_than_it_takes_are_told_to_come_later(play):
    async def story(stage):
        log, writer = await small_writer(stage)
        outcomes = {}
        log.open = trio.Event()
        await put_all(stage, writer, [0], outcomes)
        shard = small_shard(stage, 1)
        for _ in range(4096):
            stage.nursery.start_soon(put_small, writer, shard)
        await wait_all_tasks_blocked()
        with pytest.raises(PeerBusy):
            await put_small(writer, shard)
        log.open.set()
        await wait_all_tasks_blocked()
        await put_small(writer, shard)

    play(story)


def test_each_shard_of_a_group_gets_its_own_outcome(play):
    async def story(stage):
        store = simulated_store(stage)
        writer = SmallWriter(store, stage.runtime)
        stage.nursery.start_soon(writer.run)
        header, piece = small_shard(stage, 1)
        outcomes = []

        async def put(shard):
            try:
                outcomes.append(type(await put_small(writer, shard)))
            except InvalidRequest as error:
                outcomes.append(type(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, (header, piece))
            nursery.start_soon(put, (header, piece[:-1]))
        assert sorted(outcomes, key=str) == sorted([int, InvalidRequest], key=str)
        assert store.read(header.extent, 1, 0) == (piece, header.checksums[0])

    play(story)


def test_a_failed_commit_fails_its_shards_and_not_the_writer(play):
    async def story(stage):
        log, writer = await small_writer(stage)
        outcomes = {}
        log.failure = StoreError("flush failed")
        await put_all(stage, writer, range(3), outcomes)
        assert [type(outcomes[number]) for number in range(3)] == [StoreError] * 3
        log.failure = None
        await put_all(stage, writer, [7], outcomes)
        assert outcomes[7] == 7

    play(story)


def test_a_writer_that_left_keeps_nobody_else_from_the_commit(play):
    async def story(stage):
        log, writer = await small_writer(stage)
        outcomes = {}
        log.open = trio.Event()
        with trio.move_on_after(1):
            await put_small(writer, small_shard(stage, 1))
        await put_all(stage, writer, [2], outcomes)
        log.open.set()
        await wait_all_tasks_blocked()
        assert outcomes == {2: 2}

    play(story)


def test_only_a_whole_small_shard_goes_to_the_database(play):
    async def story(stage):
        store = simulated_store(stage)
        whole = request_for(store, 0, last=True, length=SMALL_SIZE)
        assert is_small(whole, [bytes(SMALL_SIZE)])
        assert not is_small(whole, [bytes(SMALL_SIZE + 1)])
        assert not is_small(whole, [])
        assert not is_small(request_for(store, 0, length=10), [bytes(10)])
        assert not is_small(request_for(store, 1, last=True, length=10), [bytes(10)])

    play(story)


# -- streams ---------------------------------------------------------------------------------------


def several(store, chunk, count, **changes):
    """Return a request with pieces of consecutive chunks, and its body."""
    following = tuple(request_for(store, chunk + place).checksum for place in range(1, count))
    request = request_for(store, chunk, following=following, **changes)
    return request, [piece_of(chunk + place) for place in range(count)]


@pytest.mark.parametrize("now", [True, False])
def test_pieces_that_come_together_are_written_as_if_they_had_come_alone(play, now):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        request, body = several(store, 1, 3)
        stream = streams.admit(request, body)
        if now:
            assert streams.write_now(stream, request, body)
        else:
            await streams.write(stream, request, body)
        request, body = several(store, 4, 2, last=True, size=6 * CHUNK)
        stream = streams.admit(request, body)
        assert not streams.write_now(stream, request, body)
        await streams.write(stream, request, body)
        for chunk in range(6):
            assert store.read(EXTENT, 1, chunk) == (piece_of(chunk), request_for(store, chunk).checksum)

    play(story)


def test_each_of_the_pieces_that_come_together_is_verified(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        request, body = several(store, 1, 3)
        stream = streams.admit(request, body)
        with pytest.raises(IntegrityError):
            await streams.write(stream, request, [body[0], body[1], bytes(CHUNK)])
        with pytest.raises(RemoteProtocolError, match="not being written"):
            await write(streams, store, 4)
        assert not store.find([EXTENT])

    play(story)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_request_brings_the_pieces_that_it_speaks_of(play, count):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        request, body = several(store, 1, 2)
        body = (body * 2)[:count]
        stream = streams.admit(request, body)
        assert not streams.write_now(stream, request, body)
        with pytest.raises(RemoteProtocolError):
            await streams.write(stream, request, body)

    play(story)


def test_credit_counts_pieces_and_not_messages(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        under_way = []
        for chunk in range(1, CREDIT, 3):
            request, body = several(store, chunk, 3)
            if chunk + 3 <= CREDIT:
                under_way.append((streams.admit(request, body), request, body))
        with pytest.raises(PeerBusy):
            streams.admit(*several(store, 7, 3))
        for one in under_way:
            await streams.write(*one)
        streams.admit(*several(store, 7, 3))

    play(story)


def test_a_shard_has_at_most_so_many_pieces(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        for chunk in range(EXTENT_CHUNKS - 1):
            await write(streams, store, chunk)
        with pytest.raises(RemoteProtocolError, match="more than 64"):
            streams.admit(*several(store, EXTENT_CHUNKS - 1, 2))
        await write(streams, store, EXTENT_CHUNKS - 1, last=True)

    play(story)


def test_a_small_shard_comes_alone(play):
    async def story(stage):
        store = simulated_store(stage)
        request, body = several(store, 0, 2, last=True)
        assert not is_small(request, [b"a", b"b"])
        assert not is_small(request, body[:1])
        assert is_small(request_for(store, 0, last=True), [b"a"])

    play(story)


def test_pieces_in_order_make_a_shard_that_describes_itself(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        assert await write(streams, store, 0) == 0
        assert await write(streams, store, 1) == 0
        generation = await write(streams, store, 2, last=True, length=5)
        assert generation == store.find([EXTENT])[0].generation
        for chunk, length in enumerate((CHUNK, CHUNK, 5)):
            piece, checksum = store.read(EXTENT, 1, chunk)
            assert piece == piece_of(chunk, length)
            assert checksum == request_for(store, chunk, length=length).checksum
        assert store.header(EXTENT, 1).name == "a/b"

    play(story)


def test_pieces_admitted_in_order_are_written_in_order_whichever_task_runs_first(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        work = []
        for chunk in range(CREDIT):
            request = request_for(store, chunk, last=chunk == CREDIT - 1)
            body = [piece_of(chunk)]
            work.append((streams.admit(request, body), request, body))
        async with trio.open_nursery() as nursery:
            for one in reversed(work):
                nursery.start_soon(streams.write, *one)
                await wait_all_tasks_blocked()
        assert store.read(EXTENT, 1, CREDIT - 1)[0] == piece_of(CREDIT - 1)

    play(story)


def test_a_gap_is_refused_and_the_stream_goes_on(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        for chunk in (2, 5):
            with pytest.raises(RemoteProtocolError, match="where 1 was due"):
                await write(streams, store, chunk)
        await write(streams, store, 1)
        with pytest.raises(RemoteProtocolError, match="where 2 was due"):
            await write(streams, store, 1)
        await write(streams, store, 2, last=True)

    play(story)


@pytest.mark.parametrize("boot_id", [b"", bytes(16)])
def test_pieces_for_another_start_of_the_pool_are_refused(play, boot_id):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        with pytest.raises(RemoteProtocolError, match="restarted"):
            await write(streams, store, 1, boot_id=boot_id)

    play(story)


def test_a_piece_of_no_stream_is_refused(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        with pytest.raises(RemoteProtocolError, match="not being written"):
            await write(streams, store, 1)

    play(story)


def test_a_shard_cannot_be_begun_twice(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        with pytest.raises(StoreError, match="being written already"):
            await write(streams, store, 0)
        await write(streams, store, 1, last=True)

    play(story)


@pytest.mark.parametrize("changes", [{"layout": Layout(2, 1)}, {"chunk_size": CHUNK - 1}])
def test_the_layout_cannot_change_within_a_shard(play, changes):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        with pytest.raises(RemoteProtocolError, match="layout changed"):
            await write(streams, store, 1, **changes)

    play(story)


def test_more_pieces_than_credit_are_refused(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        for chunk in range(CREDIT):
            assert streams.admit(request_for(store, chunk), [piece_of(chunk)]) is not None
        with pytest.raises(PeerBusy, match="credit"):
            streams.admit(request_for(store, CREDIT), [piece_of(CREDIT)])

    play(story)


def test_more_shards_at_once_than_it_takes_are_told_to_come_later(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        requests = [request_for(store, 0, extent=ExtentId(3, number), length=1) for number in range(513)]
        for request in requests[:512]:
            streams.admit(request, [b"x"])
        with pytest.raises(PeerBusy):
            streams.admit(requests[512], [b"x"])
        await streams.abort(ExtentId(3, 0), 1)
        streams.admit(requests[512], [b"x"])

    play(story)


def nothing_is_left(store):
    assert store.find([EXTENT]) == []
    with pytest.raises(NoSuchShard):
        store.read(EXTENT, 1, 0)
    return store.usage().free == store.usage().capacity


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"checksum": bytes(16)}, IntegrityError),
        ({"body": []}, RemoteProtocolError),
        ({"last": True, "size": 7}, InvalidRequest),
    ],
)
def test_a_bad_piece_ends_its_shard_without_a_trace(play, changes, error):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        with pytest.raises(error):
            await write(streams, store, 1, **changes)
        assert nothing_is_left(store)
        with pytest.raises(RemoteProtocolError, match="not being written"):
            await write(streams, store, 2)
        await write(streams, store, 0)
        await write(streams, store, 1, last=True)

    play(story)


def test_a_full_disk_ends_the_shard_and_gives_the_room_back(play):
    async def story(stage):
        store = simulated_store(stage, capacity=CHUNK + 5000)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        with pytest.raises(StoreFull):
            await write(streams, store, 1)
        assert nothing_is_left(store)

    play(story)


@pytest.mark.parametrize("bad", [{"checksum": bytes(16)}, {"body": []}])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_pieces_behind_a_bad_one_end_with_it(play, position, bad):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        for chunk in range(position):
            await write(streams, store, chunk)
        work = []
        for chunk in range(position, 5):
            changes = dict(bad) if chunk == position else {}
            body = changes.pop("body", [piece_of(chunk)])
            request = request_for(store, chunk, **changes)
            work.append((streams.admit(request, body), request, body))
        failed = []

        async def one(*piece):
            with pytest.raises((IntegrityError, RemoteProtocolError)):
                await streams.write(*piece)
            failed.append(piece)

        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                for piece in work:
                    nursery.start_soon(one, *piece)
        assert len(failed) == len(work)
        assert nothing_is_left(store)

    play(story)


def test_a_piece_whose_time_is_over_takes_those_behind_it_along(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        work = []
        for chunk in range(3):
            request = request_for(store, chunk)
            body = [piece_of(chunk)]
            work.append((streams.admit(request, body), request, body))
        with trio.move_on_after(1):
            await streams.write(*work[1])  # Its turn never came.
        with trio.fail_after(1):
            for piece in (work[0], work[2]):
                with pytest.raises(StoreError, match="given up"):
                    await streams.write(*piece)
        assert nothing_is_left(store)

    play(story)


def test_a_shard_that_its_writer_gave_up_leaves_nothing(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        await streams.abort(EXTENT, 1)
        await streams.abort(EXTENT, 1)
        assert nothing_is_left(store)
        with pytest.raises(RemoteProtocolError):
            await write(streams, store, 1)

    play(story)


def test_a_silent_writer_is_given_up_and_a_busy_one_is_not(play):
    async def story(stage):
        store = simulated_store(stage)
        streams = ShardStreams(store, stage.runtime)
        await write(streams, store, 0)
        await trio.sleep(100)
        await streams.reap(120)
        await write(streams, store, 1)
        await trio.sleep(100)
        await streams.reap(120)
        await write(streams, store, 2)
        request = request_for(store, 3)
        under_way = streams.admit(request, [piece_of(3)])
        await trio.sleep(200)
        await streams.reap(120)
        await streams.write(under_way, request, [piece_of(3)])
        await trio.sleep(121)
        await streams.reap(120)
        assert nothing_is_left(store)
        with pytest.raises(RemoteProtocolError):
            await write(streams, store, 4)

    play(story)


def test_verification_names_the_shard():
    request = WritePiece(
        extent=EXTENT,
        index=1,
        layout=LAYOUT,
        chunk=0,
        chunk_size=CHUNK,
        checksum=piece_checksum(EXTENT, LAYOUT, 1, 0, b"piece"),
        boot_id=b"",
        incarnation=bytes(16),
        version=VersionId(1, 1),
    )
    verify_piece(request, b"piece")
    with pytest.raises(IntegrityError, match="shard 1 of extent 3-4"):
        verify_piece(request, b"Piece")


# -- with real threads -----------------------------------------------------------------------------


class SlowWriter:
    """A writer that waits within `write`, and notices when two threads use it at once."""

    def __init__(self, writing, may_go_on):
        self.uses = []
        self.aborted = threading.Event()
        self._writing = writing
        self._may_go_on = may_go_on
        self._in_use = threading.Lock()

    def write(self, chunk, piece):
        assert self._in_use.acquire(blocking=False), "two threads use one writer"
        self._writing.set()
        assert self._may_go_on.wait(10)
        self.uses.append("write")
        self._in_use.release()

    def abort(self):
        assert self._in_use.acquire(blocking=False), "two threads use one writer"
        self.uses.append("abort")
        self.aborted.set()
        self._in_use.release()


class SlowStore:
    """A store that waits within `begin`."""

    def __init__(self):
        self.identity = Identity(bytes(16), bytes(16), bytes(16), b"")
        self.beginning, self.may_begin = threading.Event(), threading.Event()
        self.writing, self.may_go_on = threading.Event(), threading.Event()
        self.writer = None

    def begin(self, expected_size):
        self.beginning.set()
        assert self.may_begin.wait(10)
        self.writer = SlowWriter(self.writing, self.may_go_on)
        return self.writer


@pytest.mark.parametrize("when", ["beginning", "writing"])
def test_giving_up_waits_for_the_thread_that_writes(when):
    async def main():
        store = SlowStore()
        clock = SimpleNamespace(now=trio.current_time)
        runtime = Runtime(clock=clock, entropy=None, run_blocking=trio.to_thread.run_sync)
        streams = ShardStreams(store, runtime)
        request, body = request_for(store, 0), [piece_of(0)]
        under_way = streams.admit(request, body)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams.write, under_way, request, body)
            if when == "writing":
                store.may_begin.set()
                await trio.to_thread.run_sync(store.writing.wait)
            else:
                await trio.to_thread.run_sync(store.beginning.wait)
            nursery.start_soon(streams.abort, EXTENT, 1)
            await wait_all_tasks_blocked()
            store.may_begin.set()
            store.may_go_on.set()
        assert store.writer.aborted.is_set()
        assert store.writer.uses == ["write", "abort"]

    trio.run(main)
