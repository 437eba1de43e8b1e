"""The scrub: everything that a pool holds is read and verified, again and again, and what is lost is told.

A pass walks through the store in the order of the keys. It is spread over `every_s`, in portions, and reads
at most `limit_bytes_s`, a quarter of that while clients are served. A pass that somebody asked for goes at
full speed, and at `limit_bytes_s` while clients are served.

The pool's folder remembers where the pass is, every half minute: a crash repeats that much. What was found
is told to the master before its place is passed in that record, so that nothing found is forgotten.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import trio

from droppexd.errors import DroppexError
from droppexd.model import ExtentId, ScrubReport
from droppexd.roles.pool_check import LOST, CheckedShard, LossReports, ShardState, check_shard
from droppexd.roles.scrub_record import (
    MOST_FINDINGS,
    SUBJECT,
    Place,
    ScrubPass,
    ScrubRecord,
    due_shards,
    expected_size,
    next_slice_s,
)
from droppexd.runtime import Runtime
from droppexd.store.interface import Examined, ShardStore
from droppexd.wire.messages import (
    GetScrub,
    GetScrubFindings,
    ScrubFinding,
    ScrubFindings,
    ScrubProgress,
    ScrubState,
    ScrubSummary,
    ShardName,
    StartScrub,
)
from droppexd.wire.rpc import Answer, Call
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.pool")

STRETCH_BYTES = 32 * 1024 * 1024
"""Read in one go, by one thread, but no more than a second may take; the last shard may be longer. From a
page cache that is 10 ms, from a disk 0.2 s."""
STRETCH_SHARDS = 200
"""As for small shards: some 10 ms of a processor."""

_SAVE_S = 30.0
_TELL_S = 5.0
"""Between two tries to tell a master that did not take it."""
_MOST_UNTOLD = 1000
"""Findings that wait for the master; then the scrub waits too."""
_CLIENTS_S = 1.0
"""After a request of a client, clients count as being served for so long."""
_CLIENTS_SHARE = 4
"""While they are, a paced pass takes this part of its limit."""
_LEAST_REST_S = 0.001
_TRIES = 3
_PAUSE_S = 5.0
"""So often, with such pauses, a store that cannot list its shards is asked again."""
_RATE_S = 2.0
"""The speed that is told is that of the last seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubSettings:
    """How often, and how fast."""

    every_s: float = 30 * 86400.0
    """From the beginning of a pass to the beginning of the next."""
    limit_bytes_s: int = 50_000_000


class Stretch(NamedTuple):
    """Some shards, one after another, that were read."""

    shards: int
    size: int
    found: tuple[CheckedShard, ...]
    """Those that are not sound."""
    after: Place | None
    """The last of them; None when nothing came after where the stretch began."""
    trouble: str = ""
    """Why nothing can be read any more."""


def check_stretch(store: Examined, after: Place | None, most: int, most_bytes: int) -> Stretch:
    """Read and verify at most `most` shards behind `after`, until they have `most_bytes`. Blocking.

    A shard that was dropped since it was listed is no finding. Raise StoreError or IntegrityError when the
    store cannot list its shards.
    """
    shards = size = 0
    found: list[CheckedShard] = []
    for holding in store.page(after, most):
        checked = check_shard(store, holding.extent, holding.shard)
        if checked.state == ShardState.ABSENT and holding not in store.find([holding.extent]):
            checked = checked._replace(state=ShardState.SOUND)
        if checked.state != ShardState.SOUND:
            found.append(checked)
        shards += 1
        size += checked.size
        after = (holding.extent, holding.shard)
        if size >= most_bytes:
            break
    return Stretch(shards, size, tuple(found), after if shards else None)


class Scrubber:
    """The task of one pool. `run` is the only one that changes the record, `StartScrub` apart.

    `served` counts the requests of clients that the pool has served.
    """

    def __init__(
        self,
        store: ShardStore,
        runtime: Runtime,
        reports: LossReports,
        served: Callable[[], int],
        settings: ScrubSettings,
    ) -> None:
        self._store = store
        self._clock = runtime.clock
        self._run_blocking = runtime.run_blocking
        self._reports = reports
        self._served = served
        self._settings = settings
        self._record = ScrubRecord()
        self._known = trio.Event()
        self._woken = trio.Event()
        self._read_at = 0.0
        """When `since_s` of the record was right."""
        self._saved = 0.0
        self._unsaved = False
        self._remembers = True
        """Whether the folder took the record when it was last asked to."""
        self._untold: dict[Place, CheckedShard] = {}
        self._refused = -math.inf
        """When the master last did not take what it was told."""
        self._seen = served()
        self._clients_until = 0.0
        self._rate = _Rate()

    # -- what the pool and its peers want to know ----------------------------------------------

    @property
    def record(self) -> ScrubRecord:
        """What is known of the scrubs."""
        return self._record

    def report(self, held: int) -> ScrubReport:
        """Return what a heartbeat of a pool with `held` shards tells of the scrubs."""
        current, last = self._record.current, self._record.last
        return ScrubReport(
            ended_ms=0 if last is None or last.trouble else last.ended_ms,
            percent=0 if current is None else min(100, 100 * current.shards // max(1, held)),
            lost=sum(one.lost for one in (current, last) if one is not None),
        )

    async def start_scrub(self, _call: Call, _request: StartScrub, _body: Sequence[Frame]) -> Answer:
        """Begin a pass at full speed, or join the one that runs so."""
        await self._known.wait()
        held = await self._count()
        current = self._record.current
        if current is None or not current.requested:
            self._begin(requested=True)
        # At once: a pass over a few shards has ended when the event loop comes round again.
        return ScrubState(progress=self._progress(held))

    async def get_scrub(self, _call: Call, _request: GetScrub, _body: Sequence[Frame]) -> Answer:
        """Tell how far the scrub is."""
        await self._known.wait()
        return ScrubState(progress=self._progress(await self._count()))

    async def get_findings(self, _call: Call, request: GetScrubFindings, _body: Sequence[Frame]) -> Answer:
        """Tell what a pass found, while it is the current or the last."""
        await self._known.wait()
        passes = (self._record.current, self._record.last)
        findings = next(
            (one.findings for one in passes if one is not None and one.number == request.number), ()
        )
        return ScrubFindings(findings=tuple(map(_wire_finding, findings)))

    async def _count(self) -> int:
        return (await self._run_blocking(self._store.usage)).shards

    def _progress(self, held: int) -> ScrubProgress:
        current, last = self._record.current, self._record.last
        return ScrubProgress(
            current=None if current is None else _summary(current),
            last=None if last is None else _summary(last),
            held=held,
            expected_size=0 if current is None else expected_size(current, last, held),
            rate=self._rate.now(self._clock.now()) if current is not None else 0,
        )

    # -- the task ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Scrub for ever."""
        await self._load()
        try:
            while True:
                await self._do_next()
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _do_next(self) -> None:
        current = self._record.current
        every_s, since_s = self._settings.every_s, self._since_s()
        if current is None:
            if since_s >= every_s:
                self._begin(requested=False)
            else:
                await self._rest(every_s - since_s)
        elif current.requested or since_s >= every_s:
            await self._go_on(current, STRETCH_SHARDS)
        else:
            due = await self._due(since_s) - current.shards
            if due > 0:
                await self._go_on(current, min(due, STRETCH_SHARDS))
            else:
                await self._rest(next_slice_s(since_s, every_s))

    async def _due(self, since_s: float) -> int:
        """Return how many shards the pass should have read by now."""
        try:
            held = (await self._run_blocking(self._store.usage)).shards
        except DroppexError as error:
            log.warning("the scrub rests: %s", error)
            return 0
        return due_shards(since_s, self._settings.every_s, held)

    def _since_s(self) -> float:
        """Return the seconds since the latest pass began; infinite when none ever did."""
        return self._record.since_s + self._clock.now() - self._read_at

    async def _rest(self, seconds: float) -> None:
        """Have nothing to do for a while: the master knows everything, and so does the folder."""
        await self._tell()
        await self._save()
        # Rounding may leave so little that the clock would not move on, and what is due would never be.
        await self._sleep(max(_LEAST_REST_S, min(seconds, _TELL_S) if self._untold else seconds))

    async def _sleep(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._woken.wait()
        self._woken = trio.Event()

    def _begin(self, *, requested: bool) -> None:
        self._record = replace(
            self._record,
            current=ScrubPass(
                number=self._record.next_number, requested=requested, begun_ms=self._clock.wall_ms()
            ),
            since_s=0.0,
        )
        self._read_at = self._clock.now()
        self._save_soon()
        self._woken.set()

    def _save_soon(self) -> None:
        self._unsaved = True
        self._saved = self._clock.now() - _SAVE_S

    async def _go_on(self, current: ScrubPass, most: int) -> None:
        """Read the next stretch of a pass, and pause as its pace has it."""
        began = self._clock.now()
        speed = self._speed(current)
        stretch = await self._read(current, most, round(min(STRETCH_BYTES, speed)))
        self._take_findings(stretch.found, MOST_FINDINGS - len(current.findings))
        await self._tell()
        if self._record.current is not current:
            return  # Another pass was asked for, and it reads these shards again.
        self._rate.add(self._clock.now(), stretch.size)
        current = _with(current, stretch)
        if stretch.after is None:
            self._end(current)
            return
        self._record = replace(self._record, current=current)
        self._unsaved = True
        if self._clock.now() - self._saved >= _SAVE_S:
            await self._save()
        pause_s = stretch.size / speed - (self._clock.now() - began)
        if pause_s > 0:
            await self._sleep(pause_s)

    def _take_findings(self, found: Sequence[CheckedShard], most_lines: int) -> None:
        for checked in found[:most_lines]:
            log.warning(
                "the scrub found shard %d of extent %s %s: %s",
                checked.shard,
                checked.extent,
                checked.state,
                checked.reason,
            )
        for checked in found:
            if checked.state in LOST:
                self._untold[checked.extent, checked.shard] = checked

    async def _read(self, current: ScrubPass, most: int, most_bytes: int) -> Stretch:
        """Return the next stretch: the last, with the reason, when the store cannot list its shards."""
        trouble = ""
        for _ in range(_TRIES):
            try:
                return await self._run_blocking(check_stretch, self._store, current.after, most, most_bytes)
            except DroppexError as error:
                trouble = str(error)
            log.warning("the scrub cannot go on: %s", trouble)
            await trio.sleep(_PAUSE_S)
        return Stretch(0, 0, (), None, trouble)

    def _end(self, current: ScrubPass) -> None:
        ended = replace(current, ended_ms=self._clock.wall_ms())
        self._record = replace(self._record, current=None, last=ended)
        self._save_soon()
        log.info(
            "scrub ended: pass=%d shards=%d bytes=%d lost=%d unreadable=%d%s",
            ended.number,
            ended.shards,
            ended.size,
            ended.lost,
            ended.unreadable,
            f" before its end: {ended.trouble}" if ended.trouble else "",
        )

    def _speed(self, current: ScrubPass) -> float:
        """Return how many bytes a second may be read now."""
        now = self._clock.now()
        served = self._served()
        if served != self._seen:
            self._seen = served
            self._clients_until = now + _CLIENTS_S
        clients = now < self._clients_until
        if current.requested:
            return self._settings.limit_bytes_s if clients else math.inf
        return self._settings.limit_bytes_s / (_CLIENTS_SHARE if clients else 1)

    # -- the master ----------------------------------------------------------------------------

    async def _tell(self) -> None:
        """Tell the master what is lost; wait for it only when too much has gathered."""
        while self._untold:
            since_s = self._clock.now() - self._refused
            if since_s < _TELL_S:
                if len(self._untold) < _MOST_UNTOLD:
                    return
                await trio.sleep(_TELL_S - since_s)
            if not math.isinf(since_s):
                await self._look_again()
            told = list(self._untold.values())
            try:
                await self._reports.tell(told)
            except DroppexError as error:
                log.warning("the master was not told of lost shards yet: %s", error)
                self._refused = self._clock.now()
                continue
            for checked in told:
                del self._untold[checked.extent, checked.shard]
            self._refused = -math.inf

    async def _look_again(self) -> None:
        """Forget findings that waited and are not true any more: what was rebuilt must not be called lost."""
        for place in list(self._untold):
            checked = await self._run_blocking(check_shard, self._store, *place)
            if checked.state not in LOST:
                del self._untold[place]

    # -- the folder ----------------------------------------------------------------------------

    async def _load(self) -> None:
        now_ms = self._clock.wall_ms()
        try:
            fields = await self._run_blocking(self._store.recall, SUBJECT)
            record = ScrubRecord() if fields is None else ScrubRecord.from_fields(fields)
        except DroppexError as error:
            log.warning("the scrub begins anew: %s", error)
            record = ScrubRecord()
        # The wall clock says how long the pool was away. It only sets the pace: a wrong one makes a pass
        # begin early or late, within one period.
        away_s = min(max(0.0, (now_ms - record.written_ms) / 1000), self._settings.every_s)
        self._record = replace(record, since_s=record.since_s + away_s)
        self._read_at = self._saved = self._clock.now()
        self._known.set()

    async def _save(self) -> None:
        """Remember where the pass is; not while the master has yet to hear of what lies before."""
        if self._untold or not self._unsaved:
            return
        record = replace(self._record, since_s=self._since_s(), written_ms=self._clock.wall_ms())
        self._saved, self._unsaved = self._clock.now(), False
        try:
            await self._run_blocking(self._store.remember, SUBJECT, record.to_fields())
        except DroppexError as error:
            if self._remembers:
                log.warning("where the scrub is cannot be remembered for now: %s", error)
            self._remembers = False
        else:
            if not self._remembers:
                log.info("where the scrub is can be remembered again")
            self._remembers = True


def _with(current: ScrubPass, stretch: Stretch) -> ScrubPass:
    """Return the pass with one more stretch behind it."""
    for checked in stretch.found:
        current = current.found(checked)
    return replace(
        current,
        after=stretch.after or current.after,
        shards=current.shards + stretch.shards,
        size=current.size + stretch.size,
        trouble=stretch.trouble,
    )


class _Rate:
    """Bytes a second over the last seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._size = 0
        self._rate = 0.0

    def add(self, now: float, size: int) -> None:
        """Count what was read up to now."""
        self._size += size
        taken = now - self._began
        if taken >= _RATE_S:
            self._rate = self._size / taken
            self._began, self._size = now, 0

    def now(self, now: float) -> int:
        """Return the speed."""
        taken = now - self._began
        return round(self._size / taken if taken >= _RATE_S else self._rate)


def _summary(one: ScrubPass) -> ScrubSummary:
    return ScrubSummary(
        number=one.number,
        requested=one.requested,
        begun_ms=one.begun_ms,
        ended_ms=one.ended_ms,
        shards=one.shards,
        size=one.size,
        lost=one.lost,
        unreadable=one.unreadable,
        trouble=one.trouble[:1024],
    )


def _wire_finding(checked: CheckedShard) -> ScrubFinding:
    return ScrubFinding(
        shard=ShardName(ExtentId(*checked.extent), checked.shard),
        state=checked.state.value,
        size=checked.size,
        name=checked.name,
        version=checked.version,
        reason=checked.reason[:1024],
    )
