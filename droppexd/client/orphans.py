"""The versions that pools hold shards of and the catalogue never knew, put together from their extents.

Extents come in the order of their ids, and those of several uploads in between each other. An extent that is
not full ends its version. Where headers tell which extent of the version each is, the parts may come from any
session, as they do once some were coded anew. What is open is kept in bounded memory.
"""

import enum
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from droppexd.model import EXTENT_CHUNKS, MAX_EXTENTS, UNKNOWN_PLACE, ExtentId, VersionId
from droppexd.wire.messages import ListOrphans, OrphanExtent, OrphansListed

MOST_OPEN = 4096
"""Versions whose end has not come yet. Beyond, the one that began first is told of as it is."""
MOST_OPEN_EXTENTS = 4 * MAX_EXTENTS


class OrphanState(enum.StrEnum):
    """What is there of a version. That no extent is lost altogether is never certain."""

    WHOLE = "whole"
    OPEN = "open"
    """Each extent can be read, and the last is full: the file may have gone on."""
    INCOMPLETE = "incomplete"
    """Of some extent fewer shards are there than it takes to read it, or none at all."""
    DAMAGED = "damaged"
    """An extent no header of which can be read: it is not known whose it is."""


@dataclass(frozen=True, slots=True)
class OrphanVersion:
    """A version that no record names. Without a `version` it is an extent whose headers are all damaged."""

    version: VersionId | None
    extents: tuple[OrphanExtent, ...]

    @property
    def name(self) -> str:
        """The name that it was put under; a hint."""
        return next((one.header.name for one in self.extents if one.header and one.header.name), "")

    @property
    def size(self) -> int:
        """The bytes of the extents that are there."""
        return sum(one.header.size for one in self.extents if one.header)

    @property
    def shards(self) -> int:
        """How many shards pools hold of it."""
        return sum(len(one.places) for one in self.extents)

    @property
    def sound(self) -> int:
        """How many different shards are there whose headers can be read and agree."""
        return sum(map(sound_shards, self.extents))

    @property
    def wanted(self) -> int:
        """How many there would be if none was lost."""
        return sum(one.header.layout.total for one in self.extents if one.header)

    @property
    def state(self) -> OrphanState:
        """What is there of it."""
        if self.version is None:
            return OrphanState.DAMAGED
        places = [one.header.place for one in self.extents if one.header]
        if any(place not in (UNKNOWN_PLACE, number) for number, place in enumerate(places)):
            return OrphanState.INCOMPLETE
        if not all(map(is_readable, self.extents)) or any(map(is_short, self.extents[:-1])):
            return OrphanState.INCOMPLETE
        return OrphanState.WHOLE if is_short(self.extents[-1]) else OrphanState.OPEN


def sound_shards(extent: OrphanExtent) -> int:
    """Return how many different shards of an extent are there, as far as their headers tell."""
    return len({place.shard for place in extent.places if place.agrees})


def is_readable(extent: OrphanExtent) -> bool:
    """Whether enough shards of an extent are there to read it."""
    return extent.header is not None and sound_shards(extent) >= extent.header.layout.k


def is_short(extent: OrphanExtent) -> bool:
    """Whether an extent is not full, which only the last of a version is."""
    header = extent.header
    return header is not None and header.size < header.chunk_size * EXTENT_CHUNKS


class Grouper:
    """Puts extents together to versions. Pure."""

    def __init__(self) -> None:
        self._open: dict[VersionId, list[OrphanExtent]] = {}
        self._extents = 0
        self._session = -1

    def add(self, extent: OrphanExtent) -> list[OrphanVersion]:
        """Take in the next extent; return the versions of which nothing more is expected."""
        done: list[OrphanVersion] = []
        if extent.id.session != self._session:
            done += [self._close(version) for version in list(self._open) if not self._waits(version)]
            self._session = extent.id.session
        if extent.header is None:
            return [*done, OrphanVersion(None, (extent,))]
        version = extent.header.version
        self._open.setdefault(version, []).append(extent)
        self._extents += 1
        if self._is_over(version, extent) or len(self._open[version]) == MAX_EXTENTS:
            done.append(self._close(version))
        while len(self._open) > MOST_OPEN or self._extents > MOST_OPEN_EXTENTS:
            done.append(self._close(next(iter(self._open))))
        return done

    def finish(self) -> list[OrphanVersion]:
        """Return what is open still: nothing more will come."""
        return [self._close(version) for version in list(self._open)]

    def _waits(self, version: VersionId) -> bool:
        """Whether parts of a version may come with other sessions."""
        return all(place != UNKNOWN_PLACE for place in map(_place, self._open[version]))

    def _is_over(self, version: VersionId, extent: OrphanExtent) -> bool:
        """Whether this extent was the last that the version lacked."""
        if not self._waits(version):
            return is_short(extent)
        extents = self._open[version]
        ends = [_place(one) for one in extents if is_short(one)]
        return bool(ends) and len({*map(_place, extents)}) > max(ends)

    def _close(self, version: VersionId) -> OrphanVersion:
        extents = self._open.pop(version)
        self._extents -= len(extents)
        return OrphanVersion(version, tuple(_in_order(extents)))


def _place(extent: OrphanExtent) -> int:
    return extent.header.place if extent.header else UNKNOWN_PLACE


def _in_order(extents: Iterable[OrphanExtent]) -> Iterator[OrphanExtent]:
    """Yield extents by their places; of several that have one, the one of which most is there."""
    best: dict[int, OrphanExtent] = {}
    for extent in extents:
        place = _place(extent)
        if place == UNKNOWN_PLACE:
            yield extent
        elif place not in best or _rank(extent) > _rank(best[place]):
            best[place] = extent
    for place in sorted(best):
        yield best[place]


def _rank(extent: OrphanExtent) -> tuple[bool, int]:
    return is_readable(extent), sound_shards(extent)


class OrphanListing:
    """An iterator over all orphans, as far as the pools that can be asked tell of them.

    They come in the order in which their ends come. It may be left half way.
    """

    def __init__(
        self, ask: Callable[[ListOrphans], Awaitable[OrphansListed]], after: ExtentId | None = None
    ) -> None:
        self.away: dict[str, None] = {}
        """Pools that were not asked, or not about all: they may hold more of anything."""
        self._ask = ask
        self._request: ListOrphans | None = ListOrphans(after=after)
        self._grouper = Grouper()
        self._ready: deque[OrphanVersion] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> OrphanVersion:
        while not self._ready:
            if self._request is None:
                raise StopAsyncIteration
            page = await self._ask(self._request)
            self.away |= dict.fromkeys(page.away)
            for extent in page.extents:
                self._ready += self._grouper.add(extent)
            if page.next is None:
                self._request = None
                self._ready += self._grouper.finish()
            else:
                self._request = ListOrphans(after=page.next)
        return self._ready.popleft()


def pools_of(extents: Iterable[OrphanExtent]) -> list[tuple[ExtentId, tuple[int, ...]]]:
    """Return the pools that hold shards of each extent."""
    return [(one.id, tuple(sorted({place.pool for place in one.places}))) for one in extents]
