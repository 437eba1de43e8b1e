"""Extents of versions without a record, put together in bounded memory."""

import pytest

from droppexd.client import orphans
from droppexd.client.orphans import Grouper, OrphanListing, OrphanState, OrphanVersion, pools_of
from droppexd.model import EXTENT_CHUNKS, UNKNOWN_PLACE, ExtentId, Layout, VersionId
from droppexd.wire.messages import OrphanExtent, OrphanHeader, OrphanPlace, OrphansListed

CHUNK = 1000
FULL = CHUNK * EXTENT_CHUNKS


def extent(counter, version, *, size=10, shards=6, session=7, name="docs/a", of=None, place=UNKNOWN_PLACE):
    header = OrphanHeader(
        incarnation=bytes(16),
        layout=Layout(4, 2),
        size=size,
        chunk_size=CHUNK,
        version=VersionId(of or session, version),
        name=name,
        place=place,
    )
    places = tuple(OrphanPlace(index, index + 1, True) for index in range(shards))
    return OrphanExtent(id=ExtentId(session, counter), header=header, places=places)


def damaged(counter):
    return OrphanExtent(id=ExtentId(7, counter), header=None, places=(OrphanPlace(0, 1, False),))


def group(*extents):
    grouper = Grouper()
    done = [version for one in extents for version in grouper.add(one)]
    return done, grouper.finish()


def counters(versions):
    return [(one.version and one.version.counter, [e.id.counter for e in one.extents]) for one in versions]


def test_uploads_that_went_side_by_side_are_told_apart():
    done, rest = group(
        extent(3, 1, size=FULL), extent(4, 2, size=FULL), extent(5, 1), extent(7, 6), extent(8, 2)
    )
    assert counters(done) == [(1, [3, 5]), (6, [7]), (2, [4, 8])]
    assert {one.state for one in done} == {OrphanState.WHOLE}
    assert rest == []
    assert (done[0].size, done[0].shards, done[0].sound, done[0].wanted) == (FULL + 10, 12, 12, 12)
    assert done[0].name == "docs/a"


def test_what_ends_with_a_full_extent_may_have_been_cut():
    done, rest = group(extent(3, 1, size=FULL), extent(4, 1, size=FULL))
    assert done == []
    assert counters(rest) == [(1, [3, 4])]
    assert rest[0].state == OrphanState.OPEN


def test_another_session_ends_what_is_open():
    done, rest = group(extent(3, 1, size=FULL), extent(2, 1, session=8))
    assert [(one.version.session, one.state) for one in done] == [
        (7, OrphanState.OPEN),
        (8, OrphanState.WHOLE),
    ]
    assert rest == []


def test_a_version_with_an_extent_that_cannot_be_read_is_incomplete():
    done, _ = group(extent(3, 1, size=FULL, shards=3), extent(4, 1))
    assert [one.state for one in done] == [OrphanState.INCOMPLETE]
    twice = extent(9, 8, shards=3)
    twice = OrphanExtent(
        id=twice.id,
        header=twice.header,
        places=(*twice.places, OrphanPlace(0, 9, True), OrphanPlace(5, 6, False)),
    )
    assert OrphanVersion(VersionId(7, 8), (twice,)).state == OrphanState.INCOMPLETE


def test_a_version_that_goes_on_behind_its_end_is_incomplete():
    assert OrphanVersion(VersionId(7, 1), (extent(3, 1), extent(4, 1))).state == OrphanState.INCOMPLETE


def test_parts_that_tell_their_places_come_together_from_several_sessions():
    done, rest = group(
        extent(4, 1, session=3, of=7, place=1, size=FULL),
        extent(9, 8, session=3),
        extent(2, 1, session=5, of=7, place=0, size=FULL),
        extent(3, 1, place=2),
        extent(4, 2),
    )
    assert [(one.version, one.state) for one in done] == [
        (VersionId(3, 8), OrphanState.WHOLE),
        (VersionId(7, 1), OrphanState.WHOLE),
        (VersionId(7, 2), OrphanState.WHOLE),
    ]
    assert [tuple(one.id) for one in done[1].extents] == [(5, 2), (3, 4), (7, 3)]
    assert rest == []


def test_a_version_that_lacks_a_part_is_not_taken_for_a_whole_one():
    done, rest = group(extent(3, 1, place=1, size=FULL), extent(4, 1, place=2), extent(1, 1, session=8))
    assert [(one.version, one.state) for one in done] == [(VersionId(8, 1), OrphanState.WHOLE)]
    assert [(one.version, one.state) for one in rest] == [(VersionId(7, 1), OrphanState.INCOMPLETE)]


def test_of_two_extents_for_one_place_the_one_that_can_be_read_counts():
    done, rest = group(
        extent(3, 1, place=0, size=FULL, shards=3),
        extent(2, 1, session=8, of=7, place=0, size=FULL, shards=5),
        extent(3, 1, session=8, of=7, place=0, size=FULL, shards=4),
        extent(4, 1, session=8, of=7, place=1),
    )
    assert rest == []
    assert [tuple(one.id) for one in done[0].extents] == [(8, 2), (8, 4)]
    assert done[0].state == OrphanState.WHOLE


def test_damaged_extents_are_told_of_by_themselves():
    done, _ = group(damaged(3), extent(4, 1))
    assert [one.state for one in done] == [OrphanState.DAMAGED, OrphanState.WHOLE]
    assert (done[0].version, done[0].size, done[0].shards, done[0].wanted) == (None, 0, 1, 0)


def test_of_too_many_open_versions_the_first_is_told_of_as_it_is(monkeypatch):
    monkeypatch.setattr(orphans, "MOST_OPEN", 2)
    done, rest = group(*(extent(10 + version, version, size=FULL) for version in (1, 2, 3)))
    assert counters(done) == [(1, [11])]
    assert counters(rest) == [(2, [12]), (3, [13])]


def test_too_many_open_extents_end_the_first_versions(monkeypatch):
    monkeypatch.setattr(orphans, "MOST_OPEN_EXTENTS", 3)
    done, rest = group(
        extent(11, 1, size=FULL), extent(12, 1, size=FULL), extent(13, 2, size=FULL), extent(14, 2, size=FULL)
    )
    assert counters(done) == [(1, [11, 12])]
    assert counters(rest) == [(2, [13, 14])]


def test_the_pools_of_an_extent_are_those_of_all_of_its_shards():
    one = extent(3, 1, shards=2)
    one = OrphanExtent(id=one.id, header=None, places=(*one.places, OrphanPlace(4, 1, False)))
    assert pools_of([one]) == [(ExtentId(7, 3), (1, 2))]


def test_a_listing_goes_on_through_empty_pages_and_collects_who_was_away():
    pages = {
        None: OrphansListed(extents=(extent(3, 1, size=FULL),), away=("a",), next=ExtentId(7, 3)),
        ExtentId(7, 3): OrphansListed(extents=(), away=("b", "a"), next=ExtentId(7, 9)),
        ExtentId(7, 9): OrphansListed(extents=(extent(12, 1),), next=None),
    }

    async def ask(request):
        return pages[request.after]

    listing = OrphanListing(ask)

    async def main():
        return [one async for one in listing]

    with pytest.raises(StopIteration) as stopped:
        main().send(None)
    assert counters(stopped.value.value) == [(1, [3, 12])]
    assert list(listing.away) == ["a", "b"]
