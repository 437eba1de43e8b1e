"""The client library against a small app of its own: windows, hashes, pages, and leaving in order."""

import gc
import io

import pytest
import trio
from blake3 import blake3

from droppexd.client import open_client
from droppexd.coding import chunk_checksum
from droppexd.errors import (
    Conflict,
    IntegrityError,
    InvalidName,
    NotFound,
    PeerError,
    RemoteProtocolError,
)
from droppexd.model import SMALL_SIZE, FileEntry, Layout, Receipt, Role, VersionId
from droppexd.wire.messages import (
    ABSENT,
    ANYTHING,
    Changed,
    Condition,
    Describe,
    Done,
    Find,
    GetClose,
    GetData,
    GetOpen,
    GetOpened,
    GetPart,
    List,
    Listed,
    PutAbort,
    PutChunk,
    PutOpen,
    PutOpened,
    PutProgress,
    PutSmall,
    Remove,
    Rename,
    Stored,
)

CHUNK = 64 * 1024
VERSION = VersionId(1, 1)
LARGE = bytes(place * 31 % 251 for place in range(SMALL_SIZE + 3 * CHUNK + 17))

HALVES = (slice(0, 100), slice(100, None))
"""A part comes in several frames."""


class App:
    """Keeps what it is given in memory; faults are planted from outside."""

    def __init__(self):
        self.files = {}
        self.requests = []
        self.credits = [4]
        self.in_flight = 0
        self.most_in_flight = 0
        self.fail = {}
        self.wrong_digest = False
        self.pace_s = 0.001
        self.together = 1
        self.names = []
        self.spoil = None
        self.aborted = []
        self.closed = []
        self._parts = []
        self._blake3 = b""

    def handlers(self):
        return {
            PutSmall: self.put_small,
            PutOpen: self.put_open,
            PutChunk: self.put_chunk,
            PutAbort: self.put_abort,
            GetOpen: self.get_open,
            GetPart: self.get_part,
            GetClose: self.get_close,
            List: self.list,
            Find: self.list,
            Describe: self.refuse,
            Remove: self.change,
            Rename: self.change,
        }

    def admissions(self):
        return {PutChunk: self.arrive, GetPart: self.arrive}

    def arrive(self, _peer, request, body):
        self.requests.append(request)
        count = len(body) if type(request) is PutChunk else request.count
        assert 1 <= count <= self.together
        self.in_flight += count
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def receipt(self, name, content):
        digest = bytes(32) if self.wrong_digest else blake3(content).digest()
        return Receipt(
            name=name,
            version=VERSION,
            size=len(content),
            blake3=digest,
            layout="4+2",
            survives_pools=2,
            survives_machines=2,
        )

    async def put_small(self, _call, request, body):
        self.requests.append(request)
        content = bytes(body[0]) if body else b""
        assert request.blake3 == blake3(content).digest()
        if request.condition.absent and request.name in self.files:
            raise Conflict("the name exists")
        self.files[request.name] = content
        return Stored(receipt=self.receipt(request.name, content))

    async def put_open(self, _call, request, _body):
        self.requests.append(request)
        self._parts = {}
        self._name = request.name
        return PutOpened(stream=7, credit=self.credits[0], chunk_size=CHUNK, together=self.together)

    async def put_chunk(self, _call, request, body):
        try:
            await trio.sleep(self.pace_s)
            if request.sequence in self.fail:
                raise self.fail[request.sequence]
            expected = zip(body, request.checksums, strict=True)
            for number, (chunk, checksum) in enumerate(expected, request.sequence):
                assert checksum == chunk_checksum(number, chunk)
                self._parts[number] = bytes(chunk)
            assert (request.blake3 is not None) == request.last
            receipt = None
            if request.last:
                while len(self._parts) < request.sequence + len(body):
                    await trio.sleep(0.001)
                content = b"".join(part for _, part in sorted(self._parts.items()))
                assert request.blake3 == blake3(content).digest()
                self.files[self._name] = content
                receipt = self.receipt(self._name, content)
            return PutProgress(credit=self.credit_after(request.sequence), receipt=receipt)
        finally:
            self.in_flight -= len(body)

    def credit_after(self, number):
        return self.credits[min(number + 1, len(self.credits) - 1)]

    async def put_abort(self, _call, request, _body):
        self.aborted.append(request.stream)
        return Done()

    async def get_open(self, _call, request, _body):
        self.requests.append(request)
        if request.name not in self.files:
            raise NotFound("no such name")
        content = self.files[request.name]
        end = len(content) if request.length is None else min(len(content), request.start + request.length)
        self._range = content[request.start : end]
        small = len(self._range) <= SMALL_SIZE
        self._chunks = [self._range[at : at + CHUNK] for at in range(0, len(self._range), CHUNK)]
        opened = GetOpened(
            stream=0 if small else 9,
            credit=self.credits[0],
            version=VERSION,
            size=len(content),
            start=request.start,
            end=end,
            parts=len(self._chunks),
            blake3=blake3(content).digest(),
            created_ms=0,
            together=self.together,
        )
        return (opened, self.spoiled([self._range] if self._range else [])) if small else opened

    def spoiled(self, frames):
        return frames if self.spoil is None else self.spoil(frames)

    async def get_part(self, _call, request, _body):
        try:
            await trio.sleep(self.pace_s)
            if request.part in self.fail:
                raise self.fail[request.part]
            parts = range(request.part, request.part + request.count)
            frames = self.spoiled([self._chunks[part][half] for part in parts for half in HALVES])
            return GetData(credit=self.credit_after(request.part), rebuilt=int(1 in parts)), frames
        finally:
            self.in_flight -= request.count

    async def get_close(self, _call, request, _body):
        self.closed.append(request.stream)
        return Done()

    async def list(self, _call, request, _body):
        self.requests.append(request)
        later = [name for name in self.names if name > request.after]
        page = later[:2]
        following = page[-1] if len(later) > 2 else ""
        return Listed(entries=tuple(FileEntry(name=name) for name in page), next=following)

    async def refuse(self, _call, request, _body):
        self.requests.append(request)
        raise NotFound(f"no {request.name}")

    async def change(self, _call, request, _body):
        self.requests.append(request)
        return Changed(version=VERSION)


@pytest.fixture
def with_client(play):
    """Run `body(client, app, stage)`."""

    def run(body):
        async def story(stage):
            app = App()
            address = await stage.serve("app", app.handlers(), role=Role.APP, admissions=app.admissions())
            transport = await stage.transport("client", Role.CLIENT)
            async with open_client(address, transport, stage.runtime, timeout_s=20) as client:
                await body(client, app, stage)
            gc.collect()  # An iteration that nobody closed would be told of here.

        play(story)

    return run


# -- files in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, SMALL_SIZE])
@pytest.mark.parametrize("way", ["bytes", "file"])
def test_a_small_file_is_one_message(with_client, size, way):
    async def body(client, app, stage):
        data = LARGE[:size]
        if way == "bytes":
            receipt = await client.put_bytes("name", data)
        else:
            receipt = await client.put_file("name", io.BytesIO(data))
        assert receipt.blake3 == blake3(data).digest()
        assert app.files == {"files/name": data}
        assert [type(request) for request in app.requests] == [PutSmall]

    with_client(body)


@pytest.mark.parametrize(
    "size", [SMALL_SIZE + 1, 2 * CHUNK + SMALL_SIZE, 4 * CHUNK, 4 * CHUNK + 1, len(LARGE)]
)
@pytest.mark.parametrize("way", ["bytes", "file", "unknown length", "trickle"])
@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_large_file_is_a_stream_of_chunks(with_client, size, way, together):
    class Trickle(io.RawIOBase):
        """A pipe: gives a little at a time."""

        def __init__(self, data):
            self._source = io.BytesIO(data)

        def read(self, length=-1):
            return self._source.read(min(length, 7001))

    async def body(client, app, stage):
        data = LARGE[:size]
        done = []
        app.together = together
        if way == "bytes":
            receipt = await client.put_bytes("a/b", data)
        elif way == "file":
            receipt = await client.put_file("a/b", io.BytesIO(data), size=size, progress=done.append)
        else:
            source = Trickle(data) if way == "trickle" else io.BytesIO(data)
            receipt = await client.put_file("a/b", source, progress=done.append)
        assert app.files["a/b"] == data
        assert receipt.size == size
        assert way == "bytes" or sum(done) == size
        chunks = [request for request in app.requests if type(request) is PutChunk]
        carried = min(together, app.credits[0] // 2)
        begins = [0, 1, *range(2, -(-size // CHUNK), carried)] if carried > 1 else range(-(-size // CHUNK))
        assert [chunk.sequence for chunk in chunks] == [at for at in begins if at * CHUNK < size]
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert app.requests[0].size == (size if way in ("bytes", "file") else None)
        assert not app.aborted

    with_client(body)


@pytest.mark.parametrize("granted", [[1], [2], [4], [8], [8, 1], [4, 1], [8, 2, 1, 5, 1], [1, 4], [0]])
@pytest.mark.parametrize("together", [1, 4])
def test_a_put_keeps_within_its_credit(with_client, granted, together):
    async def body(client, app, stage):
        app.credits, app.together = granted, together
        await client.put_bytes("a/b", LARGE)
        assert app.most_in_flight <= max(1, *granted)
        assert app.files["a/b"] == LARGE

    with_client(body)


def test_what_was_asked_goes_along(with_client):
    async def body(client, app, stage):
        condition = Condition(version=VERSION)
        asked = {"condition": condition, "layout": Layout(2, 1), "metadata": (("key", "value"),)}
        for data in (b"small", LARGE):
            await client.put_bytes("a/b", data, **asked)
            await client.put_file("a/b", io.BytesIO(data), **asked)
        opens = [request for request in app.requests if type(request) in (PutSmall, PutOpen)]
        assert len(opens) == 4
        assert {request.condition for request in opens} == {condition}
        assert {request.layout for request in opens} == {Layout(2, 1)}
        assert {request.metadata for request in opens} == {(("key", "value"),)}

    with_client(body)


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_a_receipt_for_other_content_is_no_receipt(with_client, data):
    async def body(client, app, stage):
        app.wrong_digest = True
        with pytest.raises(IntegrityError):
            await client.put_bytes("a/b", data)

    with_client(body)


@pytest.mark.parametrize("size", [10, SMALL_SIZE + 1, 3 * CHUNK])
def test_a_source_is_not_read_again_behind_its_end(with_client, size):
    class Terminal(io.RawIOBase):
        """Says once that it is at its end; who reads on waits for somebody to type."""

        def __init__(self, data):
            self._source = io.BytesIO(data)
            self._ended = False

        def read(self, length=-1):
            assert not self._ended
            data = self._source.read(length)
            self._ended = bool(length) and not data
            return data

    async def body(client, app, stage):
        app.together = 4
        await client.put_file("a/b", Terminal(LARGE[:size]))
        assert app.files["a/b"] == LARGE[:size]

    with_client(body)


def test_a_source_that_changed_its_length_is_noticed(with_client):
    async def body(client, app, stage):
        with pytest.raises(IntegrityError, match="did it change"):
            await client.put_file("a/b", io.BytesIO(b"short"), size=6)
        assert not app.requests

    with_client(body)


@pytest.mark.parametrize("sequence", [0, 2, 5])
def test_a_failed_chunk_ends_the_put_and_aborts_it(with_client, sequence):
    async def body(client, app, stage):
        app.fail = {sequence: Conflict("not now")}
        with pytest.raises(Conflict):
            await client.put_bytes("a/b", LARGE)
        assert app.aborted == [7]
        assert "a/b" not in app.files

    with_client(body)


def test_a_source_that_fails_aborts_the_put(with_client):
    class Failing(io.BytesIO):
        def read(self, length=-1):
            if self.tell() > SMALL_SIZE + CHUNK:
                raise OSError("the disk is gone")
            return super().read(length)

    async def body(client, app, stage):
        with pytest.raises(OSError, match="the disk is gone"):
            await client.put_file("a/b", Failing(LARGE))
        assert app.aborted == [7]

    with_client(body)


def test_a_put_that_is_cancelled_tells_the_app(with_client):
    async def body(client, app, stage):
        app.pace_s = 5.0
        with trio.move_on_after(7):
            await client.put_bytes("a/b", LARGE)
        assert app.aborted == [7]

    with_client(body)


def test_an_app_that_is_gone_is_a_peer_error(with_client):
    async def body(client, app, stage):
        app.pace_s = 5.0
        stage.nursery.start_soon(kill_later, stage)
        with pytest.raises(PeerError):
            await client.put_bytes("a/b", LARGE)
        with pytest.raises(PeerError):
            await client.put_bytes("a/b", b"small")

    async def kill_later(stage):
        await trio.sleep(7)
        stage.network.kill("app")

    with_client(body)


# -- files out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, SMALL_SIZE, SMALL_SIZE + 1, len(LARGE)])
@pytest.mark.parametrize("together", [1, 4])
def test_content_comes_back(with_client, size, together):
    async def body(client, app, stage):
        app.together = together
        app.files["files/name"] = LARGE[:size]
        assert await client.get_bytes("name") == LARGE[:size]
        target, done = io.BytesIO(), []
        download = await client.get_file("name", target, progress=done.append)
        assert target.getvalue() == LARGE[:size]
        assert sum(done) == download.length == size
        assert download.rebuilt_parts == (1 if size > SMALL_SIZE else 0)
        assert app.closed == ([9, 9] if size > SMALL_SIZE else [])

    with_client(body)


@pytest.mark.parametrize(
    ("start", "length"), [(0, 10), (5, 0), (100, None), (len(LARGE), None), (7, CHUNK * 4)]
)
def test_a_range_comes_back(with_client, start, length):
    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        end = len(LARGE) if length is None else start + length
        assert await client.get_bytes("a/b", start=start, length=length) == LARGE[start:end]

    with_client(body)


@pytest.mark.parametrize("granted", [[1], [4], [8], [8, 1], [4, 1], [8, 2, 1, 5, 1], [0]])
@pytest.mark.parametrize("together", [1, 4])
def test_a_get_keeps_within_its_credit(with_client, granted, together):
    async def body(client, app, stage):
        app.credits, app.together = granted, together
        app.files["a/b"] = LARGE
        assert await client.get_bytes("a/b") == LARGE
        assert app.most_in_flight <= max(1, *granted)

    with_client(body)


@pytest.mark.parametrize("size", [100, len(LARGE)])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda frames: [bytes(len(frame)) for frame in frames], IntegrityError),
        (lambda frames: frames[:-1], RemoteProtocolError),
        (lambda frames: [*frames, b"more"], RemoteProtocolError),
    ],
)
def test_what_arrived_wrong_is_refused(with_client, size, spoil, error):
    async def body(client, app, stage):
        app.files["a/b"] = LARGE[:size]
        app.spoil = spoil
        with pytest.raises(error):
            await client.get_bytes("a/b")
        with pytest.raises(error):
            await client.get_file("a/b", io.BytesIO())

    with_client(body)


@pytest.mark.parametrize("part", [0, 3])
def test_a_failed_part_ends_the_read_and_closes_it(with_client, part):
    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        app.fail = {part: NotFound("it has gone")}
        with pytest.raises(NotFound):
            await client.get_bytes("a/b")
        assert app.closed == [9]

    with_client(body)


def test_a_read_may_be_left_early(with_client):
    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        async with client.open_read("a/b") as download:
            async for frames in download:
                assert b"".join(frames) == LARGE[:CHUNK]
                break
        assert app.closed == [9]
        async with client.open_read("a/b") as download:
            pass
        assert app.closed == [9, 9]

    with_client(body)


def test_a_target_that_fails_closes_the_read(with_client):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError("no space left")

    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        with pytest.raises(OSError, match="no space left"):
            await client.get_file("a/b", Full())
        assert app.closed == [9]

    with_client(body)


def test_a_target_may_take_little_at_a_time(with_client):
    class Narrow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:1000]))

    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        target = Narrow()
        await client.get_file("a/b", target)
        assert target.getvalue() == LARGE

    with_client(body)


def test_a_stopped_app_does_not_hold_up_leaving(with_client):
    async def body(client, app, stage):
        app.files["a/b"] = LARGE
        before = trio.current_time()
        async with client.open_read("a/b"):
            stage.network.pause("app")
        assert trio.current_time() - before < 5

    with_client(body)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_listings_come_page_by_page(with_client, count):
    async def body(client, app, stage):
        app.names = [f"a/{number}" for number in range(count)]
        assert [entry.name async for entry in client.list("a/")] == app.names
        assert [entry.name async for entry in client.find("a/*")] == app.names
        assert len(app.requests) == 2 * max(1, -(-count // 2))

    with_client(body)


def test_names_are_made_whole_before_they_are_sent(with_client):
    async def body(client, app, stage):
        await client.rename("old", "new", keep=True)
        await client.rename("old", "new", condition=ANYTHING)
        await client.remove("old")
        with pytest.raises(NotFound, match="no files/old"):
            await client.describe("old")
        assert app.requests == [
            Rename(source="files/old", target="files/new", keep=True, condition=ABSENT),
            Rename(source="files/old", target="files/new", condition=ANYTHING),
            Remove(name="files/old", condition=ANYTHING),
            Describe(name="files/old"),
        ]

    with_client(body)


def test_a_bad_name_never_leaves_the_client(with_client):
    async def body(client, app, stage):
        bad = "a/\udc80"
        with pytest.raises(InvalidName):
            await client.put_bytes(bad, b"")
        with pytest.raises(InvalidName):
            await client.get_bytes(bad)
        with pytest.raises(InvalidName):
            await client.rename("a", bad)
        with pytest.raises(InvalidName):
            await anext(client.list(bad))
        with pytest.raises(InvalidName):
            await anext(client.find(bad))
        assert not app.requests

    with_client(body)
