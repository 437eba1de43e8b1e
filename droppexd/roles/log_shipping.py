"""What a master with followers does: it sends them its log, and knows what they have written down.

A change is written down here first. What this master answers, be it to a change or to a question, it holds
back until enough followers have confirmed, in answer to a message that was sent later, that they still listen
to it and have written down all that the answer may rest on. So nothing is told that a next master does not
know, and nothing by a master that has been replaced.

Who counts as enough changes with the list of controllers, which is in the log itself. Until a change of it
is confirmed by enough of the former list, both lists have to agree. (As with joint consensus; Ongaro and
Ousterhout, "In Search of an Understandable Consensus Algorithm", USENIX ATC 2014, section 6.)
"""

import logging
import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from droppexd.catalog.engine import Compare, Engine, Entry, LogEntry, Operation
from droppexd.catalog.keys import CLUSTER, CONTROLLERS, SYNC, TERM, controller_key, end_of
from droppexd.catalog.records import pack_fields, unpack_controller, unpack_fields
from droppexd.catalog.replica import LogRow, Replica, pack_rows
from droppexd.catalog.terms import History, Position, read_history
from droppexd.errors import CatalogError, CatalogFull, DroppexError, NotMaster
from droppexd.model import MAX_CONTROLLERS
from droppexd.wire.replication_messages import LOG_FRAME_BYTES, AppendLog, CopyAnew, LogPosition
from droppexd.wire.rpc import Connections
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

PAGE_BYTES = 1024 * 1024
"""Of the log, in one message, about."""

BEAT_S = 1.0
"""A follower hears from the master so often, when there is nothing to send."""

_APPEND_S = 5.0
_CONFIRM_S = 3.0
"""A master that gets no confirmation for so long says so. Those that ask it wait for longer."""

_LEARNER_S = 60.0
"""A controller that joins asks again within this time."""

_ALMOST = 1000
"""Transactions that a controller may lack when it becomes one of those that must confirm."""

_PAUSE_S = 0.5
"""Before a follower that failed is tried again."""

_NOWHERE = _EVERYTHING = 2**63 - 1
"""A revision that no log has: who is asked to append there says how far it is."""


class Members(NamedTuple):
    """The controllers that a log knows, and how many standbys write down what is acknowledged."""

    addresses: Mapping[str, str]
    """By name."""
    sync: int

    def changed(self, operations: Sequence[Operation]) -> "Members":
        """Return what they are after these operations."""
        addresses, sync = dict(self.addresses), self.sync
        for key, value in operations:
            if key == SYNC:
                sync = _sync(value)
            elif not key.startswith(CONTROLLERS):
                continue
            elif value is None:
                addresses = {name: at for name, at in addresses.items() if controller_key(name) != key}
            else:
                record = unpack_controller(value)
                addresses[record.name] = record.address
        return Members(addresses, sync)

    def without(self, name: str) -> "Members":
        """Return what they are without this one."""
        return Members({other: at for other, at in self.addresses.items() if other != name}, self.sync)

    def others(self, names: Collection[str], address: str) -> dict[str, str]:
        """Return the addresses of the others. A controller of such a name or at this address is this one."""
        return {other: at for other, at in self.addresses.items() if other not in names and at != address}


def _sync(value: bytes | None) -> int:
    number: int = unpack_fields(value, "sync")[0] if value is not None else 0
    return number


def changes_members(operation: Operation) -> bool:
    """Return whether an operation changes who the members are."""
    return operation.key == SYNC or operation.key.startswith(CONTROLLERS)


async def read_members(engine: Engine) -> Members:
    """Return the controllers that a log knows."""
    found = await engine.range(CONTROLLERS, end_of(CONTROLLERS), MAX_CONTROLLERS)
    (sync,) = await engine.get((SYNC,))
    records = [unpack_controller(entry.value) for entry in found]
    return Members({record.name: record.address for record in records}, _sync(sync.value if sync else None))


@dataclass(slots=True)
class _Follower:
    """A standby, as the master sees it."""

    name: str
    address: str
    written: int = -1
    """The last revision that it has written down and that is this master's."""
    round: int = 0
    """The last round that it has confirmed."""
    trouble: str = ""
    journal: bool = False
    """Whether it is a pool, which keeps the log and is no controller."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True, eq=False)
class _Waiting:
    """An answer that waits for confirmation."""

    revision: int
    round: int
    changed: bool
    """Whether journals have to have it as well."""
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True)
class _Electorate:
    """A list of members that has to agree, until it has agreed to the revision `until` with its successor."""

    members: Members
    until: int | None = None


class Led:
    """The mandate of a master with followers, and without any as well."""

    def __init__(
        self,
        replica: Replica,
        connections: Connections,
        *,
        name: str,
        names: Collection[str],
        address: str,
        term: int,
        members: Members,
        sync: int,
        overtaken: dict[str, int],
        journals: int = 0,
    ) -> None:
        self.engine: Engine = _LedEngine(self, replica)
        self.above_term = term - 1
        self.term = term
        self.failure = ""
        """Why nothing is confirmed at present."""
        self._replica = replica
        self._connections = connections
        self._name = name
        self._names = frozenset(names)
        self._address = address
        self._sync = sync
        self._overtaken = overtaken
        self._journals: dict[str, str] = {}
        """The pools that keep the log, by the name that they have here."""
        self._journals_wanted = journals
        self._journals_needed = 0
        self._learners: dict[str, tuple[str, float]] = {}
        """Controllers that want to be members, and until when they count as wanting that."""
        self._electorates = [_Electorate(members)]
        self._followers: dict[str, _Follower] = {}
        self._waiting: list[_Waiting] = []
        self._round = 0
        self._history = History(())
        self.cluster_id = b""
        self._news = trio.Event()
        """Something to send, or another list of members."""
        self.begun = trio.Event()
        self.confirmed_at = -math.inf
        """When it was confirmed last that this is the master."""
        self._over = trio.Event()

    # -- as a mandate --------------------------------------------------------------------------

    @property
    def immediate(self) -> bool:
        """Whether nobody has to confirm anything."""
        return not any(map(self._needed, self._electorates))

    async def lost(self) -> None:
        """Return when there may be another master."""
        await self._over.wait()

    @property
    def is_over(self) -> bool:
        """Whether there may be another master."""
        return self._over.is_set()

    def end(self) -> None:
        """Change nothing more and confirm nothing more."""
        self._over.set()
        for waiting in self._waiting:
            waiting.done.set()

    async def confirm(self, *, changed: bool) -> None:
        """Return when enough followers confirm what is known here, in messages that are yet to be sent.

        With `changed`, when enough journals have it, too. Raise NotMaster when they do not.
        """
        if not self.immediate or (changed and self._journals_needed):
            self._round += 1
            waiting = _Waiting(self._replica.revision, self._round, changed)
            self._waiting.append(waiting)
            self._judge()
            self._tell_news()
            try:
                with trio.move_on_after(_CONFIRM_S):
                    await waiting.done.wait()
            finally:
                self._waiting.remove(waiting)
            if not waiting.done.is_set():
                self.failure = self._too_few(waiting)
                raise NotMaster(self.failure)
        if self.is_over:
            raise NotMaster("another controller may have become the master")
        self.confirmed_at = trio.current_time()

    def _too_few(self, waiting: _Waiting) -> str:
        needed = max(map(self._needed, self._electorates))
        silent = sorted(
            f"{one.name} ({one.trouble})"
            for one in self._followers.values()
            if one.trouble and not one.journal
        )
        if all(self._agrees(one, waiting.revision, waiting.round) for one in self._electorates):
            slow = [
                f"{one.name} ({one.trouble or 'slow'})" for one in self._followers.values() if one.journal
            ]
            why = ", ".join(sorted(slow)) or "none on another machine is up"
            return (
                f"too few pools write down the journal of the master {self._name}: {why}; with `journal = 0` "
                "in [catalog] it goes on without"
            )
        whom = f": {', '.join(silent)}" if silent else ""
        return (
            f"the master {self._name} does not hear from the {needed} standbys that must confirm{whom}; give "
            "up one that never comes back with `droppex controllers remove NAME --force`"
        )

    @property
    def members(self) -> Members:
        """The controllers that the log knows."""
        return self._electorates[-1].members

    @property
    def troubles(self) -> list[str]:
        """What is wrong with followers, a line each, for people."""
        return [
            f"the {'journal of the ' if one.journal else 'standby '}{one.name}: {one.trouble}"
            for one in self._followers.values()
            if one.trouble
        ]

    def admits(self, name: str, address: str) -> bool:
        """Return whether a controller that joins has copied enough to be one of those that must confirm.

        Else it is sent the log beforehand: those that must confirm are waited for.
        """
        if self.members.addresses.get(name) == address:
            return True
        if name not in self._learners and len(self._learners) >= MAX_CONTROLLERS:
            return False
        self._learners[name] = address, trio.current_time() + _LEARNER_S
        follower = self._followers.get(name)
        if follower is None or follower.address != address:
            self._tell_news()
            return False
        return follower.written >= max(1, self._replica.revision - _ALMOST)

    def needs(self, name: str) -> bool:
        """Return whether nothing could be confirmed without this controller."""
        return any(
            self._needed(electorate)
            > sum(
                other != name and other in self._followers and not self._followers[other].trouble
                for other in self._others(electorate)
            )
            for electorate in self._electorates
        )

    def keep_journals(self, pools: Mapping[str, str], most: int) -> None:
        """Send the log to these pools, by name with their addresses; with all pools up there are `most`.

        Pools that are down are waited for: what they are to keep would otherwise be on one disk.
        """
        wanted = {f"pool {name}": address for name, address in pools.items()} if self._journals_wanted else {}
        needed = min(self._journals_wanted, most)
        if (wanted, needed) != (self._journals, self._journals_needed):
            self._journals, self._journals_needed = wanted, needed
            self._tell_news()
            self._judge()
        if self.failure and self.immediate and self._is_well():
            self.failure = ""  # Where only changes wait for journals, it may be long until the next one.

    def _is_well(self) -> bool:
        """Whether enough journals are heard from, and have everything."""
        found = [self._followers[name] for name in self._journals if name in self._followers]
        newest = self._replica.revision
        well = sum(one.written >= newest and not one.trouble for one in found)
        return well >= self._journals_needed

    def _is_kept(self, revision: int) -> bool:
        """Whether enough journals have written down this revision."""
        followers = self._followers
        kept = sum(name in followers and followers[name].written >= revision for name in self._journals)
        return kept >= self._journals_needed

    def vouch_gone(self, name: str) -> None:
        """Take an operator's word that this controller never returns: nothing waits for it any more."""
        for electorate in self._electorates:
            electorate.members = electorate.members.without(name)
        self._judge()
        self._tell_news()

    # -- what the catalogue writes -------------------------------------------------------------

    def changing(self, operations: Sequence[Operation]) -> None:
        """Hear that the members are about to be changed: from now on both lists have to agree."""
        self._electorates.append(_Electorate(self.members.changed(operations)))

    def changed(self, revision: int) -> None:
        """Hear at which revision they were changed."""
        self._electorates[-2].until = revision
        self._judge()

    def not_changed(self) -> None:
        """Hear that they stay as they were: there was no room to change them."""
        self._electorates.pop()

    async def began(self) -> None:
        """Hear that the term has begun."""
        self._history = await read_history(self._replica)
        (cluster,) = await self._replica.get((CLUSTER,))
        self.cluster_id = unpack_fields(cluster.value, "cluster")[0] if cluster else b""
        self.begun.set()

    def wrote(self) -> None:
        """Hear that there is something to send."""
        if self._followers or len(self._electorates) > 1:
            self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # -- who has confirmed what ----------------------------------------------------------------

    def _others(self, electorate: _Electorate) -> dict[str, str]:
        return electorate.members.others(self._names, self._address)

    def _needed(self, electorate: _Electorate) -> int:
        return min(electorate.members.sync, len(self._others(electorate)))

    def _agrees(self, electorate: _Electorate, revision: int, round_: int) -> bool:
        followers = self._followers
        agreeing = sum(
            name in followers and followers[name].written >= revision and followers[name].round >= round_
            for name in self._others(electorate)
        )
        return agreeing >= self._needed(electorate)

    def _judge(self) -> None:
        """Let go what is confirmed by now."""
        while len(self._electorates) > 1:
            oldest = self._electorates[0]
            if oldest.until is None or not self._agrees(oldest, oldest.until, 0):
                break
            del self._electorates[0]
            self._tell_news()
        for waiting in self._waiting:
            if waiting.done.is_set() or (waiting.changed and not self._is_kept(waiting.revision)):
                continue
            if all(self._agrees(one, waiting.revision, waiting.round) for one in self._electorates):
                self.failure = ""
                waiting.done.set()

    # -- sending -------------------------------------------------------------------------------

    async def ship(self) -> None:
        """Send the log to whoever is a member, until the mandate is lost."""
        await self.begun.wait()
        if self.members.sync != self._sync:
            await self.engine.txn((), [Operation(SYNC, pack_fields((self._sync,)))])
        async with trio.open_nursery() as nursery:
            while not self.is_over:
                news = self._news
                self._follow_members(nursery)
                await news.wait()
            nursery.cancel_scope.cancel()

    def _follow_members(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        self._learners = {name: learner for name, learner in self._learners.items() if learner[1] > now}
        wanted = {name: address for name, (address, _) in self._learners.items()}
        wanted |= self._journals
        for electorate in self._electorates:
            wanted |= self._others(electorate)
        for name, follower in list(self._followers.items()):
            if wanted.get(name) != follower.address:
                follower.scope.cancel()
                del self._followers[name]
        for name, address in wanted.items():
            if name not in self._followers:
                follower = self._followers[name] = _Follower(name, address, journal=name in self._journals)
                nursery.start_soon(self._serve, follower)

    async def _serve(self, follower: _Follower) -> None:
        with follower.scope:
            position: Position | None = None
            while not self.is_over:
                try:
                    position = await self._send(follower, position)
                except DroppexError as error:
                    follower.trouble = str(error)
                    position = None
                    await trio.sleep(_PAUSE_S)

    async def _send(self, follower: _Follower, position: Position | None) -> Position | None:
        """Send what a follower lacks, once there is anything to send; return how far it is, if known."""
        round_, news = self._round, self._news
        if position is not None and position.revision >= self._replica.revision and follower.round >= round_:
            with trio.move_on_after(BEAT_S):
                await news.wait()
            round_ = self._round
        rows: list[LogRow] = []
        if position is not None and position.revision < self._replica.revision:
            try:
                rows = await self._replica.rows(position.revision, PAGE_BYTES)
            except CatalogError:  # The log does not reach back that far any more.
                return await self._have_it_copied(follower, _EVERYTHING)
        request = AppendLog(
            cluster_id=self.cluster_id,
            term=self.term,
            name=self._name,
            address=self._address,
            after=_NOWHERE if position is None else position.revision,
            after_term=0 if position is None else position.term,
            newest=self._replica.revision,
        )
        reply, _ = await self._connections.call(
            follower.address, request, cut(pack_rows(rows)), timeout_s=_APPEND_S
        )
        return await self._heard(follower, reply, round_)

    async def _heard(self, follower: _Follower, reply: LogPosition, round_: int) -> Position | None:
        if reply.term > self.term:
            log.warning("the controller %s has a later term, %d", follower.name, reply.term)
            self.end()
            return None
        another = reply.promised == self.term and reply.promised_to != self._name
        if reply.promised > self.term or another:
            follower.trouble = f"it has promised the term {reply.promised} to {reply.promised_to}"
            if not follower.journal and self._overtaken.get(follower.name, 0) < reply.promised:
                # Nobody may ever begin that term. To have this follower back, begin a later one.
                self._overtaken[follower.name] = reply.promised
                log.info("the controller %s listens to no term below %d", follower.name, reply.promised)
                self.end()
            await trio.sleep(_PAUSE_S)
            return None
        if reply.busy:
            follower.trouble = "it copies the catalogue anew"
            await trio.sleep(_PAUSE_S)
            return None
        if reply.done:
            follower.trouble = ""
            follower.written, follower.round = reply.revision, round_
            self._judge()
            return Position(reply.term, reply.revision)
        if reply.revision == 0 or (
            reply.revision <= self._replica.revision and self._history.term_at(reply.revision) == reply.term
        ):
            return Position(reply.term, reply.revision)
        return await self._have_it_copied(follower, self._history.end_of(reply.term) or 0)

    async def _have_it_copied(self, follower: _Follower, common: int) -> Position | None:
        request = CopyAnew(
            cluster_id=self.cluster_id,
            term=self.term,
            name=self._name,
            address=self._address,
            common=common,
        )
        try:
            await self._connections.call(follower.address, request, timeout_s=_APPEND_S)
        except DroppexError as error:
            follower.trouble = str(error)
        await trio.sleep(_PAUSE_S)
        return None


class _LedEngine:
    """A replica as the master's catalogue uses it."""

    def __init__(self, led: Led, replica: Replica) -> None:
        self._led = led
        self._replica = replica

    @property
    def most_bytes(self) -> int:
        """How many bytes of keys and values a transaction may have."""
        return self._replica.most_bytes

    @property
    def revision(self) -> int:
        """The revision of the last transaction."""
        return self._replica.revision

    @property
    def shortage(self) -> str:
        """Why nothing is to be added; empty while it may be."""
        return self._replica.shortage

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, in the order asked, all as of one moment."""
        return await self._replica.get(keys)

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None] | None:
        """Return what `get` would, when that takes no waiting; None where it would have to wait."""
        return self._replica.peek(keys)

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        return await self._replica.range(start, end, limit)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds, here; others follow.

        Raise NotMaster once there may be another master, and CatalogFull.
        """
        led = self._led
        if led.is_over:
            raise NotMaster("another controller may have become the master")
        changes = any(map(changes_members, then))
        if changes:
            led.changing(then)
        try:
            revision = await self._replica.txn(compare, then)
        except CatalogFull:
            if changes:
                led.not_changed()
            raise
        if revision is not None:
            if changes:
                led.changed(revision)
            if any(operation.key == TERM for operation in then):
                await led.began()
            led.wrote()
        return revision

    def watch(self, start: bytes, end: bytes) -> AsyncIterator[LogEntry]:
        """Yield the operations on keys in [start, end) that are committed from now on, in order."""
        return self._replica.watch(start, end)

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them."""
        return await self._replica.log(after_revision, limit)

    async def close(self) -> None:
        """Do nothing: the replica is the group's."""


def cut(packed: bytes) -> list[Frame]:
    """Return the frames that a part of a log is sent in."""
    whole = memoryview(packed)
    return [whole[start : start + LOG_FRAME_BYTES] for start in range(0, len(whole), LOG_FRAME_BYTES)]


def joined(body: Sequence[Frame]) -> bytes:
    """Return what was sent in these frames."""
    return bytes(body[0]) if len(body) == 1 else b"".join(body)
