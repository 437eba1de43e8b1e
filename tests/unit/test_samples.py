"""What a release wrote is read by all that come after it: see tests/samples."""

import shutil
from pathlib import Path

import msgpack
import pytest
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.checking import check_catalogue
from droppexd.catalog.copies import open_stopped_catalogue
from droppexd.catalog.records import FORMAT, pack_token, unpack_name, unpack_token
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.catalog.terms import read_history
from droppexd.daemon import system_runtime
from droppexd.errors import CatalogError
from droppexd.model import MISSING, Membership, TokenRecord
from droppexd.roles.log_shipping import read_members
from droppexd.wire.messages import PROTOCOL_VERSION
from tests.samples.make_messages import described

SAMPLES = Path(__file__).parents[1] / "samples"
CATALOGUES = sorted(SAMPLES.glob("catalogue-*.sqlite"))
TERMS = {"catalogue-1.sqlite": 1, "catalogue-2.sqlite": 2}
"""How many masters have written each."""
NAMES = ["docs/again", "docs/degraded", "docs/empty", "docs/grüße", "docs/large", "docs/small"]


def test_there_is_a_sample():
    assert CATALOGUES


@pytest.fixture(params=CATALOGUES, ids=lambda path: path.name)
def sample(request, tmp_path):
    return Path(shutil.copy(request.param, tmp_path / request.param.name))


def test_every_record_of_a_sample_is_sound_and_each_kind_is_there(sample):
    with open_stopped_catalogue(sample) as connection:
        report = check_catalogue(connection, lambda _done, _total: None)
    assert report.problems == []
    assert dict(report.records) == {
        "pools": 4,
        "controllers": 1,
        "sessions": 2,
        "versions": 5,
        "files": 6,
        "extents": 6,
        "degraded": 1,
        "garbage": 1,
        "outcomes": 8,
    }


def test_a_sample_is_opened_and_says_what_was_written(sample):
    async def main():
        runtime = system_runtime()
        async with (
            open_sqlite_engine(sample, runtime) as engine,
            open_catalogue(engine, runtime) as catalogue,
        ):
            history = await read_history(engine)
            assert catalogue.term == history.term == 1 + TERMS[sample.name]
            assert [begun.term for begun in history.begun] == list(range(1, catalogue.term + 1))
            assert (await read_members(engine)).sync == (catalogue.term > 2)
            entries, _ = await catalogue.list_names("", "", 100, recursive=True)
            assert [entry.name for entry in entries] == NAMES
            large, extents = await catalogue.lookup("docs/large")
            assert (large.size, large.blake3, large.names) == (3000, bytes(range(32)), 1)
            assert large.metadata == (("mode", "644"), ("mtime", "1600000000"))
            assert large.created_ms == 1_600_000_000_000
            assert [extent.pools for extent in extents] == [(1, 2, 4)] * 3
            small, _ = await catalogue.lookup("docs/again")
            assert small.names == 2
            _, (degraded,) = await catalogue.lookup("docs/degraded")
            assert degraded.pools == (1, 2, MISSING)
            assert (degraded.layout.k, degraded.layout.m, degraded.size) == (1, 2, 1000)
            empty, none = await catalogue.lookup("docs/empty")
            assert (empty.size, none) == (0, ())
            assert [pool.name for pool in catalogue.pools.values()] == [f"pool-{n}" for n in range(1, 5)]
            assert catalogue.pools[1].zone == "cellar"
            assert catalogue.pools[3].membership == Membership.DRAINING
            assert catalogue.pools[4].checking
            assert catalogue.controllers["north"].address == "tcp://10.0.0.9:7700"
            assert sorted(session.closed for session in catalogue.sessions.values()) == [False, True]
            assert (catalogue.totals.files, catalogue.totals.garbage) == (6, 1)

    trio.run(main)


# -- messages --------------------------------------------------------------------------------------


def records(lines):
    """Return the number of its kind and the fields of every record, by its name."""
    parts = [line.split() for line in lines]
    return {name: (number, fields) for number, name, *fields in parts}


def broken_by(former, present):
    """Return what a neighbour that speaks `former` would take amiss in messages of `present`, and the reverse."""
    amiss = []
    for name, (number, fields) in former.items():
        there = present.get(name)
        if there is None or there[0] != number:
            amiss.append(f"{number} {name} is gone")
            continue
        added = there[1][len(fields) :]
        if there[1][: len(fields)] != fields or not all(field.endswith("=") for field in added):
            amiss.append(f"{name} was {fields} and is {there[1]}")
    return amiss


FORMER = SAMPLES / f"messages-{max(1, PROTOCOL_VERSION - 1)}.txt"


def test_neighbouring_releases_understand_each_other_s_messages():
    """A field may only be added, behind the others and with a default, and no kind taken away: see ADR 12."""
    assert broken_by(records(FORMER.read_text().splitlines()), records(described())) == []


def test_each_version_of_the_protocol_has_its_sample():
    names = {f"messages-{version}.txt" for version in range(1, PROTOCOL_VERSION + 1)}
    assert names == {path.name for path in SAMPLES.glob("messages-*.txt")}


@pytest.mark.parametrize(
    ("present", "amiss"),
    [
        ("3 Ping\n4 Pong role name= \n9 New a", 0),
        ("3 Ping\n4 Pong role name= added=", 0),
        ("3 Ping\n4 Pong role name= added", 1),
        ("3 Ping\n4 Pong name= role", 1),
        ("3 Ping\n4 Pong role", 1),
        ("3 Ping\n4 Pong role name", 1),
        ("4 Pong role name=", 1),
        ("5 Ping\n4 Pong role name=", 1),
    ],
)
def test_what_neighbours_would_not_understand_is_found(present, amiss):
    former = records(["3 Ping", "4 Pong role name="])
    assert len(broken_by(former, records(present.splitlines()))) == amiss


# -- records of the next release -------------------------------------------------------------------


def test_a_record_of_a_newer_release_with_more_fields_is_read():
    token = TokenRecord(public=bytes(40), roles=("pool",), expires_ms=5, uses=1)
    longer = msgpack.packb([*msgpack.unpackb(pack_token(token)), "new"])
    assert unpack_token(token.public, longer) == token


def test_a_record_of_an_unknown_format_is_refused_in_one_line():
    newer = msgpack.packb([FORMAT + 1, "whatever"])
    with pytest.raises(CatalogError, match=rf"of format {FORMAT + 1} .* this release reads {FORMAT}"):
        unpack_name(newer)
