"""The words of the design: names, ids, layouts, sizes, and what records say of themselves."""

import pytest

from droppexd.errors import InvalidName, InvalidRequest
from droppexd.model import (
    MAX_K,
    MAX_M,
    MISSING,
    ClusterMap,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolInfo,
    ShardHeader,
    VersionId,
    chunk_length,
    normal_name,
    normal_prefix,
    piece_size,
    shard_size,
)


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "folder/with spaces/and more",
        "folder/🙂",
        "folder/new\nline",
        "folder/-rf",
        "-dash/--dashes",
        "folder/...",
        "folder/.hidden",
        "folder/a..b",
        "folder/ ",
        "folder/back\\slash",
        "folder/\x01\x7f",
        "folder/e\u0301",
        "f/" + "x" * 1022,
        "f/" + "é" * 511,
    ],
)
def test_a_name_with_a_folder_stays_as_it_is(name):
    assert normal_name(name) == name


@pytest.mark.parametrize("name", ["file", "-", "...", "🙂", "a\nb", "x" * 1018])
def test_a_name_without_a_folder_goes_to_files(name):
    assert normal_name(name) == f"files/{name}"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("/a", "empty part"),
        ("a/", "empty part"),
        ("a//b", "empty part"),
        ("/", "empty part"),
        (".", "not allowed"),
        ("..", "not allowed"),
        ("a/./b", "not allowed"),
        ("a/..", "not allowed"),
        ("../a", "not allowed"),
        ("a/b\0c", "NUL"),
        ("\0", "NUL"),
        ("a/\udc80", "UTF-8"),
        ("\ud83d", "UTF-8"),
        ("f/" + "x" * 1023, "1025 bytes"),
        ("f/" + "é" * 512, "1026 bytes"),
        ("x" * 1019, "1025 bytes"),
    ],
)
def test_a_name_that_breaks_a_rule_is_refused_with_the_reason(name, why):
    with pytest.raises(InvalidName, match=why):
        normal_name(name)


@pytest.mark.parametrize(
    "prefix", ["", "a/.", "a/..", "a/.h", ".", "..x", "a", "a/", "a/b", "a/b/", "a/.hid", "🙂/"]
)
def test_a_listing_prefix_may_end_anywhere(prefix):
    assert normal_prefix(prefix) == prefix


@pytest.mark.parametrize("prefix", ["/", "/a", "a//b", "a/../b", "a\0", "\udc80"])
def test_a_prefix_that_no_name_has_is_refused(prefix):
    with pytest.raises(InvalidName):
        normal_prefix(prefix)


def test_ids_of_different_kinds_tell_themselves_in_hex():
    assert str(ExtentId(255, 16)) == str(VersionId(255, 16)) == "ff-10"
    assert type(OperationId.from_bytes(OperationId(1, 2).to_bytes())) is OperationId


@pytest.mark.parametrize("text", ["4+2", "1+0", "32+8", "10+4"])
def test_a_layout_is_written_as_it_is_read(text):
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "4", "+", "4+", "+2", "0+2", "33+2", "4+9", "4+2+1", "-4+2", "4 + 2", "a+b", "٤+٢", "1e1+2"]
)
def test_a_layout_that_cannot_be_is_refused(text):
    with pytest.raises(InvalidRequest):
        Layout.parse(text)


def test_an_acknowledged_write_survives_a_loss_unless_nothing_ever_does():
    assert Layout(4, 2).least == 5
    assert Layout(1, 1).least == 2
    assert Layout(1, 0).least == 1
    assert Layout(MAX_K, MAX_M).total == 40


def extent(pools, layout=Layout(4, 2)):  # noqa: B008  A layout is a value.
    return Extent(id=ExtentId(1, 1), layout=layout, size=10, chunk_size=10, pools=pools)


def test_an_extent_counts_what_is_there():
    assert extent((1, 2, 3, 4, 5, 6)).survives == 2
    assert extent((1, MISSING, 3, 4, MISSING, 6)).present == 4
    assert extent((1, MISSING, 3, 4, MISSING, MISSING)).survives == -1


def test_a_header_knows_where_each_piece_is():
    header = ShardHeader(
        incarnation=bytes(16),
        extent=ExtentId(1, 1),
        index=0,
        layout=Layout(4, 2),
        size=2 * 1000 + 5,
        chunk_size=1000,
        checksums=(bytes(16),) * 3,
        version=VersionId(1, 2),
    )
    assert [header.piece_range(chunk) for chunk in range(3)] == [(0, 250), (250, 250), (500, 2)]
    assert header.stored_size == 502


def test_five_bytes_in_four_pieces_are_two_each():
    assert piece_size(5, 4) == 2
    assert shard_size(5, 100, 4) == 2
    assert chunk_length(205, 100, 2) == 5


def pool(number, state="up", membership="member"):
    return PoolInfo(
        number=number,
        pool_id=bytes(16),
        name=f"pool-{number}",
        machine="m",
        zone="",
        address="tcp://127.0.0.1:1",
        state=state,
        membership=membership,
        capacity=1,
        free=1,
    )


@pytest.mark.parametrize(
    ("state", "membership", "readable", "writable"),
    [
        ("up", "member", True, True),
        ("up", "draining", True, False),
        ("up", "removed", True, False),
        ("read-only", "member", True, False),
        ("down", "member", False, False),
        ("out", "member", False, False),
        ("of a newer release", "member", False, False),
    ],
)
def test_what_a_pool_is_good_for(state, membership, readable, writable):
    assert (pool(1, state, membership).readable, pool(1, state, membership).writable) == (readable, writable)


def test_a_map_finds_pools_by_number():
    cluster = ClusterMap(
        cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=(pool(3), pool(7))
    )
    assert cluster.pool(7) is cluster.pools[1]
    assert cluster.pool(4) is None
