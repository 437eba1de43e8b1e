"""What `droppex orphans` makes of its command line and of what it is told."""

import io
import json
from contextlib import redirect_stderr

import pytest
import trio

from droppexd.cli.client_orphans import adopt_versions, choose, count_versions, drop_versions, list_versions
from droppexd.cli.client_session import Session
from droppexd.cli.exits import UsageError
from droppexd.cli.render import Output
from droppexd.client.orphans import OrphanListing
from droppexd.errors import Conflict, NotEnoughShards, NotFound
from droppexd.model import EXTENT_CHUNKS, ExtentId, Layout, Receipt, VersionId
from droppexd.wire.messages import OrphanExtent, OrphanHeader, OrphanPlace, OrphansListed

CHUNK = 1000
FULL = CHUNK * EXTENT_CHUNKS


def extent(counter, version, *, size=10, shards=3, name="docs/a"):
    header = OrphanHeader(
        incarnation=bytes(16),
        layout=Layout(2, 1),
        size=size,
        chunk_size=CHUNK,
        version=VersionId(7, version),
        name=name,
    )
    places = tuple(OrphanPlace(index, index + 1, True) for index in range(shards))
    return OrphanExtent(id=ExtentId(7, counter), header=header, places=places)


WHOLE = extent(2, 1, name="docs/whole\x1b[31m")
OPEN = extent(4, 3, size=FULL, name="docs/open")
INCOMPLETE = extent(6, 5, shards=1, name="docs/incomplete")
DAMAGED = OrphanExtent(id=ExtentId(7, 8), header=None, places=(OrphanPlace(0, 1, False),))
ALL = (WHOLE, OPEN, INCOMPLETE, DAMAGED)


class FakeClient:
    """A client of a cluster that has these orphans."""

    def __init__(self, extents=ALL, away=(), refused=()):
        self.extents = extents
        self.away = away
        self.refused = refused
        self.adopted = []
        self.dropped = []

    def orphans(self, *, after=None):
        async def ask(request):
            await trio.lowlevel.checkpoint()
            left = [one for one in self.extents if request.after is None or one.id > request.after]
            return OrphansListed(
                extents=tuple(left[:1]), away=self.away, next=left[0].id if left[1:] else None
            )

        return OrphanListing(ask, after)

    async def adopt_orphan(self, orphan, *, folder):
        await trio.lowlevel.checkpoint()
        self.adopted.append(orphan.version)
        return Receipt(
            name=f"{folder}/{orphan.name}",
            version=orphan.version,
            size=orphan.size,
            blake3=bytes(32),
            layout="2+1",
            survives_pools=1,
            survives_machines=1,
        )

    async def drop_orphans(self, extents):
        await trio.lowlevel.checkpoint()
        self.dropped += [one.id.counter for one in extents]
        return self.refused


def run(work, *arguments, client=None, as_json=False, **options):
    """Do a command's work; return its exit code, or its error, and what it printed."""
    stdout, stderr = io.StringIO(), io.StringIO()
    session = Session(
        client or FakeClient(), Output(quiet=False, as_json=as_json, stdout=stdout, stderr=stderr)
    )

    async def main():
        return await work(session, *arguments, **options)

    with redirect_stderr(stderr):
        code = trio.run(main)
    return code, stdout.getvalue(), stderr.getvalue()


def everything():
    return choose([], everything=True)


def some(*versions):
    return choose(versions, everything=False)


def test_versions_are_written_as_they_are_listed():
    assert some("7-1", "abc-ffffffffffff").versions == {VersionId(7, 1), VersionId(0xABC, 2**48 - 1)}
    assert everything().everything


@pytest.mark.parametrize(
    "text", ["", "7", "7-", "-1", "7-1-2", "7-g", "7-1000000000000", "7_0-1", "docs/a", "7-１"]
)
def test_what_is_no_version_is_wrong_usage(text):
    with pytest.raises(UsageError):
        some(text)


@pytest.mark.parametrize(("texts", "all_of_them"), [([], False), (["7-1"], True)])
def test_either_some_or_all_are_meant(texts, all_of_them):
    with pytest.raises(UsageError):
        choose(texts, everything=all_of_them)


def test_the_list_for_people_is_aligned_and_moves_no_cursor():
    code, said, noted = run(list_versions, exact=True, client=FakeClient(away=("pool-3",)))
    lines = said.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["VERSION", "7-1", "extent", "7-3", "7-5"] or [
        line.split()[0] for line in lines
    ] == ["VERSION", "7-1", "7-5", "extent", "7-3"]
    whole = next(line for line in lines if line.startswith("7-1"))
    assert whole.split()[1:5] == ["10", "1", "3/3", "whole"]
    assert len({line.index(word) for line, word in zip(lines[:2], ("STATE", "whole"), strict=True)}) == 1
    assert "pool-3" in noted


def test_the_list_for_programs():
    _, said, _ = run(list_versions, exact=False, as_json=True)
    found = {orphan["state"]: orphan for orphan in json.loads(said)}
    assert set(found) == {"whole", "open", "incomplete", "damaged"}
    assert found["open"] == {
        "version": "7-3",
        "state": "open",
        "name": "docs/open",
        "size": FULL,
        "shards": 3,
        "session": "7",
        "incarnation": "00" * 16,
        "extents": [
            {
                "id": "7-4",
                "layout": "2+1",
                "size": FULL,
                "shards": [{"index": n, "pool": n + 1, "agrees": True} for n in range(3)],
            }
        ],
    }
    assert (found["damaged"]["version"], found["damaged"]["name"]) == (None, None)


def test_all_that_can_be_read_is_adopted():
    client = FakeClient()
    code, said, noted = run(adopt_versions, everything(), "lost+found", force=False, client=client)
    assert code == 0
    assert set(client.adopted) == {VersionId(7, 1), VersionId(7, 3)}
    assert "lost+found/docs/open" in said
    assert "perhaps cut" in said
    assert "\x1b" not in said
    assert "2 versions cannot be read" in noted


def test_what_was_named_and_cannot_be_read_is_an_error():
    client = FakeClient()
    code, _, told = run(adopt_versions, some("7-5"), "lost+found", force=False, client=client)
    assert code == 5
    assert "extent 7-6: 1 of the 2" in told
    assert client.adopted == []


def test_what_was_named_and_is_not_there_is_not_found():
    with pytest.RaisesGroup(NotFound):
        run(adopt_versions, some("7-1", "7-9"), "lost+found", force=False)
    with pytest.raises(NotFound, match="7-9"):
        run(drop_versions, some("7-9"))
    with pytest.raises(NotFound, match="7-9"):
        run(count_versions, some("7-9"))
    with pytest.raises(NotEnoughShards) as caught:
        run(drop_versions, some("7-9"), client=FakeClient(away=("pool-3",)))
    assert caught.value.missing == ("pool pool-3",)


def test_while_pools_are_away_nothing_is_adopted_without_force():
    client = FakeClient(away=("pool-3",))
    code, _, told = run(adopt_versions, some("7-1"), "lost+found", force=False, client=client)
    assert (code, client.adopted) == (5, [])
    assert "pool pool-3" in told
    code, _, _ = run(adopt_versions, some("7-1"), "lost+found", force=True, client=client)
    assert (code, client.adopted) == (0, [VersionId(7, 1)])


def test_everything_is_dropped_the_damaged_too():
    client = FakeClient()
    code, said, _ = run(drop_versions, everything(), client=client)
    assert (code, sorted(client.dropped)) == (0, [2, 4, 6, 8])
    assert "dropped 4 versions" in said


def test_of_what_was_named_nothing_else_is_dropped():
    client = FakeClient()
    run(drop_versions, some("7-5", "7-1"), client=client)
    assert sorted(client.dropped) == [2, 6]


def test_what_the_master_refuses_is_told():
    with pytest.raises(Conflict, match="7-2"):
        run(drop_versions, everything(), client=FakeClient(refused=(ExtentId(7, 2),)))


def test_the_question_says_how_much_it_is():
    amount, _, _ = run(count_versions, everything())
    assert str(amount) == "8 shards of 4 versions, 62.5 KiB"
