"""How safe everything is: counters for placements, and a scan of the files of several extents."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from droppexd.catalog.batch import EXTENTS_AT_ONCE
from droppexd.catalog.engine import Engine
from droppexd.catalog.keys import LARGE, Placement, end_of, extent_key, parse_id, placement_of, version_key
from droppexd.catalog.placements import SurvivalTally
from droppexd.catalog.records import unpack_extent, unpack_version
from droppexd.catalog.state import State
from droppexd.model import SurvivalCount, Version, VersionId

_VERSIONS_AT_ONCE = 64


Measure = Callable[[Placement], int]
"""How many losses an extent with this placement survives."""


@dataclass(slots=True)
class LargeFiles:
    """What the last scan found, and for which state of things it holds."""

    seen: object = None
    files: Counter[int] = field(default_factory=Counter)


async def survival(
    engine: Engine, state: State, measure: Measure, large: LargeFiles, changes: object
) -> tuple[SurvivalCount, ...]:
    """Count files and extents by how many more losses they survive.

    `changes` is another value whenever a file of several extents has changed, or what is measured, since
    `large` was filled.
    """
    if large.seen != changes:
        large.files = await _scan(engine, measure)
        large.seen = changes
    tally = SurvivalTally(measure)
    tally.add_placements(state.placements.items())
    tally.add_files(large.files)
    return tally.result()


async def _scan(engine: Engine, measure: Measure) -> Counter[int]:
    """Return how many names of files of several extents survive how many losses."""
    files: Counter[int] = Counter()
    start, end = LARGE, end_of(LARGE)
    while True:
        found = await engine.range(start, end, _VERSIONS_AT_ONCE)
        ids = [VersionId(*parse_id(entry.key)) for entry in found]
        for version_id, entry in zip(ids, await engine.get(list(map(version_key, ids))), strict=True):
            if entry is not None:
                version = unpack_version(version_id, entry.value)
                survives = await _survives(engine, version, measure)
                if survives is not None:
                    files[survives] += version.names
        if len(found) < _VERSIONS_AT_ONCE:
            return files
        start = found[-1].key + b"\0"


async def _survives(engine: Engine, version: Version, measure: Measure) -> int | None:
    """Return how many more losses a version survives, or None when it was removed meanwhile."""
    weakest: int | None = None
    for start in range(0, len(version.extents), EXTENTS_AT_ONCE):
        some = version.extents[start : start + EXTENTS_AT_ONCE]
        for extent_id, entry in zip(some, await engine.get([extent_key(one) for one in some]), strict=True):
            if entry is None:
                return None
            extent = unpack_extent(extent_id, entry.value).extent
            survives = measure(placement_of(extent.layout, extent.pools))
            weakest = survives if weakest is None else min(weakest, survives)
        await trio.lowlevel.checkpoint()
    return weakest
