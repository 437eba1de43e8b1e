"""What shards without a record say together."""

import itertools

import pytest

from droppexd.errors import InvalidName, InvalidRequest, NotEnoughShards
from droppexd.model import EXTENT_CHUNKS, MISSING, UNKNOWN_PLACE, ExtentId, Holding, Layout, VersionId
from droppexd.roles.orphans import adopted_name, assign_pools, check_whole, describe_extent
from droppexd.wire.messages import MAX_HOLDERS, OrphanExtent, OrphanHeader, OrphanPlace, OrphanShard

EXTENT = ExtentId(7, 3)
VERSION = VersionId(7, 1)
CHUNK = 1000
FULL = CHUNK * EXTENT_CHUNKS


def header(*, layout="2+1", size=10, version=VERSION, name="docs/a", incarnation=1, place=UNKNOWN_PLACE):
    return OrphanHeader(
        incarnation=bytes([incarnation]) * 16,
        layout=Layout.parse(layout),
        size=size,
        chunk_size=CHUNK,
        version=version,
        name=name,
        place=place,
    )


def shard(index, told):
    return OrphanShard(Holding(EXTENT, index, 1), told)


def test_shards_agree_whatever_their_incarnation_and_name_say():
    shards = [(1, shard(0, header(name=""))), (2, shard(1, header(incarnation=2))), (3, shard(2, header()))]
    for order in itertools.permutations(shards):
        found = describe_extent(EXTENT, order)
        assert found.places == (
            OrphanPlace(0, 1, True),
            OrphanPlace(1, 2, True),
            OrphanPlace(2, 3, True),
        )
        assert found.header.name == "docs/a"


def test_what_most_shards_say_counts():
    shards = [
        (1, shard(0, header(size=99))),
        (2, shard(1, header())),
        (3, shard(2, header())),
        (4, shard(0, None)),
    ]
    for order in itertools.permutations(shards):
        found = describe_extent(EXTENT, order)
        assert found.header.size == 10
        assert found.places[:2] == (OrphanPlace(1, 2, True), OrphanPlace(2, 3, True))
        assert not any(place.agrees for place in found.places[2:])


def test_one_shard_on_many_pools_does_not_outvote_two():
    same = [(pool, shard(0, header(size=99))) for pool in range(10, 20)]
    found = describe_extent(EXTENT, [*same, (1, shard(1, header())), (2, shard(2, header()))])
    assert found.header.size == 10


def test_an_index_beyond_the_layout_counts_for_nothing():
    found = describe_extent(EXTENT, [(1, shard(3, header())), (2, shard(0, header()))])
    assert found.places == (OrphanPlace(0, 2, True), OrphanPlace(3, 1, False))


def test_without_a_readable_header_nothing_is_known():
    found = describe_extent(EXTENT, [(1, shard(0, None))])
    assert (found.header, found.places) == (None, (OrphanPlace(0, 1, False),))


def test_of_too_many_holders_those_that_agree_are_told():
    shards = [(pool, shard(0, None)) for pool in range(100)] + [(200, shard(1, header()))]
    found = describe_extent(EXTENT, shards)
    assert len(found.places) == MAX_HOLDERS
    assert found.places[0] == OrphanPlace(1, 200, True)


def test_a_pool_is_named_for_one_shard_alone():
    layout = Layout(2, 2)
    assert assign_pools(layout, {0: [1], 1: [2], 3: [4]}) == (1, 2, MISSING, 4)
    assert assign_pools(layout, {0: [1, 2], 1: [1]}) == (2, 1, MISSING, MISSING)
    assert assign_pools(layout, {0: [1], 1: [1], 2: [1]}) == (1, MISSING, MISSING, MISSING)
    assert assign_pools(layout, {}) == (MISSING,) * 4


def extent(counter, *, present=2, session=7, **said):
    told = header(**said)
    places = tuple(OrphanPlace(index, index + 1, True) for index in range(present))
    return OrphanExtent(id=ExtentId(session, counter), header=told, places=places)


def test_what_one_shard_tells_of_name_and_place_is_taken():
    told = [header(), header(name="", place=3), header(name="docs/b", place=3)]
    for order in itertools.permutations(told):
        found = describe_extent(EXTENT, [(pool, shard(pool, one)) for pool, one in enumerate(order)])
        assert (found.header.name, found.header.place) == ("docs/b", 3)
        assert all(place.agrees for place in found.places)


def test_extents_in_order_of_which_all_but_the_last_are_full_are_whole():
    extents = [extent(2, size=FULL), extent(9, size=FULL), extent(11)]
    assert check_whole(VERSION, extents) == tuple(one.header for one in extents)
    assert len(check_whole(VERSION, extents[:2])) == 2


@pytest.mark.parametrize(
    "extents",
    [
        [extent(2), extent(3)],
        [extent(3, size=FULL), extent(2)],
        [extent(2, size=FULL), extent(2)],
        [extent(1)],
        [extent(2, version=VersionId(7, 0))],
        [extent(2, place=1)],
        [extent(2, size=FULL, place=0), extent(3, place=2)],
        [extent(2, size=FULL, place=0), extent(3, session=8)],
    ],
    ids=[
        "not full",
        "not in order",
        "twice",
        "before its version",
        "of another version",
        "not the first",
        "one is missing",
        "of another session, and who knows where",
    ],
)
def test_extents_that_are_no_version_are_refused(extents):
    with pytest.raises(InvalidRequest):
        check_whole(VERSION, extents)


def test_extents_that_tell_their_places_may_be_of_any_session():
    extents = [extent(2, session=9, size=FULL, place=0), extent(5, size=FULL), extent(1, session=8, place=2)]
    assert check_whole(VERSION, extents) == tuple(one.header for one in extents)


def test_too_few_shards_are_named():
    with pytest.raises(NotEnoughShards, match="1 of its shards") as caught:
        check_whole(VERSION, [extent(2, size=FULL), extent(3, present=1)])
    assert caught.value.missing == ("extent 7-3 shard 1", "extent 7-3 shard 2")
    with pytest.raises(NotEnoughShards, match="no header"):
        check_whole(VERSION, [OrphanExtent(id=ExtentId(7, 2), header=None, places=())])


@pytest.mark.parametrize(
    ("folder", "hint", "name"),
    [
        ("lost+found", "docs/a", "lost+found/docs/a"),
        ("found/again/", "docs/a", "found/again/docs/a"),
        ("lost+found", "", "lost+found/7-1"),
        ("lost+found", "../a", "lost+found/7-1"),
        ("lost+found", "a\0b", "lost+found/7-1"),
    ],
)
def test_the_name_is_the_old_one_below_the_folder(folder, hint, name):
    assert adopted_name(folder, hint, VERSION) == name


def test_a_long_name_leaves_room_to_make_it_unique():
    name = adopted_name("lost+found", "docs/" + "ä" * 509, VERSION)
    assert name.startswith("lost+found/docs/ä")
    assert 950 < len(name.encode()) <= 960


def test_a_folder_that_cannot_be_is_refused():
    for folder in ("", "/", "a//b", "../a", "x" * 1024):
        with pytest.raises(InvalidName):
            adopted_name(folder, "docs/a", VERSION)
