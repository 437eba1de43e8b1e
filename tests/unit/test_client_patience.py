"""A client with patience, while its app is away: what is asked again, how often, and what is told."""

import io

import pytest
import trio
from blake3 import blake3

from droppexd.client import Patience, open_client
from droppexd.errors import (
    Conflict,
    IntegrityError,
    InvalidRequest,
    KeyRefused,
    NotAuthorised,
    NotEnoughShards,
    NotFound,
    PeerBusy,
    PeerError,
    SessionClosed,
    StaleRead,
    StreamGone,
)
from droppexd.model import SMALL_SIZE, ExtentId, ExtentPlaces, FileEntry, Layout, Receipt, Role, VersionId
from droppexd.wire.messages import (
    ANYTHING,
    Changed,
    Condition,
    Describe,
    Described,
    Done,
    GetClose,
    GetData,
    GetOpen,
    GetOpened,
    GetPart,
    KeepStream,
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
LARGE = bytes(place * 31 % 251 for place in range(SMALL_SIZE + 3 * CHUNK + 17))
LOST = PeerError("the connection was lost")
BUSY = PeerBusy("this process is not taking requests now")


class App:
    """Names and their versions; any request can be planted to fail before it is carried out, or after."""

    def __init__(self):
        self.files = {}
        self.asked = []
        self.before = {}
        self.after = {}
        self.then = {}
        """What somebody else does after the next request of a kind."""
        self.pace_s = 0.0
        self._count = 0
        self._put = None
        self._reads = {}

    def handlers(self):
        kinds = {
            PutSmall: self.put_small,
            PutOpen: self.put_open,
            PutChunk: self.put_chunk,
            PutAbort: lambda request, body: Done(),
            KeepStream: lambda request, body: Done(),
            GetOpen: self.get_open,
            GetPart: self.get_part,
            GetClose: lambda request, body: Done(),
            Describe: self.describe,
            List: self.list,
            Remove: self.remove,
            Rename: self.rename,
        }
        return {kind: self._planted(kind, answer) for kind, answer in kinds.items()}

    def _planted(self, kind, answer):
        async def handle(_call, request, body):
            self.asked.append(request)
            await trio.sleep(self.pace_s)
            if self.before.get(kind):
                raise self.before[kind].pop(0)
            answered = answer(request, body)
            if self.then.get(kind):
                self.then.pop(kind)()
            failure = self.after[kind].pop(0) if self.after.get(kind) else None
            if failure is not None:
                raise failure
            return answered

        return handle

    def count(self, kind):
        return sum(type(request) is kind for request in self.asked)

    def store(self, name, content, condition=ANYTHING):
        if name in self.files and condition.absent:
            raise Conflict(f"{name} exists")
        self._count += 1
        self.files[name] = (VersionId(1, self._count), bytes(content))
        return Receipt(
            name=name,
            version=VersionId(1, self._count),
            size=len(content),
            blake3=blake3(content).digest(),
            layout="4+2",
            survives_pools=2,
            survives_machines=2,
        )

    def found(self, name, version=None):
        if name not in self.files or version not in (None, self.files[name][0]):
            raise NotFound(f"no {name}")
        return self.files[name]

    def put_small(self, request, body):
        return Stored(receipt=self.store(request.name, b"".join(body), request.condition))

    def put_open(self, request, _body):
        if request.name in self.files and request.condition.absent:
            raise Conflict(f"{request.name} exists")
        self._put = (request, [])
        return PutOpened(stream=7, credit=1, chunk_size=CHUNK)

    def put_chunk(self, request, body):
        opened, chunks = self._put
        chunks += body
        receipt = self.store(opened.name, b"".join(chunks), opened.condition) if request.last else None
        return PutProgress(credit=1, receipt=receipt)

    def get_open(self, request, _body):
        version, content = self.found(request.name, request.version)
        end = len(content) if request.length is None else request.start + request.length
        part = content[request.start : end]
        stream = 0 if len(part) <= SMALL_SIZE else len(self._reads) + 1
        self._reads[stream] = [part[at : at + CHUNK] for at in range(0, len(part), CHUNK)]
        opened = GetOpened(
            stream=stream,
            credit=1,
            version=version,
            size=len(content),
            start=request.start,
            end=end,
            parts=len(self._reads[stream]),
            blake3=blake3(content).digest(),
            created_ms=0,
        )
        return opened if stream else (opened, [part])

    def get_part(self, request, _body):
        return GetData(credit=1), [self._reads[request.stream][request.part]]

    def describe(self, request, _body):
        version, content = self.found(request.name)
        return Described(
            name=request.name,
            version=version,
            size=len(content),
            blake3=blake3(content).digest(),
            created_ms=0,
            names=1,
            metadata=(),
            extents=(ExtentPlaces(id=ExtentId(1, 1), layout=Layout(1, 2), size=len(content), shards=()),),
            survives_pools=2,
            survives_machines=0,
        )

    def list(self, request, _body):
        names = sorted(
            name for name in self.files if name.startswith(request.prefix) and name > request.after
        )
        page = names[: request.limit]
        return Listed(
            entries=tuple(FileEntry(name=name, version=self.files[name][0]) for name in page),
            next=page[-1] if len(names) > len(page) else "",
        )

    def remove(self, request, _body):
        version, _ = self.found(request.name)
        if request.condition.version not in (None, version):
            raise Conflict(f"{request.name} has another version")
        del self.files[request.name]
        return Changed(version=version)

    def rename(self, request, _body):
        found = self.found(request.source)
        if request.target in self.files and request.condition.absent:
            raise Conflict(f"{request.target} exists")
        self.files[request.target] = found
        if not request.keep:
            del self.files[request.source]
        return Changed(version=found[0])


@pytest.fixture
def app():
    return App()


@pytest.fixture
def with_client(play, app):
    """Run `body(client)`; time jumps."""

    def run(body, patience_s=30.0, on_wait=None):
        async def story(stage):
            address = await stage.serve("app", app.handlers(), role=Role.APP)
            transport = await stage.transport("client", Role.CLIENT)
            patience = Patience(total_s=patience_s, on_wait=on_wait)
            async with open_client(address, transport, stage.runtime, patience=patience) as client:
                await body(client)

        play(story)

    return run


# -- how long --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LOST, BUSY, SessionClosed("another session")])
def test_a_question_is_asked_again_until_it_is_answered_and_that_is_told_once(with_client, app, error):
    told = []

    async def body(client):
        app.store("a/b", b"x")
        app.before[List] = [error] * 5
        assert [entry.name async for entry in client.list("a/")] == ["a/b"]

    with_client(body, on_wait=lambda error, left_s: told.append((str(error), left_s)))
    assert app.count(List) == 6
    assert told == [(str(error), pytest.approx(30, abs=0.1))]


def test_patience_has_an_end(with_client, app):
    async def body(client):
        app.before[Describe] = [LOST] * 1000
        began = trio.current_time()
        with pytest.raises(PeerError, match="was lost"):
            await client.describe("a/b")
        assert 25 <= trio.current_time() - began <= 30

    with_client(body)


@pytest.mark.parametrize(
    "error", [NotFound("no"), Conflict("no"), NotAuthorised("no"), KeyRefused("no"), IntegrityError("no")]
)
def test_what_would_not_be_better_later_is_not_asked_again(with_client, app, error):
    async def body(client):
        app.before[Describe] = [error]
        with pytest.raises(type(error)):
            await client.describe("a/b")
        assert app.count(Describe) == 1

    with_client(body)


def test_without_patience_everything_is_asked_once(with_client, app):
    async def body(client):
        app.store("a/b", b"x")
        for kind in (Describe, PutSmall, Remove, Rename, GetOpen):
            app.before[kind] = [LOST]
        for ask in (
            lambda: client.describe("a/b"),
            lambda: client.put_bytes("a/c", b""),
            lambda: client.remove("a/b"),
            lambda: client.rename("a/b", "a/c"),
            lambda: client.get_bytes("a/b"),
        ):
            with pytest.raises(PeerError):
                await ask()
        assert len(app.asked) == 5

    with_client(body, patience_s=0)


# -- puts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"small", LARGE])
@pytest.mark.parametrize("kind", [PutSmall, PutOpen, PutChunk])
@pytest.mark.parametrize("error", [LOST, BUSY, NotEnoughShards("pools died")])
def test_a_put_that_broke_off_is_made_anew_from_its_beginning(with_client, app, data, kind, error):
    begun_anew = []

    async def body(client):
        app.before[kind] = [error]
        source = io.BytesIO(b"not this" + data)
        source.seek(8)
        receipt = await client.put_file("a/b", source, size=len(data), on_again=lambda: begun_anew.append(1))
        assert receipt.version == app.files["a/b"][0]
        assert app.files["a/b"][1] == data

    with_client(body)
    broke_off = (kind is PutSmall) == (data == b"small")
    assert len(begun_anew) == broke_off


def test_patience_begins_anew_with_what_was_achieved(with_client, app):
    async def body(client):
        app.pace_s = 20.0  # The whole takes longer than the patience lasts.
        app.before[PutOpen] = [LOST]
        app.after[PutChunk] = [None] * 4 + [LOST]
        await client.put_bytes("a/b", LARGE)
        app.after[GetPart] = [None] * 4 + [LOST]
        app.pace_s = 10.0
        assert await client.get_bytes("a/b") == LARGE

    with_client(body)


def test_a_reader_that_pauses_does_not_use_up_the_patience(with_client, app):
    async def body(client):
        app.store("a/b", LARGE)
        app.after[GetPart] = [None, LOST]
        read = []
        async with client.open_read("a/b") as download:
            async for frames in download:
                read += frames
                await trio.sleep(600)
        assert b"".join(read) == LARGE

    with_client(body)


def test_a_put_that_gets_nowhere_is_tried_as_long_as_the_patience_lasts(with_client, app):
    async def body(client):
        app.before[PutOpen] = [BUSY] * 14
        await client.put_bytes("a/b", LARGE)
        assert app.count(PutOpen) == 15

    with_client(body)


def test_a_put_that_breaks_off_ever_again_ends(with_client, app):
    async def body(client):
        app.after[PutChunk] = [None, LOST] * 100
        with pytest.raises(PeerError):
            await client.put_bytes("a/b", LARGE)
        assert app.count(PutOpen) == 10

    with_client(body)


def test_a_put_that_the_app_has_forgotten_is_made_anew(with_client, app):
    async def body(client):
        app.before[PutChunk] = [StreamGone("there is no such put")]
        await client.put_bytes("a/b", LARGE)
        assert app.files["a/b"][1] == LARGE

    with_client(body)


def test_a_put_that_cannot_be_is_not_made_again(with_client, app):
    async def body(client):
        app.before[PutChunk] = [InvalidRequest("store it in parts")]
        with pytest.raises(InvalidRequest, match="in parts"):
            await client.put_bytes("a/b", LARGE)
        assert app.count(PutOpen) == 1

    with_client(body)


@pytest.mark.parametrize(("data", "kind"), [(b"small", PutSmall), (LARGE, PutChunk)])
@pytest.mark.parametrize("condition", [ANYTHING, Condition(absent=True)])
def test_a_put_whose_answer_was_lost_is_not_made_twice(with_client, app, data, kind, condition):
    async def body(client):
        app.after[kind] = [None] * (app_messages(data) - 1) + [LOST]
        receipt = await client.put_bytes("a/b", data, condition=condition)
        assert receipt.version == app.files["a/b"][0] == VersionId(1, 1)
        assert receipt.blake3 == blake3(data).digest()
        assert "earlier attempt" in receipt.note

    with_client(body)


def app_messages(data):
    return 1 if len(data) <= SMALL_SIZE else -(-len(data) // CHUNK)


def test_somebody_elses_file_is_a_conflict_after_a_lost_answer_too(with_client, app):
    async def body(client):
        app.before[PutSmall] = [LOST]
        app.then[Describe] = lambda: app.store("a/b", b"theirs")
        app.store("a/b", b"theirs")
        with pytest.raises(Conflict):
            await client.put_bytes("a/b", b"ours")
        assert app.files["a/b"][1] == b"theirs"

    with_client(body)


def test_too_few_pools_are_tried_twice_and_not_more(with_client, app):
    async def body(client):
        app.before[PutSmall] = [NotEnoughShards("pools died", ["shard 1"])] * 3
        with pytest.raises(NotEnoughShards) as caught:
            await client.put_bytes("a/b", b"small")
        assert caught.value.missing == ("shard 1",)
        assert app.count(PutSmall) == 2

    with_client(body)


def test_a_source_that_cannot_be_read_again_is_put_once(with_client, app):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    async def body(client):
        app.before[PutSmall] = [LOST]
        with pytest.raises(PeerError):
            await client.put_file("a/b", Pipe(b"once"))
        assert app.count(PutSmall) == 1

    with_client(body)


# -- gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", range(6))
@pytest.mark.parametrize("error", [LOST, StreamGone("there is no such read")])
def test_a_read_goes_on_where_it_was(with_client, app, answered, error):
    async def body(client):
        app.store("a/b", LARGE)
        app.after[GetPart] = [None] * answered + [error]
        read = io.BytesIO()
        await client.get_file("a/b", read)
        assert read.getvalue() == LARGE
        opened = [request for request in app.asked if type(request) is GetOpen]
        if answered < app_messages(LARGE):
            assert opened[1].start == answered * CHUNK
            assert opened[1].version == app.files["a/b"][0]

    with_client(body)


def test_a_range_goes_on_where_it_was(with_client, app):
    async def body(client):
        app.store("a/b", LARGE)
        app.after[GetPart] = [None, LOST]
        assert (
            await client.get_bytes("a/b", start=100, length=SMALL_SIZE + CHUNK)
            == (LARGE[100 : 100 + SMALL_SIZE + CHUNK])
        )

    with_client(body)


def test_a_read_goes_on_over_many_breaks_as_long_as_it_goes_on(with_client, app):
    async def body(client):
        app.store("a/b", LARGE)
        app.before[GetOpen] = [LOST] * 3
        app.after[GetPart] = [None, LOST] * 4
        assert await client.get_bytes("a/b") == LARGE

    with_client(body)


def test_what_was_replaced_before_the_read_could_go_on_is_stale_and_read_anew(with_client, app):
    async def body(client):
        app.store("a/b", LARGE)
        app.after[GetPart] = [None, LOST]
        app.then[GetPart] = lambda: app.store("a/b", LARGE[::-1])
        with pytest.raises(StaleRead, match="replaced"):
            await client.get_file("a/b", io.BytesIO())
        app.after[GetPart] = [None, LOST]
        app.then[GetPart] = lambda: app.store("a/b", b"another")
        assert await client.get_bytes("a/b") == b"another"

    with_client(body)


# -- changes of names ------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("moment", "error"), [("before", LOST), ("before", BUSY), ("after", LOST)])
def test_a_name_is_removed_once(with_client, app, known, moment, error):
    async def body(client):
        version = app.store("a/b", b"x").version
        getattr(app, moment)[Remove] = [error]
        assert await client.remove("a/b", known=version if known else None) == version
        assert app.files == {}
        assert app.count(List) == (0 if known else 1)

    with_client(body)


def test_a_remove_whose_answer_was_lost_leaves_what_was_put_since(with_client, app):
    async def body(client):
        version = app.store("a/b", b"x").version
        app.after[Remove] = [LOST]
        app.then[Remove] = lambda: app.store("a/b", b"of somebody else")
        assert await client.remove("a/b") == version
        assert app.files["a/b"][1] == b"of somebody else"

    with_client(body)


def test_what_was_replaced_just_before_is_removed_all_the_same(with_client, app):
    async def body(client):
        app.store("a/b", b"x")
        app.then[List] = lambda: app.store("a/b", b"y")
        await client.remove("a/b")
        assert app.files == {}

    with_client(body)


@pytest.mark.parametrize("condition", [ANYTHING, Condition(version=VersionId(9, 9))])
def test_a_name_that_is_not_there_is_not_found(with_client, app, condition):
    async def body(client):
        app.store("a/bc", b"x")
        with pytest.raises(NotFound):
            await client.remove("a/b", condition=condition)
        with pytest.raises(NotFound):
            await client.rename("a/b", "a/c")

    with_client(body)


def test_a_condition_on_another_version_is_a_conflict(with_client, app):
    async def body(client):
        app.store("a/b", b"x")
        with pytest.raises(Conflict):
            await client.remove("a/b", condition=Condition(version=VersionId(9, 9)))
        assert "a/b" in app.files

    with_client(body)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_name_is_changed_once(with_client, app, keep, moment):
    async def body(client):
        version = app.store("a/b", b"x").version
        getattr(app, moment)[Rename] = [LOST]
        assert await client.rename("a/b", "a/c", keep=keep) == version
        assert sorted(app.files) == (["a/b", "a/c"] if keep else ["a/c"])
        assert app.count(Rename) == (2 if moment == "before" else 1)

    with_client(body)


def test_a_rename_whose_outcome_nobody_can_tell_is_an_error(with_client, app):
    async def body(client):
        app.store("a/b", b"x")
        app.after[Rename] = [LOST]
        app.then[Rename] = lambda: app.store("a/c", b"of somebody else")
        with pytest.raises(PeerError, match="was lost"):
            await client.rename("a/b", "a/c")
        assert app.files["a/c"][1] == b"of somebody else"

    with_client(body)
