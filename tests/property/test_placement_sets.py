"""What placement promises for any cluster: balance, limits, stability."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.model import MISSING, ExtentId, Layout, PoolInfo
from droppexd.placement import SETS, Placement, usable_space

LAYOUTS = st.sampled_from(
    [Layout(1, 1), Layout(1, 2), Layout(2, 1), Layout(2, 2), Layout(4, 2), Layout(8, 3)]
)


def make_pool(number, capacity=1000, machine="", zone=""):
    return PoolInfo(
        number=number,
        pool_id=number.to_bytes(16),
        name=f"pool-{number}",
        machine=machine or f"machine-{number}",
        zone=zone,
        address="tcp://127.0.0.1:1",
        state="up",
        membership="member",
        capacity=capacity,
        free=capacity,
    )


@st.composite
def clusters(draw, least=1, most=20, machines=True, zones=True):
    numbers = sorted(draw(st.sets(st.integers(1, 500), min_size=least, max_size=most)))
    many = draw(st.integers(1, len(numbers)))
    zone_count = draw(st.integers(1, 4))
    pools = []
    for number in numbers:
        machine = draw(st.integers(1, many)) if machines else number
        zone = f"z{machine % zone_count}" if zones else ""
        capacity = draw(st.integers(500, 4000))
        pools.append(make_pool(number, capacity=capacity, machine=f"m{machine}", zone=zone))
    return pools


def one_extent_of_each_set(placement, layout):
    """Return orders such that each of the placement sets is there once."""
    return placement._table(layout).orders


def chosen_sets(pools, layout):
    return [order[: layout.total] for order in one_extent_of_each_set(Placement(pools), layout)]


def least_limit(rooms, least, size):
    limit = least
    while sum(min(limit, room) for room in rooms) < size:
        limit += 1
    return limit


@settings(max_examples=40, deadline=None)
@given(pools=clusters(), layout=LAYOUTS)
def test_an_order_names_each_member_once_and_sets_are_full(pools, layout):
    numbers = {pool.number for pool in pools}
    orders = one_extent_of_each_set(Placement(pools), layout)
    assert len(orders) == SETS
    for order in orders:
        assert len(order) == len(numbers)
        assert set(order) == numbers


@settings(max_examples=40, deadline=None)
@given(pools=clusters(), layout=LAYOUTS)
def test_machines_and_zones_hold_no_more_shards_than_they_must(pools, layout):
    machine_of = {pool.number: pool.machine for pool in pools}
    zone_of = {pool.number: pool.zone for pool in pools}
    size = min(layout.total, len(pools))
    per_machine = Counter(machine_of.values())
    machine_limit = least_limit(per_machine.values(), 1, size)
    assert machine_limit >= -(-size // len(per_machine))
    rooms = Counter()
    for machine, zone in {(pool.machine, pool.zone) for pool in pools}:
        rooms[zone] += min(machine_limit, per_machine[machine])
    zone_limit = least_limit(rooms.values(), layout.m, size)
    for chosen in chosen_sets(pools, layout):
        assert max(Counter(map(machine_of.__getitem__, chosen)).values()) <= machine_limit
        assert max(Counter(map(zone_of.__getitem__, chosen)).values()) <= zone_limit


@settings(max_examples=40, deadline=None)
@given(pools=clusters(least=2, machines=False, zones=False), layout=LAYOUTS)
def test_pools_are_in_as_many_sets_as_their_capacity_entitles_them_to_within_one(pools, layout):
    counts = Counter(pool for chosen in chosen_sets(pools, layout) for pool in chosen)
    places = SETS * min(layout.total, len(pools))
    # A pool can be in each set once; what it is entitled to beyond that goes to the others by weight.
    share, open_pools, left = {}, list(pools), places
    while open_pools:
        weight = sum(pool.capacity for pool in open_pools)
        full = [pool for pool in open_pools if left * pool.capacity >= SETS * weight]
        if not full:
            share |= {pool.number: left * pool.capacity / weight for pool in open_pools}
            break
        share |= dict.fromkeys((pool.number for pool in full), SETS)
        left -= SETS * len(full)
        open_pools = [pool for pool in open_pools if pool not in full]
    for pool in pools:
        assert abs(counts[pool.number] - share[pool.number]) < 1 + 1e-6


@settings(max_examples=25, deadline=None)
@given(pools=clusters(least=3), layout=LAYOUTS)
def test_equal_pools_under_limits_are_in_equally_many_sets_within_one(pools, layout):
    """On machines of two pools each, whatever the limits are, no pool gets more than another."""
    even = [
        make_pool(number, machine=f"m{number // 2}", zone=f"z{number // 4}")
        for number in range(4, 4 + 4 * max(1, len(pools) // 4))
    ]
    counts = Counter(pool for chosen in chosen_sets(even, layout) for pool in chosen)
    assert max(counts.values()) - min(counts[pool.number] for pool in even) <= 1


@pytest.mark.parametrize("layout", ["1+1", "1+2", "2+1", "2+2", "4+2", "8+3"])
def test_adding_a_pool_moves_about_its_share_of_the_shards(layout):
    """Told as multiples of 1/(n+1). Few places in all, as 1+1 has, make for the largest."""
    shares = []
    for count in range(max(7, Layout.parse(layout).total), 25):
        pools = [make_pool(number) for number in range(1, count + 1)]
        before = chosen_sets(pools, Layout.parse(layout))
        after = chosen_sets([*pools, make_pool(count + 1)], Layout.parse(layout))
        places = sum(map(len, after))
        moved = sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))
        shares.append(moved * (count + 1) / places)
    assert sum(shares) / len(shares) <= 1.5
    assert max(shares) <= 2.2


@settings(max_examples=25, deadline=None)
@given(count=st.integers(7, 24), layout=LAYOUTS)
def test_pools_that_stay_in_a_set_mostly_keep_their_index(count, layout):
    pools = [make_pool(number) for number in range(1, count + 1)]
    before = chosen_sets(pools, layout)
    after = chosen_sets([*pools, make_pool(count + 1)], layout)
    stayed = kept = 0
    for old, new in zip(before, after, strict=True):
        if set(old) == set(new):
            assert old == new
            continue
        staying = set(old) & set(new)
        stayed += len(staying)
        kept += sum(old.index(pool) == new.index(pool) for pool in staying)
    assert kept >= 0.6 * stayed


@settings(max_examples=20, deadline=None)
@given(count=st.integers(4, 20), layout=LAYOUTS)
def test_each_pool_has_its_share_of_data_and_of_parity(count, layout):
    pools = [make_pool(number) for number in range(1, count + 1)]
    data = Counter(pool for chosen in chosen_sets(pools, layout) for pool in chosen[: layout.k])
    places = sum(data.values())
    mean = places / count
    assert all(abs(data[pool.number] - mean) <= 5 * mean**0.5 for pool in pools)


@settings(max_examples=40, deadline=None)
@given(pools=clusters(), layout=LAYOUTS, counter=st.integers(0, 10**6), data=st.data())
def test_choice_uses_all_that_can_be_used_and_nothing_else(pools, layout, counter, data):
    numbers = [pool.number for pool in pools]
    usable = set(data.draw(st.lists(st.sampled_from(numbers), unique=True)))
    placement = Placement(pools)
    extent = ExtentId(1, counter)
    chosen = placement.choose(extent, layout, usable.__contains__)
    assert len(chosen) == layout.total
    taken = [pool for pool in chosen if pool != MISSING]
    assert len(set(taken)) == len(taken) == min(layout.total, len(usable))
    assert set(taken) <= usable
    for index, pool in enumerate(placement.order(extent, layout)[: layout.total]):
        if pool in usable:
            assert chosen[index] == pool


def crowding(pools, numbers, layout):
    """Return how many shards share a machine with another one, and the most in one zone."""
    places = {pool.number: pool for pool in pools}
    machines = {places[number].machine for number in numbers}
    zones = Counter(places[number].zone for number in numbers)
    return len(numbers) - len(machines), max(zones.values())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), pools=clusters(least=3), layout=LAYOUTS)
def test_moves_lead_to_the_placement_set_or_to_what_is_safer_and_no_step_is_less_safe(data, pools, layout):
    if len(pools) < layout.total:
        return
    placement = Placement(pools)
    extent = ExtentId(1, data.draw(st.integers(1, 10_000)))
    numbers = data.draw(st.permutations([pool.number for pool in pools]))[: layout.total]
    preferred = set(placement.order(extent, layout)[: layout.total])
    limit = placement._table(layout).zone_limit
    steps = 0
    while (move := placement.move(extent, layout, numbers, lambda _: True)) is not None:
        at, target = move
        assert numbers[at] not in preferred
        assert target in preferred
        assert target not in numbers
        after = [*numbers[:at], target, *numbers[at + 1 :]]
        (shared, zone), (shared_after, zone_after) = (
            crowding(pools, one, layout) for one in (numbers, after)
        )
        assert shared_after <= shared
        assert zone_after <= max(zone, limit) or shared_after < shared
        numbers, steps = after, steps + 1
        assert steps <= layout.total
    assert set(numbers) == preferred or (
        placement._crowding(numbers, layout) < placement._crowding(sorted(preferred), layout)
    )


def test_what_is_on_more_machines_than_in_the_placement_set_stays():
    where = {117: "m0", 34: "m0", 177: "m1", 134: "m1", 94: "m0", 150: "m0", 16: "m3", 90: "m0"}
    pools = [make_pool(number, machine=machine) for number, machine in where.items()]
    placement, layout = Placement(pools), Layout(1, 3)
    stuck = 0
    for counter in range(1, 200):
        extent = ExtentId(1, counter)
        preferred = placement.order(extent, layout)[: layout.total]
        if 16 in preferred:
            continue
        numbers = [16, 34, 90, 134]
        while (move := placement.move(extent, layout, numbers, lambda _: True)) is not None:
            at, target = move
            numbers[at] = target
        assert 16 in numbers
        stuck += 1
    assert stuck


def test_machines_come_before_zones_when_no_move_is_good_for_both():
    where = {1: "m3/z1", 2: "m1/z1", 3: "m3/z1", 4: "m4/z0", 5: "m4/z0", 152: "m2/z0", 159: "m1/z1"}
    pools = [
        replace(make_pool(number, machine=place.split("/")[0]), zone=place.split("/")[1])
        for number, place in where.items()
    ]
    placement, layout, extent = Placement(pools), Layout(2, 2), ExtentId(1, 1)
    numbers = [1, 3, 4, 5]
    while (move := placement.move(extent, layout, numbers, lambda _: True)) is not None:
        at, target = move
        numbers[at] = target
    assert set(numbers) == set(placement.order(extent, layout)[: layout.total])


@settings(max_examples=40, deadline=None)
@given(pools=clusters(least=4), layout=LAYOUTS)
def test_what_is_where_placement_wants_it_is_not_moved_and_nothing_goes_where_it_cannot(pools, layout):
    placement = Placement(pools)
    for counter in range(1, 20):
        extent = ExtentId(1, counter)
        order = placement.order(extent, layout)
        if len(order) < layout.total:
            assert placement.move(extent, layout, order, lambda _: True) is None
            continue
        assert placement.move(extent, layout, order[: layout.total], lambda _: True) is None
        others = order[-layout.total :]
        assert placement.move(extent, layout, others, lambda _: False) is None


def room_of(frees, layout, machines=None, **states):
    pools = [
        replace(
            make_pool(number, machine=f"m{machines[number - 1]}" if machines else ""), free=free, **states
        )
        for number, free in enumerate(frees, 1)
    ]
    return usable_space(pools, layout)


@pytest.mark.parametrize(
    ("frees", "layout", "machines", "room"),
    [
        ([100] * 6, Layout(4, 2), None, 400),
        ([100] * 12, Layout(4, 2), None, 800),
        ([10, 10, 1000], Layout(2, 1), None, 20),  # What one has beyond the others is of no use.
        ([10, 20, 30, 40], Layout(1, 1), None, 50),  # Each byte twice, wherever.
        ([10, 20, 300], Layout(1, 1), None, 30),
        ([100, 100, 100], Layout(1, 1), [1, 1, 2], 100),  # Never both on one machine.
        ([100, 100, 100, 100], Layout(2, 2), [1, 1, 2, 2], 200),
        ([100, 100], Layout(2, 1), None, 0),  # There are not enough.
        ([0, 100, 100], Layout(2, 1), None, 0),
        ([100], Layout(1, 0), None, 100),
    ],
)
def test_the_room_for_files(frees, layout, machines, room):
    assert room_of(frees, layout, machines) == room
    assert room_of(frees, layout, machines, state="down") == 0
    assert room_of(frees, layout, machines, membership="draining") == 0


@settings(max_examples=100, deadline=None)
@given(
    frees=st.lists(st.integers(0, 30), min_size=2, max_size=6),
    layout=st.sampled_from([Layout(1, 1), Layout(2, 1), Layout(2, 2)]),
)
def test_the_room_for_files_is_what_can_be_filled(frees, layout):
    """Fill pools byte by byte, each time those with the most room: no other order stores more."""
    rooms, stored = list(frees), 0
    while True:
        fullest = sorted(range(len(rooms)), key=lambda at: -rooms[at])[: layout.total]
        if len(fullest) < layout.total or rooms[fullest[-1]] == 0:
            break
        for at in fullest:
            rooms[at] -= 1
        stored += layout.k
    assert room_of(frees, layout) == stored
