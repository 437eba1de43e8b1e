"""Where shards go: pools and an extent's id in, pools in order of preference out. Pure.

For each layout there are 256 *placement sets*, and an extent's set is a hash of its id: few distinct sets
mean few combinations of pools whose loss loses data (Cidon et al., "Copysets", USENIX ATC 2013). A set is
chosen by weighted rendezvous hashing (Thaler and Ravishankar 1998, in the exponential form of Schindelhauer
and Schomaker 2005), with a price on each pool that is raised and lowered until each pool stands in as many
sets as its capacity entitles it to. What is left of a difference is moved along shortest swap paths.

Sets are preferences; the extent record is the truth. So it does no harm when two machines whose
mathematics libraries differ in the last bit disagree about a set.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from operator import sub
from typing import NamedTuple

from droppexd.errors import NotEnoughShards
from droppexd.model import (
    MAX_K,
    MAX_M,
    MISSING,
    Extent,
    ExtentId,
    Layout,
    Membership,
    PoolInfo,
    PoolState,
)

SETS = 256
"""Placement sets of a layout."""

_SINGLE = Layout(1, 0)
_LADDER = (Layout(8, 3), Layout(4, 2), Layout(3, 2), Layout(2, 2), Layout(2, 1), Layout(1, 1))
"""The layouts of "auto", largest first. 8+3 asks for 10 machines, the others for k+m."""
_LARGE_FROM = 10

_PRICE_STEPS = (1.0,) * 6 + (0.5,) * 5 + (0.25,) * 5
"""How far prices follow a difference, round by round. These 16 rounds leave less than one swap a pool."""

_CHOICES_KEPT = 8192
"""Choices with unusable pools that a Placement remembers before it forgets them all."""


def choose_layout(pools: Sequence[PoolInfo], wanted: Layout | None) -> Layout:
    """Return `wanted`, or without it the layout of the design's table.

    The table goes by the machines of member pools, or by the pools when all are on one machine; never by
    who is up, so that a machine that is away does not weaken what is written meanwhile.
    """
    if wanted is not None:
        return wanted
    members = [pool for pool in pools if pool.membership == Membership.MEMBER]
    machines = len({pool.machine for pool in members})
    places = machines if machines > 1 else len(members)
    if places >= _LARGE_FROM:
        return _LADDER[0]
    return next((layout for layout in _LADDER[1:] if layout.total <= places), _SINGLE)


def usable_space(pools: Sequence[PoolInfo], layout: Layout) -> int:
    """Return how many more bytes of files in this layout the member pools have room for, about.

    Of a file each shard is on a pool of its own, and no machine has more than it must: room that one pool has
    beyond what the others can go with is of no use. With s bytes for each of the k+m shards of one large
    file, a pool takes at most s of them, and a machine s times its limit; the largest s for which that makes
    (k+m)s is what there is. Found by bisection.
    """
    rooms: dict[str, list[int]] = {}
    for pool in pools:
        if pool.membership == Membership.MEMBER and pool.state in (PoolState.UP, PoolState.READ_ONLY):
            rooms.setdefault(pool.machine, []).append(pool.free if pool.writable else 0)
    limit = -(-layout.total // max(1, len(rooms)))
    while limit < layout.total and sum(min(limit, len(room)) for room in rooms.values()) < layout.total:
        limit += 1

    def fits(s: int) -> bool:
        taken = (min(limit * s, sum(min(s, free) for free in room)) for room in rooms.values())
        return sum(taken) >= layout.total * s

    low, high = 0, 1 + sum(map(sum, rooms.values()))
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * layout.k


def small_layout(layout: Layout) -> Layout:
    """Return how small files are stored where `layout` is used: as copies that survive as many losses."""
    return Layout(1, layout.m)


def writable_layout(layout: Layout, writable: int) -> tuple[Layout, str]:
    """Return the layout to write with now that `writable` pools take writes, and a note for the receipt.

    The layout stays as long as k+1 shards can be written; otherwise the next smaller one of the ladder
    that survives one more loss. The note is empty when the layout stays. Raise NotEnoughShards when no
    layout would survive a loss; only a cluster that is meant to survive none (1+0) may do without.
    """
    if writable >= layout.least:
        return layout, ""
    for smaller in _LADDER:
        if smaller.k < layout.k and smaller.least <= writable:
            return smaller, f"stored as {smaller} instead of {layout}: only {writable} pools take writes now"
    takes = {0: "no pool takes", 1: "only one pool takes"}.get(writable, f"only {writable} pools take")
    raise NotEnoughShards(f"{takes} writes now; {layout} needs at least {layout.least} to survive a loss")


def survives(
    extent: Extent, alive: Callable[[int], bool], machine_of: Callable[[int], str]
) -> tuple[int, int]:
    """Return how many more pools, and how many machines, may be lost now in the worst case.

    Both are negative when the extent cannot be read now: by so many shards.
    """
    held = [pool for pool in extent.pools if pool != MISSING and alive(pool)]
    spare = len(held) - extent.layout.k
    if spare < 0:
        return spare, spare
    return _losses(Counter(held), spare), _losses(Counter(map(machine_of, held)), spare)


def _losses(shards: Counter[int] | Counter[str], spare: int) -> int:
    """Return how many of the fullest places may be lost while at most `spare` shards are."""
    losses = 0
    for count in sorted(shards.values(), reverse=True):
        spare -= count
        if spare < 0:
            break
        losses += 1
    return losses


class _Member(NamedTuple):
    """What placement depends on. Neither state nor free space: sets do not move with the weather."""

    number: int
    weight: int
    machine: str
    zone: str


class _Table(NamedTuple):
    """The 256 orders of one layout, as pool numbers, and how many shards a machine and a zone may have."""

    orders: tuple[tuple[int, ...], ...]
    sets: tuple[tuple[int, ...], ...]
    machine_limit: int
    zone_limit: int


class Placement:
    """The placement sets of a cluster's member pools. Cheap to make again when the map changes."""

    def __init__(self, pools: Iterable[PoolInfo]) -> None:
        members = sorted(
            _Member(pool.number, max(pool.capacity, 1), pool.machine, pool.zone)
            for pool in pools
            if pool.membership == Membership.MEMBER
        )
        zone_of_machine: dict[str, str] = {}
        for member in members:
            zone_of_machine.setdefault(member.machine, member.zone)
        self._members = tuple(member._replace(zone=zone_of_machine[member.machine]) for member in members)
        self._places = {member.number: member for member in self._members}
        self._tables: dict[Layout, _Table] = {}
        self._choices: dict[tuple[Layout, int, tuple[bool, ...]], tuple[int, ...]] = {}

    @property
    def inputs(self) -> tuple[tuple[int, int, str, str], ...]:
        """All that the sets depend on."""
        return tuple((one.number, one.weight, one.machine, one.zone) for one in self._members)

    def order(self, extent: ExtentId, layout: Layout) -> tuple[int, ...]:
        """Return all member pools in order of preference for an extent.

        The first k+m are its placement set, by shard index; the rest are fall-backs.
        """
        return self._table(layout).orders[_set_of(extent)]

    def choose(self, extent: ExtentId, layout: Layout, usable: Callable[[int], bool]) -> tuple[int, ...]:
        """Return k+m pools by shard index, MISSING where there are not enough usable pools.

        Usable pools of the placement set keep their index; fall-backs take the places of the others,
        within the limits on machines and zones as far as the usable pools allow.
        """
        table = self._table(layout)
        number = _set_of(extent)
        preferred = table.sets[number]
        if len(preferred) == layout.total and all(map(usable, preferred)):
            return preferred
        order = table.orders[number]
        usable_now = tuple([bool(usable(pool)) for pool in order])
        key = (layout, number, usable_now)
        chosen = self._choices.get(key)
        if chosen is None:
            if len(self._choices) >= _CHOICES_KEPT:
                self._choices.clear()
            chosen = self._choices[key] = self._fill(table, layout, order, usable_now)
        return chosen

    def lacking(self, extent: ExtentId, layout: Layout, pools: Sequence[int]) -> list[int]:
        """Return the pools of the placement set that are not among `pools`; none where no set is whole."""
        preferred = self._table(layout).sets[_set_of(extent)]
        if len(preferred) < layout.total:
            return []
        return [pool for pool in preferred if pool not in pools]

    def spare(
        self, extent: ExtentId, layout: Layout, pools: Sequence[int], usable: Callable[[int], bool]
    ) -> int:
        """Return the pool that a shard goes to when `pools` have the others; MISSING: none can.

        The best usable pool in the extent's order that keeps the limits on machines and zones; where none
        does, the limits give way one by one.
        """
        table = self._table(layout)
        candidates = [pool for pool in table.orders[_set_of(extent)] if pool not in pools and usable(pool)]
        held = [pool for pool in pools if pool in self._places]
        machine_limit, zone_limit = table.machine_limit, table.zone_limit
        while candidates and machine_limit <= layout.total:
            for pool in candidates:
                if self._fits(pool, held, machine_limit, zone_limit):
                    return pool
            if zone_limit < layout.total:
                zone_limit += 1
            else:
                machine_limit += 1
        return MISSING

    def move(
        self, extent: ExtentId, layout: Layout, pools: Sequence[int], usable: Callable[[int], bool]
    ) -> tuple[int, int] | None:
        """Return a shard that is not in the placement set, and the pool of the set that it goes to; or None.

        No move puts more shards of the extent on one machine than there are. One that puts more of them
        beyond the limit in one zone is made only when it separates some by machine, and no other would do.
        So what is safer than in the placement set, on more machines or better spread over zones, stays.
        """
        preferred = self._table(layout).sets[_set_of(extent)]
        if len(preferred) < layout.total:
            return None
        targets = [pool for pool in preferred if pool not in pools and usable(pool)]
        strays = [at for at, pool in enumerate(pools) if pool not in preferred]
        before = self._crowding(pools, layout)
        second_best: tuple[int, int] | None = None
        for target in targets:
            for at in strays:
                after = self._crowding([*pools[:at], target, *pools[at + 1 :]], layout)
                if after[0] <= before[0] and after[1] <= before[1]:
                    return at, target
                if after[0] < before[0] and second_best is None:
                    second_best = at, target
        return second_best

    def _crowding(self, pools: Sequence[int], layout: Layout) -> tuple[int, int]:
        """Return how many shards share a machine with another, and how far a zone is over its limit.

        Pools that are no members count as machines and zones of their own: they are known no better here.
        """
        places = [self._places.get(pool) or _Member(pool, 1, f"\0{pool}", f"\0{pool}") for pool in pools]
        machines = Counter(place.machine for place in places)
        zones = Counter(place.zone for place in places)
        return len(places) - len(machines), max(0, max(zones.values()) - self._table(layout).zone_limit)

    def _table(self, layout: Layout) -> _Table:
        table = self._tables.get(layout)
        if table is None:
            table = self._tables[layout] = _build(self._members, layout)
        return table

    def _fill(
        self, table: _Table, layout: Layout, order: Sequence[int], usable_now: Sequence[bool]
    ) -> tuple[int, ...]:
        """Return the pools by shard index when some of the set cannot be used."""
        chosen = [pool if usable else MISSING for pool, usable in zip(order, usable_now, strict=True)]
        spares = [pool for pool in chosen[layout.total :] if pool != MISSING]
        chosen = chosen[: layout.total] + [MISSING] * (layout.total - len(chosen))
        machine_limit, zone_limit = table.machine_limit, table.zone_limit
        while spares and MISSING in chosen:
            for pool in tuple(spares):
                if MISSING in chosen and self._fits(pool, chosen, machine_limit, zone_limit):
                    chosen[chosen.index(MISSING)] = pool
                    spares.remove(pool)
            if zone_limit < layout.total:
                zone_limit += 1
            else:
                machine_limit += 1
        return tuple(chosen)

    def _fits(self, pool: int, chosen: Sequence[int], machine_limit: int, zone_limit: int) -> bool:
        place = self._places[pool]
        taken = [self._places[other] for other in chosen if other != MISSING]
        return (
            sum(other.machine == place.machine for other in taken) < machine_limit
            and sum(other.zone == place.zone for other in taken) < zone_limit
        )


def _set_of(extent: ExtentId) -> int:
    return blake2b(extent.to_bytes(), digest_size=1).digest()[0]


@lru_cache(maxsize=64)
def _build(members: tuple[_Member, ...], layout: Layout) -> _Table:
    """Build the sets of a layout. Cached here, because maps change often and members seldom."""
    cluster = _Cluster(members, layout)
    sets = cluster.balanced_sets()
    numbers = [member.number for member in members]
    orders: list[tuple[int, ...]] = []
    for row, chosen in zip(cluster.races, sets, strict=True):
        indexed = _by_index(len(orders), [numbers[pool] for pool in chosen], layout.total)
        spares = sorted(
            set(range(len(members))) - chosen, key=lambda pool: row[pool] - math.log(members[pool].weight)
        )
        orders.append(indexed + tuple(numbers[pool] for pool in spares))
    return _Table(
        tuple(orders),
        tuple(order[: layout.total] for order in orders),
        cluster.machine_limit,
        cluster.zone_limit,
    )


def _by_index(set_number: int, pools: Sequence[int], total: int) -> tuple[int, ...]:
    """Give each pool of a set its shard index.

    Each pool has its own hashed ranking of the indexes; older pools choose first. So a pool that joins
    takes what is left, and a pool that goes makes at most a short chain of others move up.
    """
    free = list(range(min(total, len(pools))))
    by_index = dict.fromkeys(free, MISSING)
    for pool in sorted(pools):
        ranking = blake2b(b"%d %d" % (set_number, pool), digest_size=MAX_K + MAX_M).digest()
        index = min(free, key=ranking.__getitem__)
        free.remove(index)
        by_index[index] = pool
    return tuple(by_index.values())


class _Group(NamedTuple):
    """The pools of a machine, a zone or the cluster, and how many shards of one set it may have."""

    limit: int
    members: tuple["_Group | int", ...]


class _Swap(NamedTuple):
    """One pool of a set gives way to another."""

    cost: float
    set_number: int
    leaving: int
    entering: int


class _Cluster:
    """The building of one layout's sets. Pools are known by their position in `members`."""

    def __init__(self, members: Sequence[_Member], layout: Layout) -> None:
        self.members = members
        self.size = min(layout.total, len(members))
        by_machine = Counter(member.machine for member in members)
        self.machine_limit = _least_limit(by_machine.values(), 1, self.size)
        room: Counter[str] = Counter()
        for machine, zone in {member.machine: member.zone for member in members}.items():
            room[zone] += min(self.machine_limit, by_machine[machine])
        self.zone_limit = _least_limit(room.values(), max(layout.m, 1), self.size)
        self.races = [[_race(set_number, member.number) for member in members] for set_number in range(SETS)]
        self._machines = [member.machine for member in members]
        self._zones = [member.zone for member in members]
        self._full_of: dict[int, tuple[set[str], set[str]]] = {}
        self._unlimited = self.machine_limit >= max(by_machine.values(), default=0) and (
            self.zone_limit >= max(room.values(), default=0)
        )

    def balanced_sets(self) -> list[set[int]]:
        """Return the pools of each set, each pool in as many sets as its quota says."""
        if self.size == len(self.members):
            return [set(range(self.size)) for _ in range(SETS)]
        quotas = self._quotas()
        prices = [math.log(member.weight) for member in self.members]
        sets: list[set[int]] = []
        for step in _PRICE_STEPS:
            sets = [self._pick(row, prices) for row in self.races]
            counts = self._counts(sets)
            if counts == quotas:
                break
            for pool, (quota, count) in enumerate(zip(quotas, counts, strict=True)):
                prices[pool] += step * math.log((quota + 0.5) / (count + 0.5))
        self._settle(sets, quotas)
        return sets

    def _pick(self, row: Sequence[float], prices: Sequence[float]) -> set[int]:
        """Return the best `size` pools within the limits: greedy, which is optimal for nested limits."""
        keys = list(map(sub, row, prices))
        ranking = sorted(range(len(keys)), key=keys.__getitem__)
        if self._unlimited:
            return set(ranking[: self.size])
        chosen: set[int] = set()
        machines: dict[str, int] = {}
        zones: dict[str, int] = {}
        for pool in ranking:
            machine, zone = self._machines[pool], self._zones[pool]
            on_machine, in_zone = machines.get(machine, 0), zones.get(zone, 0)
            if on_machine < self.machine_limit and in_zone < self.zone_limit:
                chosen.add(pool)
                if len(chosen) == self.size:
                    break
                machines[machine] = on_machine + 1
                zones[zone] = in_zone + 1
        return chosen

    def _counts(self, sets: Iterable[set[int]]) -> list[int]:
        counts = [0] * len(self.members)
        for chosen in sets:
            for pool in chosen:
                counts[pool] += 1
        return counts

    # -- quotas -----------------------------------------------------------------------------------

    def _quotas(self) -> list[int]:
        """Return in how many sets each pool stands: its share by weight, within the limits, rounded.

        Shares are rounded from the cluster down to the pools, so that zones and machines keep their
        limits and every pool gets its share rounded up or down. Then such sets exist: the shares are a
        fractional flow through nested limits, and such a flow has an integral one.
        """
        zones: dict[str, dict[str, list[int]]] = {}
        for pool, member in enumerate(self.members):
            zones.setdefault(member.zone, {}).setdefault(member.machine, []).append(pool)
        cluster = _Group(
            self.size,
            tuple(
                _Group(
                    self.zone_limit,
                    tuple(_Group(self.machine_limit, tuple(pools)) for pools in machines.values()),
                )
                for machines in zones.values()
            ),
        )
        quotas = [0] * len(self.members)
        self._share_out(cluster, float(self.size), SETS * self.size, quotas)
        return quotas

    def _share_out(self, group: _Group, share: float, quota: int, quotas: list[int]) -> None:
        """Divide a group's share of a set, and its quota of all sets, among its members."""
        level = self._level(group, share)
        shares = [self._filled(member, level) for member in group.members]
        exact = [SETS * one for one in shares]
        whole = [math.floor(one + 1e-6) for one in exact]
        by_rest = sorted(range(len(exact)), key=lambda one: whole[one] - exact[one])
        for one in by_rest[: quota - sum(whole)]:
            whole[one] += 1
        for member, member_share, member_quota in zip(group.members, shares, whole, strict=True):
            if isinstance(member, int):
                quotas[member] = member_quota
            else:
                self._share_out(member, member_share, member_quota, quotas)

    def _filled(self, member: _Group | int, level: float) -> float:
        """Return how much of a set goes to a member when each unit of weight gets `level`."""
        if isinstance(member, int):
            return min(1.0, level * self.members[member].weight)
        return min(float(member.limit), sum(self._filled(inner, level) for inner in member.members))

    def _level(self, group: _Group, share: float) -> float:
        """Return the level at which a group's members get `share` together, by bisection."""
        open_group = group._replace(limit=len(self.members))
        low, high = 0.0, 1.0
        # Weights are at least 1, so at level 1 each member is as full as it gets.
        for _ in range(100):
            middle = (low + high) / 2
            if self._filled(open_group, middle) < share:
                low = middle
            else:
                high = middle
            if high - low < high * 1e-12:
                break
        return high

    # -- the rest of the difference ---------------------------------------------------------------

    def _settle(self, sets: list[set[int]], quotas: Sequence[int]) -> None:
        """Swap pools within sets, along shortest paths, until each has its quota."""
        excess = [count - quota for count, quota in zip(self._counts(sets), quotas, strict=True)]
        while any(over > 0 for over in excess):
            path = self._shortest_path(sets, excess)
            for swap in path:
                sets[swap.set_number].remove(swap.leaving)
                sets[swap.set_number].add(swap.entering)
                self._full_of.pop(swap.set_number, None)
            excess[path[0].leaving] -= 1
            excess[path[-1].entering] += 1

    def _shortest_path(self, sets: Sequence[set[int]], excess: Sequence[int]) -> list[_Swap]:
        """Return swaps that lead from a pool above its quota to one below it.

        Breadth first, so no two swaps of a path hinder each other: where two would, a shorter path exists.
        """
        came_by: dict[int, _Swap] = {}
        frontier = {pool for pool, over in enumerate(excess) if over > 0}
        wanting = {pool for pool, over in enumerate(excess) if over < 0}
        unseen = set(range(len(excess))) - frontier - wanting
        while frontier:
            ends = self._best_swaps(sets, frontier, wanting)
            if ends:
                last = min(ends.values())
                return [*_walk_back(came_by, last.leaving), last]
            found = self._best_swaps(sets, frontier, unseen)
            came_by.update(found)
            unseen.difference_update(found)
            frontier = set(found)
        raise AssertionError("quotas that no sets can meet")

    def _best_swaps(
        self, sets: Sequence[set[int]], leaving_pools: set[int], entering_pools: set[int]
    ) -> dict[int, _Swap]:
        """Return for each pool that can enter some set the swap that goes least against the races."""
        best: dict[int, _Swap] = {}
        for set_number, chosen in enumerate(sets):
            leaving_here = chosen & leaving_pools
            if not leaving_here:
                continue
            row = self.races[set_number]
            full = self._full(set_number, chosen)
            for entering in entering_pools - chosen:
                known = best.get(entering)
                for leaving in leaving_here:
                    cost = row[entering] - row[leaving]
                    if (known is None or cost < known.cost) and self._may_swap(full, leaving, entering):
                        known = best[entering] = _Swap(cost, set_number, leaving, entering)
        return best

    def _full(self, set_number: int, chosen: Iterable[int]) -> tuple[set[str], set[str]]:
        """Return the machines and the zones that a set has no room left on. Kept until it changes."""
        known = self._full_of.get(set_number)
        if known is not None:
            return known
        machines = Counter([self._machines[pool] for pool in chosen])
        zones = Counter([self._zones[pool] for pool in chosen])
        full = self._full_of[set_number] = (
            {machine for machine, shards in machines.items() if shards >= self.machine_limit},
            {zone for zone, shards in zones.items() if shards >= self.zone_limit},
        )
        return full

    def _may_swap(self, full: tuple[set[str], set[str]], leaving: int, entering: int) -> bool:
        machine, zone = self._machines[entering], self._zones[entering]
        if self._unlimited or machine == self._machines[leaving]:
            return True
        return machine not in full[0] and (zone not in full[1] or zone == self._zones[leaving])


def _walk_back(came_by: Mapping[int, _Swap], end: int) -> list[_Swap]:
    path = []
    pool = end
    while pool in came_by:
        path.append(came_by[pool])
        pool = came_by[pool].leaving
    return path[::-1]


def _least_limit(room: Iterable[int], least: int, size: int) -> int:
    """Return the smallest limit from `least` on that leaves room for `size` shards."""
    rooms = list(room)
    limit = least
    while sum(min(limit, one) for one in rooms) < size:
        limit += 1
    return limit


def _race(set_number: int, pool: int) -> float:
    """Return the logarithm of an exponentially distributed time, hashed from set and pool.

    The lowest of these minus the logarithm of a weight wins, with a chance in proportion to the weight.
    """
    digest = blake2b(b"%d/%d" % (set_number, pool), digest_size=7).digest()
    return math.log(-math.log((int.from_bytes(digest) + 0.5) / 2**56))
