"""The check of a stopped pool's folder: its records, its index against its files, and every shard.

Blocking, and on its own: no network, no event loop, and nothing is changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from droppexd.errors import DroppexError
from droppexd.roles.pool_check import CheckedShard, ShardState, check_shard
from droppexd.roles.pool_scrub import STRETCH_BYTES, STRETCH_SHARDS, check_stretch
from droppexd.roles.scrub_record import Place
from droppexd.store.stopped import StoppedPool

MOST_FINDINGS = 1000
"""Shards that are not sound and are kept with their names; beyond that they are only counted."""


@dataclass(slots=True)
class FolderReport:
    """What was found, so far."""

    problems: list[str] = field(default_factory=list)
    """Of the folder's records and of the index as a whole, a line each."""
    shards: int = 0
    """That were read."""
    size: int = 0
    """Bytes of their pieces."""
    unlisted: int = 0
    """Sound shards that the index does not list: the next start lists them."""
    states: dict[ShardState, int] = field(default_factory=dict)
    """How many shards are in each state that is not sound."""
    findings: list[CheckedShard] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.states

    def take(self, checked: CheckedShard) -> None:
        """Count a shard that is not sound."""
        self.states[checked.state] = self.states.get(checked.state, 0) + 1
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(checked)


Progress = Callable[[FolderReport, int], None]
"""Told the report so far, and how many shards the index lists; 0 while that is not known."""


def check_folder(pool: StoppedPool, progress: Progress) -> FolderReport:
    """Read everything in the folder of a stopped pool and return what was found."""
    report = FolderReport()
    progress(report, 0)
    report.problems.extend(pool.complaints())
    _check_listed(pool, report, progress)
    try:
        for extent, index in pool.unlisted():
            checked = check_shard(pool, extent, index)
            report.shards += 1
            report.size += checked.size
            if checked.state == ShardState.SOUND:
                report.unlisted += 1
            else:
                report.take(checked)
            progress(report, pool.shards)
    except DroppexError as error:
        report.problems.append(str(error))
    return report


def _check_listed(pool: StoppedPool, report: FolderReport, progress: Progress) -> None:
    after: Place | None = None
    while True:
        try:
            stretch = check_stretch(pool, after, STRETCH_SHARDS, STRETCH_BYTES)
        except DroppexError as error:
            report.problems.append(f"the index cannot be read to its end: {error}")
            return
        for checked in stretch.found:
            report.take(checked)
        report.shards += stretch.shards
        report.size += stretch.size
        if stretch.after is None:
            return
        after = stretch.after
        progress(report, pool.shards)
