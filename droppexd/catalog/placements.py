"""Counting what survives: pure arithmetic over placements and losses."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from droppexd.catalog.keys import Placement
from droppexd.model import MISSING, SurvivalCount


class Counts(NamedTuple):
    """How many extents are placed in one way, and how many files consist of just one such extent."""

    extents: int = 0
    files: int = 0


def survives_pools(placement: Placement, lost: Collection[int] = ()) -> int:
    """Return how many more pools may be lost before data is; below 0: unreadable now."""
    k, _, pools = placement
    return sum(1 for pool in pools if pool != MISSING and pool not in lost) - k


def survives_machines(placement: Placement, machines: Mapping[int, str], lost: Collection[int] = ()) -> int:
    """Return how many machines may be lost, whichever they are, before data is.

    The worst loss takes the machines with the most shards first. Below 0: unreadable now.
    """
    k, _, pools = placement
    present = [machines.get(pool, "") for pool in pools if pool != MISSING and pool not in lost]
    left = len(present) - k
    survived = min(left, 0)
    for _, shards in Counter(present).most_common():
        left -= shards
        if left < 0:
            break
        survived += 1
    return survived


class SurvivalTally:
    """Adds up files and extents by how many more losses they survive."""

    def __init__(self, measure: Callable[[Placement], int]) -> None:
        self._measure = measure
        self._files: Counter[int] = Counter()
        self._extents: Counter[int] = Counter()

    def add_placements(self, placements: Iterable[tuple[Placement, Counts]]) -> None:
        """Count the extents of these placements, and the files that consist of one of them."""
        for placement, counts in placements:
            survives = self._measure(placement)
            self._extents[survives] += counts.extents
            self._files[survives] += counts.files

    def add_files(self, files: Mapping[int, int]) -> None:
        """Count files that were looked at one by one, by what they survive."""
        for survives, count in files.items():
            self._files[survives] += count

    def result(self) -> tuple[SurvivalCount, ...]:
        """Return the counts, the most endangered first."""
        levels = sorted({level for level, count in (*self._files.items(), *self._extents.items()) if count})
        return tuple(
            SurvivalCount(survives=level, files=self._files[level], extents=self._extents[level])
            for level in levels
        )
