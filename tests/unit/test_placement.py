"""Placement: the table of layouts, the ladder, and where shards go when pools are away."""

import itertools

import pytest

from droppexd.errors import NotEnoughShards
from droppexd.model import MISSING, Extent, ExtentId, Layout, PoolInfo
from droppexd.placement import (
    SETS,
    Placement,
    choose_layout,
    small_layout,
    survives,
    usable_space,
    writable_layout,
)


def make_pool(number, machine=None, zone="", capacity=1000, state="up", membership="member"):
    return PoolInfo(
        number=number,
        pool_id=number.to_bytes(16),
        name=f"pool-{number}",
        machine=machine or f"machine-{number}",
        zone=zone,
        address="tcp://127.0.0.1:1",
        state=state,
        membership=membership,
        capacity=capacity,
        free=capacity,
    )


def make_pools(count, **options):
    return [make_pool(number, **options) for number in range(1, count + 1)]


def everyone(_pool):
    return True


@pytest.mark.parametrize(
    ("count", "layout"),
    [
        (0, "1+0"),
        (1, "1+0"),
        (2, "1+1"),
        (3, "2+1"),
        (4, "2+2"),
        (5, "3+2"),
        (6, "4+2"),
        (9, "4+2"),
        (10, "8+3"),
        (30, "8+3"),
    ],
)
def test_auto_layout_follows_the_table_by_machines_and_on_one_machine_by_pools(count, layout):
    assert str(choose_layout(make_pools(count), None)) == layout
    assert str(choose_layout(make_pools(count, machine="one"), None)) == layout


def test_auto_layout_counts_machines_and_not_pools_once_there_are_two():
    pools = [make_pool(number, machine=f"m{number % 2}") for number in range(1, 7)]
    assert choose_layout(pools, None) == Layout(1, 1)


def test_auto_layout_does_not_ask_who_is_up_but_leaves_out_who_is_leaving():
    pools = make_pools(6, state="down")
    assert choose_layout(pools, None) == Layout(4, 2)
    pools[5] = make_pool(6, membership="draining")
    assert choose_layout(pools, None) == Layout(3, 2)


def test_a_wanted_layout_is_taken_as_it_is():
    assert choose_layout(make_pools(2), Layout(4, 2)) == Layout(4, 2)


def test_small_files_survive_as_many_losses_as_large_ones():
    assert small_layout(Layout(4, 2)) == Layout(1, 2)
    assert small_layout(Layout(1, 0)) == Layout(1, 0)


@pytest.mark.parametrize(
    ("layout", "writable", "taken"),
    [
        ("4+2", 6, "4+2"),
        ("4+2", 5, "4+2"),
        ("4+2", 4, "3+2"),
        ("4+2", 3, "2+2"),
        ("4+2", 2, "1+1"),
        ("8+3", 9, "8+3"),
        ("8+3", 8, "4+2"),
        ("8+3", 5, "4+2"),
        ("2+1", 2, "1+1"),
        ("1+2", 2, "1+2"),
        ("5+3", 5, "4+2"),
        ("1+0", 1, "1+0"),
    ],
)
def test_a_write_steps_down_the_ladder_only_when_it_must(layout, writable, taken):
    chosen, note = writable_layout(Layout.parse(layout), writable)
    assert str(chosen) == taken
    assert bool(note) == (taken != layout)
    assert chosen.m == 0 or writable > chosen.k


@pytest.mark.parametrize(("layout", "writable"), [("4+2", 1), ("4+2", 0), ("1+2", 1), ("1+0", 0)])
def test_a_write_that_would_survive_no_loss_is_refused(layout, writable):
    with pytest.raises(NotEnoughShards):
        writable_layout(Layout.parse(layout), writable)


def test_shards_stay_where_they_are_when_others_fail():
    placement = Placement(make_pools(9))
    layout = Layout(4, 2)
    for counter in range(50):
        extent = ExtentId(1, counter)
        whole = placement.choose(extent, layout, everyone)
        assert whole == placement.order(extent, layout)[:6]
        lost = {whole[1], whole[4]}
        chosen = placement.choose(extent, layout, lambda pool, lost=lost: pool not in lost)
        kept = [index for index in range(6) if index not in (1, 4)]
        assert [chosen[index] for index in kept] == [whole[index] for index in kept]
        assert lost.isdisjoint(chosen)
        assert len(set(chosen)) == 6


def test_missing_stands_where_no_pool_is_left():
    placement = Placement(make_pools(6))
    chosen = placement.choose(ExtentId(1, 1), Layout(4, 2), lambda pool: pool > 2)
    assert chosen.count(MISSING) == 2
    assert set(chosen) == {MISSING, 3, 4, 5, 6}


def test_a_layout_larger_than_the_cluster_leaves_the_rest_missing():
    chosen = Placement(make_pools(3)).choose(ExtentId(1, 1), Layout(4, 2), everyone)
    assert sorted(chosen) == [MISSING] * 3 + [1, 2, 3]


def test_a_cluster_without_members_places_nothing():
    placement = Placement([make_pool(1, membership="removed")])
    assert placement.order(ExtentId(1, 1), Layout(1, 1)) == ()
    assert placement.choose(ExtentId(1, 1), Layout(1, 1), everyone) == (MISSING, MISSING)


def test_fall_backs_go_to_other_machines_while_there_are_any():
    pools = [make_pool(number, machine=f"m{(number - 1) // 2}") for number in range(1, 13)]
    placement = Placement(pools)
    layout = Layout(2, 2)
    for counter, lost in itertools.product(range(30), range(1, 13)):
        chosen = placement.choose(ExtentId(2, counter), layout, lambda pool, lost=lost: pool != lost)
        assert len({(pool - 1) // 2 for pool in chosen}) == 4


def test_a_second_shard_on_a_machine_beats_none():
    pools = [make_pool(number, machine=f"m{(number - 1) // 2}") for number in range(1, 9)]
    chosen = Placement(pools).choose(ExtentId(1, 1), Layout(2, 2), lambda pool: pool in (1, 2, 3, 4))
    assert sorted(chosen) == [1, 2, 3, 4]


def test_a_zone_is_not_lost_with_more_than_m_shards_while_others_can_hold_them():
    pools = [make_pool(number, zone=f"z{number % 3}") for number in range(1, 13)]
    placement = Placement(pools)
    for counter in range(100):
        chosen = placement.choose(ExtentId(1, counter), Layout(4, 2), everyone)
        assert max(sum(pool % 3 == zone for pool in chosen) for zone in range(3)) == 2


def test_pools_of_unknown_capacity_are_placed_alike():
    placement = Placement(make_pools(8, capacity=0))
    used = {pool for n in range(200) for pool in placement.choose(ExtentId(1, n), Layout(2, 1), everyone)}
    assert used == set(range(1, 9))


def test_a_map_with_other_states_and_free_space_places_alike():
    extent, layout = ExtentId(3, 9), Layout(4, 2)
    before = Placement(make_pools(9)).order(extent, layout)
    assert Placement(reversed(make_pools(9, state="down"))).order(extent, layout) == before


def test_placement_of_an_extent_never_changes_with_a_release():
    """Otherwise an upgrade would make every extent look misplaced."""
    order = Placement(make_pools(8)).order(ExtentId(7, 42), Layout(4, 2))
    assert order == (8, 5, 6, 1, 7, 2, 3, 4)


@pytest.fixture
def extent():
    return Extent(id=ExtentId(1, 1), layout=Layout(4, 2), size=10, chunk_size=10, pools=(1, 2, 3, 4, 5, 6))


def test_survival_is_told_in_pools_and_in_machines(extent):
    assert survives(extent, everyone, lambda pool: f"m{pool}") == (2, 2)
    assert survives(extent, everyone, lambda pool: f"m{pool // 2}") == (2, 1)
    assert survives(extent, everyone, lambda _pool: "one") == (2, 0)
    assert survives(extent, lambda pool: pool != 3, lambda pool: f"m{pool}") == (1, 1)


def test_survival_below_zero_is_the_number_of_shards_that_lack(extent):
    assert survives(extent, lambda pool: pool > 3, lambda pool: f"m{pool}") == (-1, -1)


def test_a_missing_shard_is_on_no_pool(extent):
    pools = (1, MISSING, 3, 4, 5, MISSING)
    gone = Extent(id=extent.id, layout=extent.layout, size=10, chunk_size=10, pools=pools)
    assert survives(gone, everyone, lambda pool: f"m{pool}") == (0, 0)


# -- pools of all sizes ------------------------------------------------------------------------------

SHARD = 64 * 1024**2
SMALL_DISK, LARGE_DISK = 10 * 10**9, 10**12


def put_full(layout, disks):
    """Put extents of whole shards until one does not get all of its shards.

    Return how many bytes were stored, and how many shards each pool had when half of all room was taken.
    """
    placement = Placement([make_pool(number, capacity=size) for number, size in disks.items()])
    left = {number: size // SHARD for number, size in disks.items()}
    half, at_half = sum(left.values()) // 2, {}
    for counter in itertools.count():
        if not at_half and counter * layout.total >= half:
            at_half = {number: size // SHARD - left[number] for number, size in disks.items()}
        chosen = placement.choose(ExtentId(1, counter), layout, left.__getitem__)
        if MISSING in chosen:
            break
        for pool in chosen:
            left[pool] -= 1
    return counter * layout.k * SHARD, at_half


@pytest.mark.parametrize("layout", [Layout(4, 2), Layout(2, 1), Layout(1, 1)])
def test_pools_of_10_gb_beside_1_tb_fill_in_proportion_until_nearly_all_is_used(layout):
    disks = {number: SMALL_DISK if number % 2 else LARGE_DISK for number in range(1, 13)}
    room = usable_space([make_pool(number, capacity=size) for number, size in disks.items()], layout)
    assert room > 0.95 * sum(disks.values()) * layout.k / layout.total
    stored, at_half = put_full(layout, disks)
    assert stored >= 0.95 * room
    slot = sum(at_half.values()) / layout.total / SETS  # Extents of one of the sets that a pool stands in.
    for pool, shards in at_half.items():
        assert shards == pytest.approx(disks[pool] / SHARD / 2, abs=1.5 * slot, rel=0.05)
