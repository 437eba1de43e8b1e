"""What a pool holds, compared with what the master's records say of it.

A pool drops nothing without the master's word, and counts nothing as its own without it. It asks about dead
extents when the master has some for it, about shards of puts that were given up, and now and then about
all that it holds; after each start it compares everything both ways. All of that is one task, in order: a
verdict is carried out before the next question is asked.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import trio

from droppexd.errors import DroppexError, PeerError, StoreError
from droppexd.held import pack_held
from droppexd.model import MISSING, ExtentId, Holding
from droppexd.roles.master import MasterLink
from droppexd.roles.pool_check import CheckedShard, LossReports, ShardState, check_shard
from droppexd.runtime import Runtime
from droppexd.store.interface import ShardStore
from droppexd.wire.messages import (
    MOST_HELD,
    PAGE_LIMIT,
    ConfirmDropped,
    ExpectedShard,
    ListGarbage,
    Reconcile,
    Reconciled,
    Review,
    ShardsStored,
)
from droppexd.wire.rpc import Terms

log = logging.getLogger("droppex.pool")

_MASTER_S = 10.0
_RETRY_S = 5.0
"""Before a comparison that failed half way goes on."""

_MOST_DOUBTFUL = 4096
"""Shards of uploads that were given up; the look through everything finds those beyond."""
_DOUBT_SLOWS = 4
"""Such a shard is asked about again after a fourth of the time that it was in doubt by then: it may wait for
a floor that rises soon, or for a rebuild elsewhere that takes long."""
_LAST_INDEX = 255
"""Sorts behind every index of an extent."""
_MOST_SESSIONS = 4096
"""Unknown sessions that are remembered, of all those that shards here are of."""
_RECOUNT_PAUSE = 10
"""Shards of unknown sessions are compared again at most a tenth of the time, however much is decided."""
_RULING_BITS = 32
"""What a ruling counts; above stands which start of a master it is of."""
_LAST_COUNTER = 2**48 - 1
_extent_of = attrgetter("extent")


def before_session(session: int) -> ExtentId | None:
    """Return the id that sorts just before every extent of a session."""
    return ExtentId(session - 1, _LAST_COUNTER) if session else None


def _next_limit(limit: int, held: Sequence[Holding], upto: ExtentId | None) -> int:
    """Return how many holdings to ask about next: about as many as an answer goes through."""
    if upto is None or not held or held[-1].extent <= upto:
        return min(2 * limit, MOST_HELD)
    return max(bisect_right(held, upto, key=_extent_of), PAGE_LIMIT)


@dataclass(slots=True)
class _Comparison:
    """How far a comparison of everything is, and what it has found."""

    due: int
    """How many announcements it is for."""
    start: int
    """Which start of a master it is with, as far as this pool has heard."""
    after: ExtentId | None = None
    strangers: dict[int, None] = field(default_factory=dict)
    quarantined: int = 0
    limit: int = field(default_factory=lambda: MOST_HELD)

    def take(self, held: Sequence[Holding], reply: Reconciled) -> None:
        """Go on behind an answer."""
        self.limit = _next_limit(self.limit, held, reply.upto)
        self.after = reply.upto
        self.quarantined += len(reply.unknown)
        for holding in reply.unknown:
            if len(self.strangers) <= _MOST_SESSIONS:
                self.strangers[holding.extent.session] = None


class _Doubt(NamedTuple):
    """Since when an extent is in doubt, and when to ask about it next."""

    since: float
    due: float


class Reconciler:
    """The pool's part in all talk about what it holds."""

    def __init__(
        self,
        store: ShardStore,
        master: MasterLink,
        runtime: Runtime,
        terms: Terms,
        reports: LossReports,
        review_s: float,
    ) -> None:
        self._store = store
        self._master = master
        self._clock = runtime.clock
        self._run_blocking = runtime.run_blocking
        self._terms = terms
        self._reports = reports
        self._review_s = review_s
        # A damaged shard that is rebuilt on another pool is dead here, soon.
        reports.when_damaged(self.doubt)
        self._boot_id = store.identity.boot_id
        self._news = trio.Event()
        self._garbage = False
        self._doubtful: dict[ExtentId, _Doubt] = {}
        self._comparisons_due = 0
        self._comparison = _Comparison(0, 0)
        self.number = MISSING
        """This pool's number, once it was announced."""
        self.reconciled = False
        """Whether all that is held was compared with the records since the last announcement."""
        self.compared = 0
        """With which start of a master all that is held was compared last, both ways; 0: with none."""
        self.quarantined = 0
        """Shards of sessions that the catalogue does not know, as the last comparison found."""
        self.strangers: tuple[int, ...] = ()
        """Those sessions, in order; not the last ones when there are too many to remember."""
        self.all_strangers = True
        """Whether that is all of them."""
        self._ruling = 0
        self._recount_due = False
        self._recount_at = runtime.clock.now()
        self.verdicts = trio.Lock()
        """Held from the question to what its answer says. Who lets the master count on an instance that has
        been here for some time holds it: a verdict on that instance must not be under way."""
        self._pinned: set[tuple[ExtentId, int]] = set()

    # -- news ----------------------------------------------------------------------------------

    def announced(self, number: int, ruling: int) -> None:
        """Take note that a master has welcomed this pool: compare everything with its records."""
        self.number = number
        self._ruling = ruling
        self._compare_soon()

    def _compare_soon(self) -> None:
        self.reconciled = False
        self._comparisons_due += 1
        self._news.set()

    def pin(self, extent: ExtentId, shard: int) -> None:
        """Let no verdict remove a shard that is being rebuilt here: the master may be about to count on it.

        While a shard moves here, the record names the pool it comes from, and a verdict would be "dead". That
        goes for each question that is asked until `unpin`, however late its answer comes. An answer to an
        older question names the instance that was here before, and spares the one that was made since.
        """
        self._pinned.add((extent, shard))

    def unpin(self, extent: ExtentId, shard: int) -> None:
        """Let verdicts decide again: those on questions that are asked from now on."""
        self._pinned.discard((extent, shard))

    def doubt(self, extent: ExtentId) -> None:
        """Ask the master soon about what is held of an extent."""
        if len(self._doubtful) < _MOST_DOUBTFUL:
            now = self._clock.now()
            self._doubtful[extent] = _Doubt(now, now)

    def heard(self, *, review: bool, ruling: int) -> None:
        """Take note of an answer to a heartbeat.

        `review`: there is garbage. Another `ruling`: it was decided what becomes of some unknown shards, or
        this is another start of a master.
        """
        now = self._clock.now()
        if review or any(doubt.due <= now for doubt in self._doubtful.values()):
            self._garbage = True
            self._news.set()
        if ruling >> _RULING_BITS != self._ruling >> _RULING_BITS:
            self._compare_soon()
        elif ruling != self._ruling:
            self._recount_due = True
        self._ruling = ruling
        if self._recount_due and self._clock.now() >= self._recount_at:
            self._news.set()

    async def run(self) -> None:
        """Ask and do what the answers say, for ever.

        Apart from the heartbeats: a long look must not make the pool seem dead.
        """
        clock = self._clock
        reviewed = clock.now()
        while True:
            retrying = self._comparisons_due > 0
            due_s = _RETRY_S if retrying else reviewed + self._review_s - clock.now()
            # The end of the wait says what is due: worked out again, rounding could say "not yet" for ever.
            with trio.move_on_after(max(0.0, due_s)) as waiting:
                await self._news.wait()
            self._news = trio.Event()
            if self._comparisons_due:
                await self._attempt(self._compare_everything)
            # Not while a comparison is due: what it counted before it failed would be believed in the end.
            if self._recount_due and not self._comparisons_due and clock.now() >= self._recount_at:
                began = clock.now()
                await self._attempt(self._recount)
                self._recount_at = clock.now() + _RECOUNT_PAUSE * (clock.now() - began)
            if self._garbage:
                self._garbage = False
                await self._attempt(self._collect_garbage)
                await self._attempt(self._review_doubtful)
            if waiting.cancelled_caught and not retrying:
                reviewed = clock.now()
                await self._attempt(self._review_everything)

    async def _attempt(self, questions: Callable[[], Awaitable[None]]) -> None:
        """Ask some questions; what fails is asked again later, and holds up none of the others."""
        try:
            await questions()
        except DroppexError as error:
            log.warning("comparing what is held with the records is put off: %s", error)

    @property
    def _start(self) -> int:
        return self._ruling >> _RULING_BITS

    # -- both ways -----------------------------------------------------------------------------

    async def _compare_everything(self) -> None:
        """Compare all that is held after an announcement: where a question failed, from there on."""
        if self._comparison.due != self._comparisons_due:
            self._comparison = _Comparison(self._comparisons_due, self._start)
        await self._go_through(self._comparison)
        self._comparison = _Comparison(0, 0)

    async def _go_through(self, comparison: _Comparison) -> None:
        """Go through all that is held, and all that should be, in the order of the extents."""
        while True:
            held = await self._page(comparison.after, comparison.limit)
            try:
                reply = await self._compare(comparison.after, held, last=not held)
            except PeerError:
                # It may be that this much cannot be answered in time.
                comparison.limit = max(comparison.limit // 2, PAGE_LIMIT)
                raise
            comparison.take(held, reply)
            if reply.upto is None:
                break
        self._comparisons_due -= comparison.due
        self.quarantined = comparison.quarantined
        self.strangers = tuple(comparison.strangers)[:_MOST_SESSIONS]
        self.all_strangers = len(comparison.strangers) <= _MOST_SESSIONS
        self.reconciled = not self._comparisons_due
        self.compared = comparison.start
        log.info("compared with the records quarantined=%d", comparison.quarantined)

    async def _recount(self) -> None:
        """Compare again what is held of unknown sessions: some was adopted, or called dead, since."""
        ruling = self._ruling
        if self.all_strangers:
            await self._compare_strangers()
        else:
            await self._go_through(_Comparison(0, self._start))
        if ruling == self._ruling:
            self._recount_due = False

    async def _compare_strangers(self) -> None:
        strangers: list[int] = []
        quarantined = 0
        for session in self.strangers:
            after = before_session(session)
            unknown = 0
            while held := await self.page_of(session, after, PAGE_LIMIT):
                reply = await self._compare(after, held, last=False)
                unknown += len(reply.unknown)
                after = reply.upto or held[-1].extent
            if unknown:
                strangers.append(session)
                quarantined += unknown
        if quarantined != self.quarantined:
            log.info("compared with the records again quarantined=%d", quarantined)
        self.strangers = tuple(strangers)
        self.quarantined = quarantined

    async def _compare(self, after: ExtentId | None, held: Sequence[Holding], *, last: bool) -> Reconciled:
        """Ask about one stretch, and do what the answer says."""
        async with self.verdicts:
            kept = set(self._pinned)
            reply = await self.ask(after, held, last=last)
            told: set[ExpectedShard] = set()
            while await self._report_absent(reply.absent, told):
                # The records have other editions now, and may want another shard of these extents.
                kept |= self._pinned
                reply = await self.ask(after, held, last=last)
            await self._drop(held, reply.drop, kept, reply.term)
            await self._offer(reply)
        return reply

    async def ask(self, after: ExtentId | None, held: Sequence[Holding], *, last: bool) -> Reconciled:
        """Return what the records say of a stretch behind `after`; it ends with the last of `held`."""
        request = Reconcile(number=self.number, boot_id=self._boot_id, after=after, last=last)
        return await self._master.call(request, [pack_held(held)], timeout_s=_MASTER_S)

    async def page_of(self, session: int, after: ExtentId | None, limit: int) -> tuple[Holding, ...]:
        """Return a page of what is held of a session behind an extent."""
        held = await self._page(after, limit)
        return tuple(holding for holding in held if holding.extent.session == session)

    async def _page(self, after: ExtentId | None, limit: int) -> Sequence[Holding]:
        """Return a page of what is held behind an extent, with all shards of each extent.

        A pool has few shards of one extent, but may have all: a page that one extent fills is read larger.
        """
        key = None if after is None else (after, _LAST_INDEX)
        while True:
            held = await self._run_blocking(self._store.page, key, limit)
            if len(held) < limit:
                return held
            whole = bisect_left(held, held[-1].extent, key=_extent_of)
            if whole:
                return held[:whole]
            limit *= 2

    async def _report_absent(self, absent: Sequence[ExpectedShard], told: set[ExpectedShard]) -> bool:
        """Look again for what the records name and the page had not, and tell of what is not there.

        Return whether there was any, beside what is `told` already: the records say something else now.
        """
        absent = [place for place in absent if place not in told]
        if not absent:
            return False
        held = await self._run_blocking(self._store.find, [place.extent for place in absent])
        here = {(holding.extent, holding.shard) for holding in held}
        lost = [place for place in absent if (place.extent, place.shard) not in here]
        if lost:
            log.warning("shards are absent that the records name shards=%d", len(lost))
            await self._reports.tell(
                CheckedShard(place.extent, place.shard, ShardState.ABSENT) for place in lost
            )
        told.update(lost)
        return bool(lost)

    async def _offer(self, reply: Reconciled) -> None:
        """Verify what is held and the records call missing, and tell the master of what is whole."""
        sound: list[ExpectedShard] = []
        for place in reply.wanted:
            check = await self._run_blocking(check_shard, self._store, place.extent, place.shard)
            if check.state == ShardState.SOUND:
                sound.append(place)
        if sound:
            request = ShardsStored(number=self.number, boot_id=self._boot_id, shards=tuple(sound))
            recorded = await self._master.call(request, timeout_s=_MASTER_S)
            log.info("shards are counted again shards=%d", len(sound) - len(recorded.refused))

    # -- what is dead --------------------------------------------------------------------------

    async def _collect_garbage(self) -> None:
        """Drop what the master calls dead, page by page, and confirm it."""
        after: ExtentId | None = None
        while True:
            page = await self._master.call(ListGarbage(number=self.number, after=after), timeout_s=_MASTER_S)
            if not page.extents:
                return
            held = await self._run_blocking(self._store.find, page.extents)
            await self._review(held)
            left = await self._run_blocking(self._store.find, page.extents)
            kept = {holding.extent for holding in left}
            for extent in page.extents:
                # What was moved away is named once. Was it deleted since, it is dead when its grace is over.
                if extent in kept and extent not in self._doubtful:
                    self.doubt(extent)
            gone = tuple(extent for extent in page.extents if extent not in kept)
            if gone:
                await self._master.call(ConfirmDropped(number=self.number, extents=gone), timeout_s=_MASTER_S)
            after = page.extents[-1]

    async def _review_doubtful(self) -> None:
        """Ask about shards that may be dead soon, until they are or the look through everything sees them."""
        now = self._clock.now()
        extents = [extent for extent, doubt in self._doubtful.items() if doubt.due <= now][:PAGE_LIMIT]
        if not extents:
            return
        await self._review(await self._run_blocking(self._store.find, extents))
        left = {holding.extent for holding in await self._run_blocking(self._store.find, extents)}
        for extent in extents:
            since, _ = self._doubtful.pop(extent)
            age = now - since
            if extent in left and age < self._review_s:
                # Behind the others, so that each gets its turn.
                self._doubtful[extent] = _Doubt(since, now + age / _DOUBT_SLOWS)

    async def _review_everything(self) -> None:
        """Ask the master about all that is held, page by page: uploads that failed leave shards behind."""
        after: tuple[ExtentId, int] | None = None
        while True:
            held = await self._run_blocking(self._store.page, after, PAGE_LIMIT)
            if not held:
                return
            await self._review(held)
            after = (held[-1].extent, held[-1].shard)

    async def _review(self, held: Sequence[Holding]) -> None:
        for start in range(0, len(held), PAGE_LIMIT):
            some = tuple(held[start : start + PAGE_LIMIT])
            async with self.verdicts:
                kept = set(self._pinned)
                verdicts = await self._master.call(
                    Review(number=self.number, holdings=some), timeout_s=_MASTER_S
                )
                await self._drop(some, verdicts.drop, kept, verdicts.term)

    async def _drop(
        self,
        asked: Sequence[Holding],
        verdicts: Sequence[Holding],
        pinned: AbstractSet[tuple[ExtentId, int]],
        term: int,
    ) -> None:
        """Drop what is dead of what was asked about, but for what is pinned now or was when it was asked."""
        if not verdicts:
            return
        kept = self._pinned | pinned
        known = set(asked)
        drop = [
            holding
            for holding in verdicts
            if holding in known and (holding.extent, holding.shard) not in kept
        ]
        if not drop or self._store.read_only:
            return
        if term < self._terms.current:
            raise StoreError("an order to drop shards came from a master of the past; refused")
        await self._run_blocking(self._store.drop, drop)
        log.info("dropped shards=%d", len(drop))
