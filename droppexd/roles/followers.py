"""Controllers that each have a copy of the catalogue: one is the master, the others follow its log.

Nobody is elected by a clock. The last master goes on when it comes back, once enough standbys say that they
know of no later one; another controller becomes the master when an operator says so, by `droppex controllers
promote`. It then asks the others to promise that they listen to no lower term, takes over the longest log
among those that do, and begins.

Of T controllers, N standbys confirm what the master answers (`log_shipping.py`). Whoever is promoted needs
the promise of T - N controllers, itself included: any T - N of them and any N + 1, a master and the standbys
that confirmed, have one in common, which knows all that was acknowledged, and listens to the former master no
more. The last master needs N standbys that have promised no later term to anybody: of those that promised one
when another was promoted, there would be one among them.
"""

import logging
import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from droppexd.background import open_background
from droppexd.catalog.catalogue import read_all
from droppexd.catalog.engine import Entry
from droppexd.catalog.group import Health, Mandate, Stale
from droppexd.catalog.keys import POOLS, SYNC
from droppexd.catalog.lost_operations import KeepLost
from droppexd.catalog.promises import MOST_LED, MOST_NAMES, Promise, Promises
from droppexd.catalog.records import unpack_pool
from droppexd.catalog.replica import LogRow, Replica, unpack_rows
from droppexd.catalog.restoring import begin_incarnation
from droppexd.catalog.terms import Position, read_history
from droppexd.errors import CatalogError, Conflict, DroppexError, IdentityError
from droppexd.model import Membership
from droppexd.roles.catching_up import Catching, Source, ask_positions, cluster_of, position_of
from droppexd.roles.log_shipping import Led, Members, joined, read_members
from droppexd.roles.master import Find
from droppexd.runtime import Clock, Runtime
from droppexd.wire.group_messages import DescribeGroup
from droppexd.wire.messages import Request
from droppexd.wire.replication_messages import (
    AppendLog,
    AskVote,
    CopyAnew,
    LogPosition,
    Promote,
    Promoted,
    ReadEntries,
    ReadLog,
)
from droppexd.wire.rpc import Answer, Call, Connections, Handler, Terms
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

HEARD_S = 5.0
"""A master that was not heard from for so long is not known any more."""

_LOOK_S = 1.0
_FIND_EVERY = 5
_ASK_S = 2.0
_POLL_S = 0.5
_COPY_PAUSE_S = 1.0
_LOST_BYTES = 16 * 1024 * 1024
"""Of former operations, at once."""

Body = Sequence[Frame]


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowersSettings:
    """What an operator decides about controllers that follow one another."""

    name: str
    sync: int = 1
    """So many standbys write down what is acknowledged, or all where there are fewer."""
    cluster_id: bytes = b""
    """Which cluster this controller is of; empty for the first one."""
    controllers: tuple[str, ...] = ()
    """Where other controllers may be."""
    journal: int = 0
    """So many pools write down what changes names, or all that can where there are fewer."""


@dataclass(slots=True)
class _Promotion:
    """What an operator asked for, and what came of it."""

    accept_loss: bool
    trial: bool
    answer: Promoted | None = None
    error: DroppexError | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def succeed(self, answer: Promoted) -> None:
        """Let who asked know."""
        self.answer = answer
        self.done.set()

    def fail(self, error: DroppexError) -> None:
        """Let who asked know."""
        self.error = error
        self.done.set()


class FollowersGroup:
    """The controllers that have copies of one catalogue, as one of them sees them."""

    kind = "sqlite"
    endpoints: Sequence[str] = ()
    prefix = ""

    def __init__(
        self,
        replica: Replica,
        promises: Promises,
        keep_lost: KeepLost,
        connections: Connections,
        runtime: Runtime,
        terms: Terms,
        settings: FollowersSettings,
        find: Find | None = None,
    ) -> None:
        self._replica = replica
        self._promises = promises
        self._keep_lost = keep_lost
        self._connections = connections
        self._runtime = runtime
        self._clock = runtime.clock
        self._terms = terms
        self._settings = settings
        self._find = find
        self.source = Source(replica)
        self._promise = Promise()
        self._members = Members({}, 0)
        self._cluster_id = settings.cluster_id
        self._address = ""
        self._led: Led | None = None
        self._writing = trio.Lock()
        """Held by whoever writes to the replica as a standby."""
        self._heard_from = ""
        self._heard_at = -HEARD_S
        self._level_at = -math.inf
        """When this controller had all that the master had."""
        self._promotion: _Promotion | None = None
        self._wake = trio.Event()
        self._overtaken: dict[str, int] = {}
        """The term on account of which a standby made this controller begin another, by name."""
        self._copy_from: str | None = None
        self._copy_wanted = trio.Event()
        self._copying = trio.CancelScope()
        self._failure = ""
        self._copy_failure = ""

    async def open(self) -> None:
        """Read what is known here. Raise CatalogError, and IdentityError for another cluster's copy."""
        self._promise = await self._promises.read()
        own = await cluster_of(self._replica)
        if self._cluster_id and own and own != self._cluster_id:
            raise IdentityError("this controller's copy of the catalogue is another cluster's")
        self._cluster_id = own or self._cluster_id
        self._members = await read_members(self._replica)
        await self._require_same_cluster()
        await self._know_own_names()

    async def _know_own_names(self) -> None:
        """Take note of the own name: whoever has this copy is the same controller, whatever it was called."""
        promise = self._promise
        names = promise.names
        if promise == Promise():
            (sync,) = await self._replica.get((SYNC,))
            if sync is None:  # Nobody ever followed: all names in it were this one's.
                names = tuple(self._members.addresses)
        if self._settings.name not in names:
            names = (*names, self._settings.name)[-MOST_NAMES:]
            await self._save(promise._replace(names=names))

    @property
    def former_names(self) -> frozenset[str]:
        """What this controller was called before."""
        return frozenset(self._promise.names) - {self._settings.name}

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return what this controller answers, master or not, by kind of request."""
        return {
            AppendLog: self.append_log,
            CopyAnew: self.copy_anew,
            ReadLog: self.source.read_log,
            ReadEntries: self.source.read_entries,
            AskVote: self.vote,
            Promote: self.promote,
        }

    # -- as a group ----------------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Whether no other controller can go on when this one cannot."""
        return not self._others() and (not self._joined or self._led is not None)

    @property
    def revision(self) -> int:
        """The last revision of this controller's copy."""
        return self._replica.revision

    @property
    def cluster_id(self) -> bytes:
        """Which cluster this controller is of; empty when that is still to be begun."""
        return self._led.cluster_id if self._led is not None else self._cluster_id

    @property
    def master(self) -> str:
        """The address of the master, as far as this controller knows; empty: nobody."""
        if self._led is not None:
            return self._address
        return self._heard_from if self._clock.now() - self._heard_at < HEARD_S else ""

    @property
    def leads(self) -> int:
        """The term of which this controller is the master; 0 when it is none."""
        return self._led.term if self._led is not None and self._led.begun.is_set() else 0

    @property
    def health(self) -> Health:
        """What is wrong, for people."""
        shortage = self._replica.shortage
        short = (f"the controller {self._settings.name}: {shortage}",) if shortage else ()
        if self._led is not None:
            return Health(failure=self._led.failure, warnings=(*short, *self._led.troubles))
        failure = self._failure or ("" if self.master else "no master is heard from")
        return Health(failure=failure, warnings=(*short, *filter(None, [self._copy_failure])))

    def stale(self) -> Stale | None:
        """Return what this controller's copy says."""
        if not self._replica.revision:
            return None
        return _OwnCopy(self._replica, self._runtime.clock, max(self._level_at, self._confirmed_at()))

    def _confirmed_at(self) -> float:
        return self._led.confirmed_at if self._led is not None else -math.inf

    def admits(self, name: str, address: str) -> bool:
        """Return whether a controller that joins has copied enough to be one of those that must confirm."""
        return self._led is None or self._led.admits(name, address)

    def needs(self, name: str) -> bool:
        """Return whether nothing could be confirmed without this controller."""
        return self._led is not None and self._led.needs(name)

    def vouch_gone(self, name: str) -> None:
        """Take an operator's word that this controller never returns."""
        if self._led is not None:
            self._led.vouch_gone(name)

    def _others(self) -> dict[str, str]:
        members = self._led.members if self._led is not None else self._members
        return members.others(self._promise.names, self._address)

    @asynccontextmanager
    async def campaign(self, address: str) -> AsyncIterator[Mandate]:
        """Wait until this controller, reached at `address`, has the mandate; leaving returns it."""
        self._address = address
        term, promotion = await self._win()
        led = self._led = Led(
            self._replica,
            self._connections,
            name=self._settings.name,
            names=self._promise.names,
            address=address,
            term=term,
            members=self._members,
            sync=self._settings.sync,
            overtaken=self._overtaken,
            journals=self._settings.journal,
        )
        self._failure = ""
        if self._promotion is not None:  # One that was asked for while another was under way.
            self._promotion.fail(Conflict(f"the controller {self._settings.name} is the master already"))
            self._promotion = None
        try:
            async with open_background() as nursery:
                nursery.start_soon(led.ship)
                if promotion is not None:
                    nursery.start_soon(self._tell_promoted, led, promotion)
                yield led
        finally:
            led.end()
            self._members, self._led = led.members, None
            self._cluster_id = led.cluster_id or self._cluster_id
            if promotion is not None and not promotion.done.is_set():
                promotion.fail(CatalogError("the controller did not become the master; see its log"))

    async def _tell_promoted(self, led: Led, promotion: _Promotion) -> None:
        await led.begun.wait()
        if promotion.answer is not None:
            promotion.succeed(replace(promotion.answer, term=led.term, revision=self._replica.revision))

    async def _win(self) -> tuple[int, _Promotion | None]:
        """Return the term to begin, once this controller may."""
        while True:
            promotion, self._promotion = self._promotion, None
            try:
                if promotion is not None:
                    term = await self._be_promoted(promotion)
                    if term is not None:
                        return term, promotion
                elif self._copy_from is None and await self._may_go_on():
                    term = await self._go_on()
                    if term is not None:
                        return term, None
            except DroppexError as error:
                if promotion is not None and not promotion.done.is_set():
                    promotion.fail(error)
                if str(error) != self._failure:
                    log.warning("not the master: %s", error)
                self._failure = str(error)
                if self.alone:
                    raise
            self._wake = trio.Event()
            if self._promotion is None:
                with trio.move_on_after(_POLL_S):
                    await self._wake.wait()

    # -- the last master goes on ---------------------------------------------------------------

    async def _may_go_on(self) -> bool:
        """Return whether this controller was the last master, as far as it knows, or begins a cluster.

        What names no other controller is reason enough for one that never joined others, whose folder may
        come from before promises, or from a backup. For one that joined it may be the beginning of the log.
        """
        history = await read_history(self._replica)
        if not history.begun:
            return not self._joined
        return history.term in self._promise.led or not (self._joined or self._others())

    @property
    def _joined(self) -> bool:
        """Whether this controller came to a cluster that another had begun."""
        return bool(self._settings.cluster_id)

    async def _go_on(self) -> int | None:
        """Return the term to begin when enough standbys know of no other master; else None."""
        others, position = self._others(), await position_of(self._replica)
        wanted = self._next_term(position)
        needed = min(self._members.sync, len(others))
        heard = await self._ask(others, self._question(wanted, position, adopt=False, trial=True))
        later = [vote.name for vote in heard.values() if vote.term > position.term]
        if later:
            self._failure = f"the controller {later[0]} has heard of a later master than this one"
            return None
        if len(heard) < needed:
            self._failure = _waits_for(needed - len(heard), set(others) - set(heard))
            return None
        wanted = max(wanted, *(vote.promised + 1 for vote in heard.values() if not vote.done), 0)
        request = self._question(wanted, position, adopt=False, trial=False)
        granted = await self._ask_holder(others, request)
        if granted is None:
            return None
        async with self._writing:
            await self._promise_self(wanted)
        for _ in range(2):  # Who has promised to one of those that grant it now grants it in the second.
            rest = {name: at for name, at in others.items() if name not in granted}
            votes = await self._ask(rest, replace(request, excused=tuple(granted)))
            granted |= {name for name, vote in votes.items() if vote.done}
        if len(granted) < needed:
            self._failure = _waits_for(needed - len(granted), set(others) - granted)
            return None
        self._require_promise(wanted)
        return wanted

    async def _ask_holder(self, others: Mapping[str, str], request: AskVote) -> set[str] | None:
        """Ask whom this controller has promised a later term, if there is such; return who grants the term.

        None when that one does not: it may be the master, or become it.
        """
        promise = self._promise
        if promise.term <= request.term or promise.name in promise.names:
            return set()
        holders = {name: at for name, at in others.items() if name == promise.name}
        votes = await self._ask(holders, request)
        granted = {name for name, vote in votes.items() if vote.done}
        if granted:
            return granted
        self._failure = f"this controller has promised to follow {promise.name}, which was to be the master"
        return None

    def _next_term(self, position: Position) -> int:
        """Return a term that nobody else has, as far as this controller knows; the same until it is begun."""
        promise = self._promise
        seen = max(position.term, self._terms.current)
        if promise.name == self._settings.name and promise.term > seen:
            return promise.term
        return max(promise.term, seen) + 1

    async def _promise_self(self, term: int) -> None:
        """Promise a term to this controller itself. Only under the lock. Raise Conflict."""
        promise = self._promise
        if (promise.term, promise.name) == (term, self._settings.name):
            return
        if promise.term >= term:
            raise Conflict(f"the controller {promise.name} wants to be the master as well; try again")
        led = (*self._promise.led, term)[-MOST_LED:]
        mine = self._promise._replace(term=term, name=self._settings.name, address=self._address, led=led)
        await self._save(mine)

    def _require_promise(self, term: int) -> None:
        """Raise Conflict when this controller has promised a later term to another meanwhile."""
        if (self._promise.term, self._promise.name) != (term, self._settings.name):
            raise Conflict(f"the controller {self._promise.name} became the master meanwhile")

    async def _save(self, promise: Promise) -> None:
        await self._promises.write(promise)
        self._promise = promise
        # Whoever is copied from may be the master no more.
        self._copying.cancel()

    def _question(self, wanted: int, position: Position, *, adopt: bool, trial: bool) -> AskVote:
        return AskVote(
            cluster_id=self._cluster_id,
            wanted=wanted,
            name=self._settings.name,
            address=self._address,
            term=position.term,
            revision=position.revision,
            adopt=adopt,
            trial=trial,
        )

    async def _ask(self, others: Mapping[str, str], request: AskVote) -> dict[str, LogPosition]:
        """Return the answers of those that answer in time, by name."""
        votes: dict[str, LogPosition] = {}

        async def ask(name: str, address: str) -> None:
            try:
                vote, _ = await self._connections.call(address, request, timeout_s=_ASK_S)
            except DroppexError as error:
                log.debug("no vote of %s: %s", name, error)
                return
            if vote.name == name:
                votes[name] = vote

        async with trio.open_nursery() as nursery:
            for name, address in others.items():
                nursery.start_soon(ask, name, address)
        return votes

    # -- promotion -----------------------------------------------------------------------------

    async def promote(self, _call: Call, request: Promote, _body: Body) -> Answer:
        """Become the master, because an operator says so. Raise Conflict where that may lose something."""
        if self._led is not None:
            raise Conflict(f"the controller {self._settings.name} is the master already")
        if self._promotion is not None:
            raise Conflict("this controller is being promoted already")
        promotion = self._promotion = _Promotion(request.accept_loss, request.trial)
        self._wake.set()
        await promotion.done.wait()
        if promotion.error is not None:
            raise promotion.error
        return promotion.answer or Promoted(term=0, revision=0, reached=0, needed=0)

    async def _be_promoted(self, promotion: _Promotion) -> int | None:
        """Return the term to begin, when enough others promise to follow; None after a trial.

        Raise Conflict otherwise.
        """
        position = await position_of(self._replica)
        if not position.term or self._copy_from is not None:
            raise Conflict("this controller has no whole copy of the catalogue yet; promote another")
        wanted = self._next_term(position)
        # First what would come of it: a promise for nothing takes its standbys from a master that works.
        votes = await self._ask(self._others(), self._question(wanted, position, adopt=True, trial=True))
        wanted = max(wanted, *(vote.promised + 1 for vote in votes.values()), 0)
        answer = self._judged(votes.keys(), wanted)
        if answer.reached < answer.needed and not promotion.accept_loss and not promotion.trial:
            raise Conflict(_too_few(answer))
        if promotion.trial:
            promotion.succeed(answer)
            return None
        async with self._writing:
            await self._promise_self(wanted)
            self._heard_from = ""
            votes = await self._gather(wanted)
            await self._take_over_journal()
            answer = self._judged(votes.keys(), wanted)
            if answer.reached < answer.needed:
                if not promotion.accept_loss:
                    raise Conflict(_too_few(answer))
                wanted = await self._begin_incarnation(wanted)
            else:
                answer = replace(answer, lost=())
        promotion.answer = answer
        log.warning("promoted term=%d reached=%d needed=%d", wanted, answer.reached, answer.needed)
        return wanted

    async def _gather(self, wanted: int) -> dict[str, LogPosition]:
        """Collect promises, and take over the longest log among those who gave them.

        That log may know of more controllers, whose promises may be needed.
        """
        votes: dict[str, LogPosition] = {}
        while True:
            others = {name: at for name, at in self._others().items() if name not in votes}
            position = await position_of(self._replica)
            given = await self._ask(others, self._question(wanted, position, adopt=True, trial=False))
            votes |= {name: vote for name, vote in given.items() if vote.done}
            longest = max(votes.values(), key=_position, default=None)
            if longest is None or _position(longest) <= position:
                return votes
            address = self._others()[longest.name]
            await self._take_over(address)
            if not set(self._others()) - set(votes):
                return votes

    async def _take_over_journal(self) -> None:
        """Take over what a pool's journal has and nobody among the controllers."""
        pools = [unpack_pool(entry.value) for entry in await read_all(self._replica, POOLS)]
        addresses = [pool.address for pool in pools if pool.membership != Membership.REMOVED]
        found = await ask_positions(self._connections, addresses, self._cluster_id, timeout_s=_ASK_S)
        longest = max(found, key=found.__getitem__, default="")
        if not longest or found[longest] <= await position_of(self._replica):
            return
        await self._take_over(longest)
        log.warning("took over what the journal of the pool at %s has, up to %s", longest, found[longest])

    async def _take_over(self, address: str) -> None:
        """Take over what a copy at this address has."""
        catching = Catching(self._replica, self._connections, self._cluster_id)
        common = await catching.take_log(address)
        if common is not None:
            await self._set_aside(common, (await position_of(self._replica)).term)
            await catching.take_everything(address)
        self._members = await read_members(self._replica)

    def _judged(self, reached: Collection[str], term: int) -> Promoted:
        """Return how many controllers are with this one, how many are needed, and what is missing."""
        others = self._others()
        total = len(others) + 1
        silent = sorted(name for name in others if name not in reached)
        lost = tuple(
            f"what {name} alone knows of, after revision {self._replica.revision}" for name in silent
        )
        return Promoted(
            term=term,
            revision=self._replica.revision,
            reached=total - len(silent),
            needed=total - min(self._members.sync, total - 1),
            lost=lost,
        )

    async def _begin_incarnation(self, wanted: int) -> int:
        """Begin a new history of what this controller has; return the term to begin."""
        (newest,) = await self._replica.rows(self._replica.revision - 1, 1)
        number = await begin_incarnation(
            self._replica, self._runtime.entropy, written_ms=newest.time_ms, above_term=wanted
        )
        self._members = await read_members(self._replica)
        await self._promise_self(number + 1)
        return number + 1

    # -- as a standby --------------------------------------------------------------------------

    async def _position(self, *, done: bool) -> LogPosition:
        term, revision = await position_of(self._replica)
        return LogPosition(
            name=self._settings.name,
            promised=self._promise.term,
            promised_to=self._promise.name,
            promised_at=self._promise.address,
            term=term,
            revision=revision,
            done=done,
            busy=self._copy_from is not None or self._led is not None,
        )

    async def _follow(self, cluster_id: bytes, term: int, name: str, address: str) -> bool:
        """Listen to the master of a term; return False when that is none for this controller any more."""
        if self._cluster_id and cluster_id != self._cluster_id:
            raise IdentityError("this controller belongs to another cluster")
        promise = self._promise
        if term < promise.term or (term == promise.term and name != promise.name):
            return False
        if name == self._settings.name:
            raise IdentityError(f"there are two controllers that are called {name}; give one another --name")
        if term > promise.term:
            if self._led is not None:
                self._led.end()
            await self._save(promise._replace(term=term, name=name, address=address))
        self._heard_from, self._heard_at = address, self._clock.now()
        return True

    async def append_log(self, _call: Call, request: AppendLog, body: Body) -> Answer:
        """Write down what the master sends, where it follows. Raise IdentityError for another cluster's."""
        async with self._writing:
            if not await self._follow(request.cluster_id, request.term, request.name, request.address):
                return await self._position(done=False)
            position = await position_of(self._replica)
            here = (request.after, request.after_term) == (position.revision, position.term)
            if not here or self._copy_from is not None or self._led is not None:
                return await self._position(done=False)
            rows = unpack_rows(joined(body), request.after) if body else []
            if rows:
                await self._replica.append(rows)
                await self._took(rows)
            self._failure = ""
            if self._replica.revision >= request.newest:
                self._level_at = self._clock.now()
            return await self._position(done=True)

    async def _took(self, rows: Sequence[LogRow]) -> None:
        if any(b"k/" in row.operations or b"m/" in row.operations for row in rows):
            self._members = await read_members(self._replica)
            self._cluster_id = self._cluster_id or await cluster_of(self._replica)

    async def copy_anew(self, _call: Call, request: CopyAnew, _body: Body) -> Answer:
        """Copy everything from the master, beginning soon. Raise IdentityError for another cluster's."""
        async with self._writing:
            if not await self._follow(request.cluster_id, request.term, request.name, request.address):
                return await self._position(done=False)
            if self._copy_from is None and self._led is None:
                position = await position_of(self._replica)
                await self._set_aside(request.common, position.term)
                self._copy_from = request.address
                self._copy_wanted.set()
            return await self._position(done=True)

    async def _set_aside(self, common: int, term: int) -> None:
        """Keep for people what the own log has behind a revision, for it is about to go."""
        after = common
        while after < self._replica.revision:
            try:
                rows = await self._replica.rows(after, _LOST_BYTES)
            except CatalogError as error:
                log.warning("what this controller had written down alone cannot be told: %s", error)
                return
            if not rows:
                return
            where = await self._keep_lost(term, rows)
            log.warning("%d transactions that no other controller has are kept in %s", len(rows), where)
            after = rows[-1].revision

    async def vote(self, _call: Call, request: AskVote, _body: Body) -> Answer:
        """Promise a controller to listen to no term below the one it wants, unless it must not have it."""
        async with self._writing:
            if self._cluster_id and request.cluster_id != self._cluster_id:
                raise IdentityError("this controller belongs to another cluster")
            promise, position = self._promise, await position_of(self._replica)
            free = request.wanted > promise.term or (
                request.wanted == promise.term and request.name == promise.name
            )
            if not request.adopt:
                excused = (request.name, *promise.names, *request.excused)
                foreign = promise.term > request.term and promise.name not in excused
                free = free and not foreign and position <= (request.term, request.revision)
            if free and not request.trial:
                if self._led is not None:
                    log.warning(
                        "the controller %s takes over, with the term %d", request.name, request.wanted
                    )
                    self._led.end()
                await self._save(
                    promise._replace(term=request.wanted, name=request.name, address=request.address)
                )
                self._heard_from = ""
            return await self._position(done=free)

    # -- behind all that -----------------------------------------------------------------------

    async def work(self) -> None:
        """Copy the catalogue when that is wanted, and look for the master, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.copy)
            nursery.start_soon(self._look)

    async def copy(self) -> None:
        """Copy everything whenever that is wanted, for ever."""
        while True:
            await self._copy_wanted.wait()
            address = self._copy_from or ""
            catching = Catching(self._replica, self._connections, self._cluster_id)
            try:
                with trio.CancelScope() as self._copying:
                    await catching.take_everything(address)
            except DroppexError as error:
                self._copy_failure = f"copying the catalogue from {address} failed: {error}"
                log.warning("%s", self._copy_failure)
                await trio.sleep(_COPY_PAUSE_S)
            else:
                self._copy_failure = ""
                self._members = await read_members(self._replica)
                self._cluster_id = self._cluster_id or await cluster_of(self._replica)
            self._copy_wanted = trio.Event()
            # Where it failed, the next message of the master brings another order, from whoever that is then.
            self._copy_from = None

    async def _look(self) -> None:
        """While no master is heard from, ask the others, for ever."""
        rounds = 0
        found: tuple[str, ...] = ()
        while True:
            await trio.sleep(_LOOK_S)
            if self.master:
                continue
            rounds += 1
            if self._find is not None and rounds % _FIND_EVERY == 1:
                found = await self._find()
            known = (self._promise.address, *self._others().values(), *self._settings.controllers, *found)
            await self._look_at(known)

    async def _look_at(self, known: Sequence[str]) -> None:
        """Take for the master who says so of itself, of these and of those that they take for it."""
        waiting, asked = list(known), {"", self._address}
        while waiting:
            address = waiting.pop(0)
            if address in asked:
                continue
            asked.add(address)
            master = await self._master_of(address)
            if master == address:
                self._heard_from, self._heard_at = address, self._clock.now()
                return
            waiting.insert(0, master)

    async def _require_same_cluster(self) -> None:
        """Ask those that were named, once, of which cluster they are; raise IdentityError for another."""
        others: dict[str, bytes] = {}

        async def ask(address: str) -> None:
            with suppress(DroppexError):
                described, _ = await self._connections.call(address, DescribeGroup(), timeout_s=_ASK_S)
                others[address] = described.cluster_id

        async with trio.open_nursery() as nursery:
            for address in self._settings.controllers:
                nursery.start_soon(ask, address)
        for address, cluster_id in others.items():
            if self._cluster_id and cluster_id not in (b"", self._cluster_id):
                raise IdentityError(
                    f"this controller's folder has the catalogue of another cluster than {address}; "
                    "give it an empty folder with --data"
                )

    async def _master_of(self, address: str) -> str:
        """Return who another controller of the cluster takes for the master; empty: nobody."""
        try:
            described, _ = await self._connections.call(address, DescribeGroup(), timeout_s=_ASK_S)
        except DroppexError:
            return ""
        return described.master if self._cluster_id in (b"", described.cluster_id) else ""


class _OwnCopy:
    """A controller's copy of the catalogue, whoever is the master."""

    def __init__(self, replica: Replica, clock: Clock, level_at: float) -> None:
        self._replica = replica
        self._clock = clock
        self._level_at = level_at

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        return await self._replica.range(start, end, limit)

    def age_s(self) -> float:
        """Return how old what was read is at most, in seconds; infinite when nobody knows."""
        return self._clock.now() - self._level_at


def _position(vote: LogPosition) -> Position:
    return Position(vote.term, vote.revision)


def _waits_for(count: int, names: Collection[str]) -> str:
    those = ", ".join(sorted(names))
    return f"this controller was the last master, and waits for {count} of its standbys {those}"


def _too_few(answer: Promoted) -> str:
    return (
        f"{answer.needed} controllers are needed, and {answer.reached} can be reached: start the others, or "
        "accept that what they alone know of is lost, with --accept-loss"
    )


@asynccontextmanager
async def open_followers_group(group: FollowersGroup) -> AsyncIterator[FollowersGroup]:
    """Take part in a group; raise what `open` raises."""
    await group.open()
    async with open_background() as nursery:
        nursery.start_soon(group.work)
        yield group
