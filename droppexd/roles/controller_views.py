"""What the master tells of files and of the cluster: pure functions of records and pools."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from droppexd.catalog.keys import placement_of
from droppexd.catalog.placements import survives_machines, survives_pools
from droppexd.model import (
    Extent,
    ExtentPlaces,
    PoolInfo,
    PoolRecord,
    PoolState,
    RepairStatus,
    ShardPlace,
    SurvivalCount,
    Version,
)
from droppexd.wire.messages import Described

_PLACES_BYTES = 700_000
"""Bytes of shard places in one answer, about: a message's header holds 1 MiB."""

_PLACE_BYTES = 16
_MAX_WARNINGS = 64
_NAMED = 3
"""Pools that one warning names: it has a bound of 1024 characters."""


def describe(
    name: str, version: Version, extents: Sequence[Extent], pools: Mapping[int, PoolInfo]
) -> Described:
    """Return all about one file. Of very large files only the first extents' places are told."""
    lost = {number for number, pool in pools.items() if not pool.readable}
    machines = {number: pool.machine for number, pool in pools.items()}
    placements = {placement_of(extent.layout, extent.pools) for extent in extents}
    return Described(
        name=name,
        version=version.id,
        size=version.size,
        blake3=version.blake3,
        created_ms=version.created_ms,
        names=version.names,
        metadata=version.metadata,
        extents=_places(extents, pools),
        survives_pools=min((survives_pools(one, lost) for one in placements), default=None),
        survives_machines=min((survives_machines(one, machines, lost) for one in placements), default=None),
    )


def _places(extents: Sequence[Extent], pools: Mapping[int, PoolInfo]) -> tuple[ExtentPlaces, ...]:
    places: list[ExtentPlaces] = []
    room = _PLACES_BYTES
    for extent in extents:
        shards = tuple(_place(index, pools.get(number)) for index, number in enumerate(extent.pools))
        room -= sum(_PLACE_BYTES + len(shard.name.encode()) + len(shard.machine.encode()) for shard in shards)
        if room < 0:
            break
        places.append(ExtentPlaces(id=extent.id, layout=extent.layout, size=extent.size, shards=shards))
    return tuple(places)


def _place(index: int, pool: PoolInfo | None) -> ShardPlace:
    if pool is None:
        return ShardPlace(index=index, pool=0, name="", machine="", state="missing")
    return ShardPlace(index=index, pool=pool.number, name=pool.name, machine=pool.machine, state=pool.state)


def warnings(
    pools: Sequence[PoolInfo],
    survival: Sequence[SurvivalCount],
    *,
    repair: RepairStatus,
    quarantined: int,
    started_s: float,
    down_after_s: float,
    restored_ms: int | None = None,
    adopted: int | None = None,
    uncompared: Sequence[PoolRecord] = (),
    awaited: int = 0,
) -> tuple[str, ...]:
    """Return what a person should know of, one sentence each.

    `quarantined` counts shards of unknown histories, `started_s` is how long this master has been at work.
    `restored_ms` is when the backup was written that the catalogue was restored from, and `uncompared` are
    the pools that were not compared with it yet. `adopted` is how many files were found by shards alone; None
    when none are looked for, and `awaited` how many pools it was made from that have not come yet.
    """
    found: list[str] = []
    if restored_ms is not None:
        found.append(_restored(restored_ms, uncompared, awaited, rebuilt=adopted is not None))
    elif adopted is not None:
        found.append(
            "the catalogue was made anew from what pools keep. Files of which only shards tell are being "
            f"read and put below lost+found, marked uncertain: {adopted} so far"
        )
    down = [pool for pool in pools if pool.state == PoolState.DOWN]
    if down and started_s < down_after_s:
        found.append(
            f"the controller started {started_s:.0f} s ago; pools it has not heard of since count as down"
        )
    lost = sum(count.files for count in survival if count.survives < 0)
    if lost:
        found.append(
            f"{lost} files cannot be read now: too many of their shards are missing, or on pools "
            "that are down"
        )
    last = sum(count.files for count in survival if count.survives == 0)
    if last:
        found.append(f"{last} files can be read but would not survive one more loss")
    if not pools:
        found.append("no pool has joined yet")
    found += [f"pool {pool.name} ({pool.machine}) is down" for pool in down]
    found += [
        f"pool {pool.name} ({pool.machine}) is out: its shards are rebuilt on the others. If it is lost for "
        f"good, `droppex pools replace {pool.name}` says so"
        for pool in pools
        if pool.state == PoolState.OUT
    ]
    found += [
        f"pool {pool.name} ({pool.machine}) runs on an older copy of its folder, which is being compared"
        for pool in pools
        if pool.state == PoolState.CHECKING
    ]
    if repair.stuck:
        found.append(
            f"{repair.stuck} missing shards cannot be rebuilt now: no pool for them takes writes, "
            "or too few of the others can be read. Bring pools back, or add one"
        )
    if quarantined:
        found.append(
            f"{quarantined} shards on pools are of files that this catalogue never knew; they are kept. "
            "`droppex orphans` lists them; it can adopt or drop them"
        )
    found += [
        f"pool {pool.name} ({pool.machine}) takes no writes: {pool.trouble}"
        for pool in pools
        if pool.state == PoolState.READ_ONLY
    ]
    return tuple(found[:_MAX_WARNINGS])


def _restored(written_ms: int, uncompared: Sequence[PoolRecord], awaited: int, *, rebuilt: bool) -> str:
    """Return what to say of a catalogue that was restored or rebuilt."""
    when = datetime.fromtimestamp(written_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = [f"{pool.name} ({pool.machine})" for pool in uncompared]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    left = f"not compared yet: {', '.join(names[:_NAMED])}{more}" if names else "nearly all is compared"
    if awaited:
        left = f"{awaited} of the pools that it was made from have not come yet"
    source = f"restored from a backup of {when}"
    if rebuilt:
        source = f"rebuilt from a pool's journal of {when}" if written_ms else "begun anew from shards alone"
    return (
        f"the catalogue was {source}. Until all pools are compared with it, nothing "
        f"that it knows is cleared away; {left}. If one is lost for good, `droppex pools replace` says so"
    )
