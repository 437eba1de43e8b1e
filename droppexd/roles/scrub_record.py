"""Where a scrub is, as values: what a pool remembers over a restart, and how fast it has to go. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from droppexd.errors import IntegrityError
from droppexd.model import ExtentId, VersionId
from droppexd.roles.pool_check import CheckedShard, ShardState

SUBJECT = "scrub"
"""Under this the store remembers the record."""

SLICES = 720
"""A pass is done in so many portions, hourly ones in 30 days: a disk may rest between two."""

MOST_FINDINGS = 100
"""Findings of a pass that are kept with their names; beyond that they are only counted."""

_FORMAT = 1

Place = tuple[ExtentId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubPass:
    """One walk through everything that is held."""

    number: int
    requested: bool
    """Somebody waits for it: no pace, and only as slow as clients need."""
    begun_ms: int
    ended_ms: int = 0
    """0 while it is under way."""
    after: Place | None = None
    """The last shard that was read."""
    shards: int = 0
    size: int = 0
    """Bytes of pieces that were read."""
    lost: int = 0
    """Shards that were damaged, or gone though the index has them."""
    unreadable: int = 0
    """Shards of which the store could not tell."""
    trouble: str = ""
    """Why it ended before everything was read."""
    findings: tuple[CheckedShard, ...] = field(default=(), repr=False)

    def found(self, checked: CheckedShard) -> Self:
        """Return the pass with one more finding."""
        unreadable = checked.state == ShardState.UNREADABLE
        return replace(
            self,
            lost=self.lost + (not unreadable),
            unreadable=self.unreadable + unreadable,
            findings=(*self.findings, checked) if len(self.findings) < MOST_FINDINGS else self.findings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubRecord:
    """All that a pool knows of its scrubs."""

    current: ScrubPass | None = None
    last: ScrubPass | None = None
    """The latest that ended."""
    since_s: float = math.inf
    """From the beginning of the latest pass to when this was written; infinite when there was none."""
    written_ms: int = 0

    @property
    def next_number(self) -> int:
        """The number of the next pass."""
        return 1 + max((one.number for one in (self.current, self.last) if one is not None), default=0)

    def to_fields(self) -> dict[str, object]:
        """Return what JSON can hold."""
        return {
            "record": _FORMAT,
            "current": None if self.current is None else _pass_fields(self.current),
            "last": None if self.last is None else _pass_fields(self.last),
            "since_s": None if math.isinf(self.since_s) else self.since_s,
            "written_ms": self.written_ms,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Self:
        """Return what `to_fields` was made of. Raise IntegrityError for anything else."""
        try:
            return cls._parse(dict(fields))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the record of the scrub is malformed: {error!r}") from error

    @classmethod
    def _parse(cls, fields: dict[str, Any]) -> Self:
        if fields["record"] != _FORMAT:
            raise ValueError(f"format {fields['record']}")
        since = fields["since_s"]
        return cls(
            current=None if fields["current"] is None else _parse_pass(fields["current"]),
            last=None if fields["last"] is None else _parse_pass(fields["last"]),
            since_s=math.inf if since is None else float(since),
            written_ms=int(fields["written_ms"]),
        )


def due_shards(since_s: float, every_s: float, held: int) -> int:
    """Return how many shards of `held` a pass should have read `since_s` after its beginning.

    It steps once a slice, and is ahead by one: the first is due when the pass begins.
    """
    if since_s >= every_s:
        return held
    slices = math.floor(since_s / every_s * SLICES) + 1
    return math.ceil(held * slices / SLICES)


def next_slice_s(since_s: float, every_s: float) -> float:
    """Return the seconds until the next portion is due."""
    slice_s = every_s / SLICES
    return slice_s - since_s % slice_s


def expected_size(one: ScrubPass, last: ScrubPass | None, held: int) -> int:
    """Return the bytes that a pass will have read at its end, guessed from the mean of what was read."""
    sample = one if one.shards else last
    if sample is None or not sample.shards:
        return one.size
    return max(one.size, sample.size * max(held, one.shards) // sample.shards)


def _place_fields(place: Place | None) -> object:
    return None if place is None else [place[0].session, place[0].counter, place[1]]


def _parse_place(fields: Any) -> Place | None:
    if fields is None:
        return None
    session, counter, shard = map(int, fields)
    return ExtentId(session, counter), shard


def _pass_fields(one: ScrubPass) -> dict[str, object]:
    return {
        "number": one.number,
        "requested": one.requested,
        "begun_ms": one.begun_ms,
        "ended_ms": one.ended_ms,
        "after": _place_fields(one.after),
        "shards": one.shards,
        "size": one.size,
        "lost": one.lost,
        "unreadable": one.unreadable,
        "trouble": one.trouble,
        "findings": [_finding_fields(finding) for finding in one.findings],
    }


def _parse_pass(fields: dict[str, Any]) -> ScrubPass:
    return ScrubPass(
        number=int(fields["number"]),
        requested=bool(fields["requested"]),
        begun_ms=int(fields["begun_ms"]),
        ended_ms=int(fields["ended_ms"]),
        after=_parse_place(fields["after"]),
        shards=int(fields["shards"]),
        size=int(fields["size"]),
        lost=int(fields["lost"]),
        unreadable=int(fields["unreadable"]),
        trouble=str(fields["trouble"]),
        findings=tuple(_parse_finding(finding) for finding in fields["findings"]),
    )


def _finding_fields(finding: CheckedShard) -> dict[str, object]:
    version = finding.version
    return {
        "place": _place_fields((finding.extent, finding.shard)),
        "state": finding.state.value,
        "size": finding.size,
        "chunks": list(finding.chunks),
        "reason": finding.reason,
        "name": finding.name,
        "version": None if version is None else [version.session, version.counter],
    }


def _parse_finding(fields: dict[str, Any]) -> CheckedShard:
    place = _parse_place(fields["place"])
    if place is None:
        raise ValueError("a finding without its place")
    version = fields["version"]
    return CheckedShard(
        *place,
        ShardState(fields["state"]),
        size=int(fields["size"]),
        chunks=tuple(map(int, fields["chunks"])),
        reason=str(fields["reason"]),
        name=str(fields["name"]),
        version=None if version is None else VersionId(*map(int, version)),
    )
