"""`verify`: what the pools hold is read again, and what is wrong is named."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.progress import Gauge, progress_gauge
from droppexd.cli.render import Document, Output, count_text, losses_text, rate_text, size_text, table
from droppexd.errors import PeerError
from droppexd.wire.messages import (
    FileChecked,
    PoolScrub,
    ScrubFinding,
    ScrubSummary,
    ShardFault,
)

_POLL_S = 0.5
_PATIENCE_S = 60.0
"""A pool that began, and then an app, may be away for so long: it may have been restarted."""
_MOST_FAULTS = 1000
"""Faults of one file that are told one by one."""


# -- everything ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watched:
    """A pool whose pass is waited for."""

    scrub: PoolScrub
    number: int
    """Of the pass."""
    seen: float
    ended: ScrubSummary | None = None
    error: str = ""
    """Why its pass is not waited for any more, or never was."""
    findings: tuple[ScrubFinding, ...] = ()

    @property
    def open(self) -> bool:
        """Whether there is something to wait for."""
        return self.ended is None and not self.error

    @property
    def done(self) -> tuple[int, int]:
        """Bytes read, and to be read in all."""
        progress = self.scrub.progress
        if self.ended is not None:
            return self.ended.size, self.ended.size
        if progress is None or progress.current is None or not self.open:
            return 0, 0
        return progress.current.size, progress.expected_size

    def take(self, scrub: PoolScrub, now: float) -> None:
        """Take what the pool says now."""
        progress = scrub.progress
        if progress is None:
            if now - self.seen > _PATIENCE_S:
                self.error = f"began, and cannot be asked any more: {scrub.error}"
            return
        self.scrub, self.seen = scrub, now
        if progress.last is not None and progress.last.number == self.number:
            self.ended = progress.last
        elif progress.current is None or progress.current.number != self.number:
            self.error = "began, and does not know of it any more"


class Report(NamedTuple):
    """What became of a verification of everything."""

    pools: Sequence[Watched]
    seconds: float

    @property
    def ended(self) -> Sequence[ScrubSummary]:
        """The passes that came to their end."""
        return [pool.ended for pool in self.pools if pool.ended is not None]

    @property
    def unasked(self) -> Sequence[Watched]:
        """The pools of which nothing is known."""
        return [pool for pool in self.pools if pool.error]

    @property
    def lost(self) -> int:
        """Shards that are damaged or gone."""
        return sum(one.lost for one in self.ended)

    @property
    def unreadable(self) -> int:
        """Shards that could not be judged."""
        return sum(one.unreadable for one in self.ended)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the command."""
        if self.lost or self.unreadable or any(one.trouble for one in self.ended):
            return ExitCode.FAILURE
        return ExitCode.UNREACHABLE if self.unasked else ExitCode.OK


async def verify_everything(session: Session, *, exact: bool) -> int:
    """Have every pool read all that it holds, wait for it, and print what was found."""
    began = trio.current_time()
    watched = {scrub.pool: _watched(scrub, began) for scrub in await session.client.watch_scrubs(start=True)}
    with progress_gauge(session.output, "verifying") as gauge:
        await _wait(session, watched, gauge)
    for number, pool in watched.items():
        if pool.ended is not None and (pool.ended.lost or pool.ended.unreadable):
            pool.findings = await session.client.list_findings(number, pool.number)
    report = Report([watched[number] for number in sorted(watched)], trio.current_time() - began)
    output = session.output
    if output.as_json:
        output.document(everything_document(report))
    elif not output.quiet:
        for line in everything_lines(report, exact=exact):
            output.line(line)
    return report.exit_code


def _watched(scrub: PoolScrub, now: float) -> Watched:
    progress = scrub.progress
    if progress is None or progress.current is None:
        return Watched(scrub, 0, now, error=scrub.error or "does not say that it began")
    return Watched(scrub, progress.current.number, now)


async def _wait(session: Session, watched: Mapping[int, Watched], gauge: Gauge) -> None:
    seen = trio.current_time()
    while waiting := [pool for pool in watched.values() if pool.open]:
        sizes = [pool.done for pool in watched.values()]
        title = f"verifying {len(watched) - len(waiting)}/{len(watched)} pools"
        gauge.show(sum(done for done, _ in sizes), sum(total for _, total in sizes), title=title)
        await trio.sleep(_POLL_S)
        now = trio.current_time()
        try:
            scrubs = {scrub.pool: scrub for scrub in await session.client.watch_scrubs()}
        except PeerError:
            if now - seen > _PATIENCE_S:
                raise
            continue
        seen = now
        for pool in waiting:
            scrub = scrubs.get(pool.scrub.pool)
            gone = PoolScrub(pool=0, name="", machine="", error="it is not a pool of the cluster any more")
            pool.take(scrub or gone, now)


def everything_document(report: Report) -> Document:
    """Return the report for programs."""
    return {
        "sound": report.exit_code == ExitCode.OK,
        "shards": sum(one.shards for one in report.ended),
        "size": sum(one.size for one in report.ended),
        "lost": report.lost,
        "unreadable": report.unreadable,
        "unasked": len(report.unasked),
        "seconds": round(report.seconds, 3),
        "pools": [_pool_document(pool) for pool in report.pools],
    }


def _pool_document(pool: Watched) -> Document:
    ended = pool.ended
    return {
        "number": pool.scrub.pool,
        "name": pool.scrub.name,
        "machine": pool.scrub.machine,
        "error": pool.error or (ended.trouble if ended is not None else "") or None,
        "shards": 0 if ended is None else ended.shards,
        "size": 0 if ended is None else ended.size,
        "lost": 0 if ended is None else ended.lost,
        "unreadable": 0 if ended is None else ended.unreadable,
        "findings": [
            {
                "state": finding.state,
                "name": finding.name or None,
                "version": None if finding.version is None else str(finding.version),
                "extent": str(finding.shard.extent),
                "shard": finding.shard.shard,
                "reason": finding.reason,
            }
            for finding in pool.findings
        ],
    }


def everything_lines(report: Report, *, exact: bool) -> list[str]:
    """Return the report for people."""
    rows = [("POOL", "NAME", "MACHINE", "SHARDS", "VERIFIED", "LOST", "UNREADABLE")]
    rows += [
        (
            str(pool.scrub.pool),
            printable(pool.scrub.name) or "-",
            printable(pool.scrub.machine) or "-",
            str(pool.ended.shards),
            size_text(pool.ended.size, exact=exact),
            str(pool.ended.lost),
            str(pool.ended.unreadable),
        )
        for pool in report.pools
        if pool.ended is not None
    ]
    lines = table(rows, right=(0, 3, 4, 5, 6)) if len(rows) > 1 else []
    for pool in report.pools:
        where = f"on {_who(pool.scrub.name, pool.scrub.pool)}"
        lines += [
            f"{_finding_text(finding)} {where}: {printable(finding.reason)}" for finding in pool.findings
        ]
        ended = pool.ended
        told = len(pool.findings)
        if ended is not None and ended.lost + ended.unreadable > told:
            lines.append(f"and {count_text(ended.lost + ended.unreadable - told, 'more shard')} {where}")
        if ended is not None and ended.trouble:
            lines.append(f"broken off {where}: {printable(ended.trouble)}")
        if pool.error:
            lines.append(f"not verified: {_who(pool.scrub.name, pool.scrub.pool)}: {printable(pool.error)}")
    lines.append(_everything_summary(report, exact=exact))
    return lines


def _everything_summary(report: Report, *, exact: bool) -> str:
    shards, size = sum(one.shards for one in report.ended), sum(one.size for one in report.ended)
    amount = (
        f"verified {count_text(shards, 'shard')}, {size_text(size, exact=exact)}, "
        f"on {count_text(len(report.ended), 'pool')}, {rate_text(size, report.seconds)}"
    )
    wrong = []
    if report.lost:
        wrong.append(f"{count_text(report.lost, 'shard')} lost")
    if report.unreadable:
        wrong.append(f"{count_text(report.unreadable, 'shard')} that could not be read")
    if troubled := sum(1 for one in report.ended if one.trouble):
        wrong.append(f"{count_text(troubled, 'pool')} not read to the end")
    if report.unasked:
        wrong.append(f"{count_text(len(report.unasked), 'pool')} not asked")
    return f"{amount}: {', '.join(wrong) or 'all is sound'}"


def _finding_text(finding: ScrubFinding) -> str:
    shard = f"shard {finding.shard.shard} of extent {finding.shard.extent}"
    return (
        f"{finding.state}: {printable(finding.name)}, {shard}"
        if finding.name
        else f"{finding.state}: {shard}"
    )


def _who(name: str, number: int) -> str:
    return printable(name) or f"pool {number}"


# -- one file --------------------------------------------------------------------------------------


@dataclass(slots=True)
class FileReport:
    """What the pools said of one file so far."""

    name: str = ""
    version: str = ""
    size: int = 0
    extents: int = 0
    checked_size: int = 0
    shards: int = 0
    verified_size: int = 0
    states: Counter[str] = field(default_factory=Counter)
    faults: list[ShardFault] = field(default_factory=list)
    survives_pools: int | None = None
    survives_machines: int | None = None

    def take(self, page: FileChecked) -> None:
        """Take what was found of some extents."""
        self.name, self.version = page.name, str(page.version)
        self.size, self.extents = page.size, page.extents
        self.checked_size += page.checked_size
        self.shards += page.shards
        self.verified_size += page.verified_size
        self.states.update(fault.state for fault in page.faults)
        self.faults += page.faults[: _MOST_FAULTS - len(self.faults)]
        self.survives_pools = _least(self.survives_pools, page.survives_pools)
        self.survives_machines = _least(self.survives_machines, page.survives_machines)

    @property
    def sound(self) -> int:
        """Shards that were read whole."""
        return self.shards - self.states.total()

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the command."""
        if self.survives_pools is not None and self.survives_pools < 0:
            return ExitCode.NOT_ENOUGH_SHARDS
        if self.states.total() > self.states["unreachable"]:
            return ExitCode.FAILURE
        return ExitCode.UNREACHABLE if self.states else ExitCode.OK


def _least(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


async def verify_file(session: Session, name: str, *, exact: bool) -> int:
    """Have the pools read every shard of a file, and print what they found."""
    output = session.output
    began = trio.current_time()
    report = FileReport()
    with progress_gauge(output, f"verifying {name}") as gauge:
        async for page in session.client.check_file(name):
            report.take(page)
            gauge.show(report.checked_size, report.size)
    seconds = trio.current_time() - began
    if output.as_json:
        output.document(file_document(report, seconds))
    elif not output.quiet:
        for line in file_lines(report, seconds, output, exact=exact):
            output.line(line)
    return report.exit_code


_STATES = ("missing", "absent", "damaged", "unreadable", "unreachable")


def file_document(report: FileReport, seconds: float) -> Document:
    """Return the report of one file for programs."""
    return {
        "name": report.name,
        "version": report.version,
        "size": report.size,
        "extents": report.extents,
        "shards": report.shards,
        "sound": report.sound,
        **{state: report.states[state] for state in _STATES},
        "verified_size": report.verified_size,
        "survives_pools": report.survives_pools,
        "survives_machines": report.survives_machines,
        "faults": [
            {
                "state": fault.state,
                "extent": fault.extent,
                "shard": fault.shard,
                "pool": fault.pool or None,
                "pool_name": fault.name,
                "machine": fault.machine,
                "reason": fault.reason,
            }
            for fault in report.faults
        ],
        "seconds": round(seconds, 3),
    }


def file_lines(report: FileReport, seconds: float, output: Output, *, exact: bool) -> list[str]:
    """Return the report of one file for people."""
    lines = []
    for fault in report.faults:
        where = f" on {_who(fault.name, fault.pool)}" if fault.pool else ""
        reason = f": {printable(fault.reason)}" if fault.reason else ""
        lines.append(f"{fault.state}: shard {fault.shard} of extent {fault.extent}{where}{reason}")
    if report.states.total() > len(report.faults):
        lines.append(f"and {count_text(report.states.total() - len(report.faults), 'more shard')}")
    counts = [f"{report.sound} sound"] + [
        f"{report.states[state]} {state}" for state in _STATES if report.states[state]
    ]
    losses = losses_text(report.survives_pools, report.survives_machines)
    amount = size_text(report.verified_size, exact=exact)
    lines.append(
        f"{output.text(report.name)}: {count_text(report.shards, 'shard')} of "
        f"{count_text(report.extents, 'extent')}: {', '.join(counts)}; verified {amount}, "
        f"{rate_text(report.verified_size, seconds)}; {losses}"
    )
    return lines
