"""What the records say of what a pool holds, both ways: a stretch of shards against a stretch of records.

Nearly every shard is where its record says. So a stretch is compared as two sets of packed keys, and only
what is in one of them alone is looked at.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from droppexd.catalog.engine import Engine, Entry
from droppexd.catalog.keys import EXTENTS, GARBAGE, end_of
from droppexd.catalog.records import shard_on, unpack_extent, unpack_garbage
from droppexd.held import ID_BYTES, SESSION_BYTES, Held, holding_of
from droppexd.model import MISSING, ExtentId, Holding
from droppexd.runtime import Clock

MOST_AT_ONCE = 1000
"""Records, and holdings, of one slice; and of each verdict as many as one answer takes. While a slice is
judged, for 2 ms or so, nobody else is served; while the next is read, everybody is."""

MOST_SLICES = 16
"""Of one stretch, so that an answer does not take too long, however few of the records name the pool."""

MOST_S = 0.3
"""Behind the slice that takes longer a stretch ends. Many pools compare at once after the start of a master,
and whoever asks repeats a question that takes seconds, while it is still worked on."""

_BEHIND_ALL_SHARDS = b"\xff"

Expected = tuple[ExtentId, int, int]
"""An extent, the index of a shard, and the edition of the record."""


class Stretch(NamedTuple):
    """The verdicts on a stretch. `upto` is the extent it ends with; None: there is nothing behind it."""

    absent: list[Expected]
    wanted: list[Expected]
    drop: list[Holding]
    unknown: list[Holding]
    upto: ExtentId | None


class Judge(NamedTuple):
    """What a master knows of extents without a record. Asked before the records are read."""

    ripe: int
    """The newest epoch of garbage that may be dropped."""
    spent: Callable[[int], int | None]
    """The counter below which no commit can name an extent of a session any more; None for a session that is
    none of this catalogue's."""
    proven: frozenset[int] | None = None
    """None: the records are true. Else they are those of a backup, and may name pools that had a shard once:
    these are the pools that were compared with them, and have what they are named for."""


class _Verdicts:
    """What was found so far."""

    def __init__(self) -> None:
        self.absent: list[Expected] = []
        self.wanted: list[Expected] = []
        self.drop: list[Holding] = []
        self.unknown: list[Holding] = []

    @property
    def kinds(self) -> tuple[list[Any], ...]:
        return self.absent, self.wanted, self.drop, self.unknown

    @property
    def longest(self) -> int:
        return max(map(len, self.kinds))

    def has_room_for(self, other: "_Verdicts") -> bool:
        """Whether one answer takes both: it has room for so many of each kind."""
        return all(
            len(mine) + len(others) <= MOST_AT_ONCE
            for mine, others in zip(self.kinds, other.kinds, strict=True)
        )

    def take(self, other: "_Verdicts") -> None:
        for mine, others in zip(self.kinds, other.kinds, strict=True):
            mine.extend(others)

    def stretch(self, upto: ExtentId | None) -> Stretch:
        return Stretch(self.absent, self.wanted, self.drop, self.unknown, upto)


async def reconcile(
    engine: Engine,
    judge: Judge,
    clock: Clock,
    pool: int,
    after: ExtentId | None,
    held: Held,
    *,
    last: bool,
) -> Stretch:
    """Compare what a pool holds behind `after` with the records, as far as one answer goes.

    `held` is ordered and has all shards of each of its extents; with `last` there are no more. What is absent
    may have been stored since the pool looked: it looks again before it says that it is lost.
    """
    keys = list(held)
    slices = _Slices(engine, judge, pool, held)
    end = end_of(EXTENTS) if last or not keys else _behind(keys[-1])
    start = EXTENTS if after is None else _behind(after.to_bytes())
    found = _Verdicts()
    upto, first = after, 0
    ends_at = clock.now() + MOST_S
    for _ in range(MOST_SLICES):
        cut = _cut(keys, first)
        whole = cut == len(keys)
        entries = await engine.range(start, end if whole else _behind(keys[cut - 1]), MOST_AT_ONCE)
        if len(entries) == MOST_AT_ONCE:
            whole = False
            reached = entries[-1].key[len(EXTENTS) :]
            cut = bisect_right(keys, reached + _BEHIND_ALL_SHARDS, first)
        elif cut:
            reached = keys[cut - 1][:ID_BYTES]
        else:
            reached = b""  # No holdings at all: the stretch is what it was asked to be.
        more = await slices.judge(entries, keys[first:cut])
        if not found.has_room_for(more):
            break
        found.take(more)
        if reached:
            upto = ExtentId.from_bytes(reached)
        if whole:
            return found.stretch(None if last else upto)
        if found.longest > MOST_AT_ONCE // 2:
            break  # As much again would not go into the answer, and would be judged for nothing.
        if clock.now() >= ends_at:
            break
        start, first = _behind(reached), cut
    return found.stretch(upto)


def _behind(key: bytes) -> bytes:
    """Return the first key of the catalogue behind the record of an extent, whose id `key` begins with."""
    return EXTENTS + key[:ID_BYTES] + b"\0"


def _cut(keys: Sequence[bytes], first: int) -> int:
    """Return where a slice from `first` on ends: not within an extent."""
    cut = first + MOST_AT_ONCE
    if cut >= len(keys):
        return len(keys)
    while keys[cut][:ID_BYTES] == keys[cut - 1][:ID_BYTES]:
        cut -= 1
    return cut


class _Slices:
    """Judges one slice of a stretch after another."""

    def __init__(self, engine: Engine, judge: Judge, pool: int, held: Held) -> None:
        self._engine = engine
        self._pool = pool
        self._held = held
        self._ripe = judge.ripe
        self._proven = judge.proven
        # What allows a drop is read before what forbids it: a commit that was judged before the floor rose is
        # then seen as a record.
        sessions = {key[:SESSION_BYTES] for key in held}
        self._spent = {session: judge.spent(int.from_bytes(session)) for session in sessions}

    async def judge(self, entries: Sequence[Entry], keys: Sequence[bytes]) -> _Verdicts:
        """Return the verdicts on shards and the records of the same slice."""
        verdicts = _Verdicts()
        pool, held, skipped = self._pool, self._held, len(EXTENTS)
        named = set()
        for key, value, _ in entries:
            place = shard_on(value, pool)
            if place is not None:
                shard, edition = place
                shard_key = key[skipped:] + shard.to_bytes()
                named.add(shard_key)
                if shard_key not in held:
                    verdicts.absent.append((ExtentId.from_bytes(key[skipped:]), shard, edition))
        others = [key for key in keys if key not in named]
        if others:
            await self._judge_others(verdicts, entries, others)
        return verdicts

    async def _judge_others(
        self, verdicts: _Verdicts, entries: Sequence[Entry], keys: Sequence[bytes]
    ) -> None:
        """Judge shards that no record names here."""
        records = {entry.key[len(EXTENTS) :]: entry.value for entry in entries}
        unnamed: list[bytes] = []
        for key in keys:
            value = records.get(key[:ID_BYTES])
            if value is None:
                unnamed.append(key)
            else:
                self._judge_named(verdicts, holding_of(key, self._held[key]), value)
        garbage = await self._engine.get([GARBAGE + key[:ID_BYTES] for key in unnamed]) if unnamed else []
        for key, entry in zip(unnamed, garbage, strict=True):
            holding = holding_of(key, self._held[key])
            spent = self._spent[key[:SESSION_BYTES]]
            if entry is not None:
                if unpack_garbage(entry.value).epoch <= self._ripe:
                    verdicts.drop.append(holding)
            elif spent is None:
                verdicts.unknown.append(holding)
            elif holding.extent.counter < spent:
                verdicts.drop.append(holding)

    def _judge_named(self, verdicts: _Verdicts, holding: Holding, value: bytes) -> None:
        """Judge a shard of an extent whose record does not name it here."""
        extent = unpack_extent(holding.extent, value).extent
        if holding.shard >= len(extent.pools):
            return
        holder = extent.pools[holding.shard]
        if holder == MISSING:
            if self._pool not in extent.pools:
                verdicts.wanted.append((extent.id, holding.shard, extent.edition))
        elif holder == self._pool:
            return
        elif self._proven is None:
            verdicts.drop.append(holding)
        elif holder not in self._proven and self._pool not in extent.pools:
            # Whoever the record names may have it no more, and who has it may be recorded: if what is here is
            # whole, the record is moved. What is not wanted is kept until the records are true again.
            verdicts.wanted.append((extent.id, holding.shard, extent.edition))
