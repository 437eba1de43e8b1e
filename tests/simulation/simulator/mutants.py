"""Mutants: each breaks one rule of droppex, and the checkers must notice. To add one, add it to MUTANTS."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import trio

from droppexd.catalog import batch, catalogue, changes, keys, records, relayouts, simulated_group, uploads
from droppexd.errors import CatalogError, Conflict, DroppexError, NotFound
from droppexd.roles import (
    app,
    app_download,
    catching_up,
    followers,
    log_shipping,
    pool_reconcile,
    pool_writer,
)
from droppexd.store.simulated import SimulatedStore
from tests.simulation.simulator.checks.bounds import BOUNDED
from tests.simulation.simulator.checks.copies import AGREED
from tests.simulation.simulator.checks.losses import COUNTS
from tests.simulation.simulator.checks.reads import LINEARIZABLE
from tests.simulation.simulator.checks.rest import READABLE, RESTS
from tests.simulation.simulator.checks.shards import DROPPED, FLUSHED, PLACED
from tests.simulation.simulator.checks.terms import FENCED
from tests.simulation.simulator.checks.versions import COUNTED, DEGRADED, LISTED, STAYS_DEAD
from tests.simulation.simulator.cluster import JOURNALED
from tests.simulation.simulator.workload import EXACT, RECORDED

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One broken rule."""

    breaks: str
    caught_by: tuple[str, ...]
    """The checkers that may be the first to notice."""
    patch: Patch
    ignoring: tuple[str, ...] = ()
    """Checkers that look away, so that it is caught by what comes of it."""
    seed: int = 0
    """The first that noticed it when that was last looked for. Plans change: it may be another by now."""


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))


def _acknowledge_before_flush(stack: ExitStack) -> None:
    submit = pool_writer.SmallWriter.submit
    finish = pool_writer.ShardStreams.write

    def submit_and_say_so(self, shard, done) -> None:
        submit(self, shard, lambda _: None)
        done(1)

    async def write(self, stream, request, body) -> int:
        if not request.last:
            return await finish(self, stream, request, body)

        async def later() -> None:
            try:
                await finish(self, stream, request, body)
            except DroppexError:
                return

        trio.lowlevel.spawn_system_task(later)
        return 1

    _replace(stack, pool_writer.SmallWriter, "submit", submit_and_say_so)
    _replace(stack, pool_writer.ShardStreams, "write", write)


def _drop_without_word(stack: ExitStack) -> None:
    async def review(self, held) -> None:
        await self._run_blocking(self._store.drop, list(held))

    _replace(stack, pool_reconcile.Reconciler, "_review", review)


def _orphan_by_age(stack: ExitStack) -> None:
    first_seen: dict[object, float] = {}

    def is_over(self, extent) -> bool:
        now = self._clock.now()
        return now - first_seen.setdefault(extent, now) > 1.0

    def spent(self, session) -> int | None:
        if session not in self._state.sessions:
            return None
        now = self._clock.now()
        return 2**48 if now - first_seen.setdefault(session, now) > 1.0 else 0

    _replace(stack, catalogue.Catalogue, "_is_over", is_over)
    _replace(stack, catalogue.Catalogue, "_spent", spent)


def _accept_lower_term(stack: ExitStack) -> None:
    async def commit(self, made) -> None:
        operations = made.operations()
        if operations:
            await self._engine.txn((), operations)
        self._large_changes += made.large_changed
        made.committed()

    _replace(stack, catalogue.Catalogue, "_commit", commit)


def _no_generation(stack: ExitStack) -> None:
    def drop_one(self, holding) -> bool:
        key = (holding.extent, holding.shard)
        if key in self._disk.shards:
            self._disk.remove(key)
        return True

    _replace(stack, SimulatedStore, "_drop_one", drop_one)


def _forget_pins(stack: ExitStack) -> None:
    _replace(stack, pool_reconcile.Reconciler, "pin", lambda *_: None)
    _replace(stack, pool_reconcile.Reconciler, "unpin", lambda *_: None)


def _count_out_pool(stack: ExitStack) -> None:
    checked_extent = changes.checked_extent

    def checked(extent, state):
        blind = copy.copy(state)
        blind.out = frozenset()
        return checked_extent(extent, blind)

    _replace(stack, changes, "checked_extent", checked)


def _skip_checksum(stack: ExitStack) -> None:
    class Anything(bytes):
        """Equal to every checksum."""

        def __eq__(self, _other: object) -> bool:
            return True

        def __ne__(self, _other: object) -> bool:
            return False

        __hash__ = bytes.__hash__

    _replace(stack, app_download, "piece_checksum", lambda *_: Anything())


def _forget_degraded(stack: ExitStack) -> None:
    def put_extent(self, extent, version) -> None:
        self.put(batch.extent_key(extent.id), batch.pack_extent(extent, version))

    _replace(stack, batch.Batch, "_put_extent", put_extent)


def _receipt_before_commit(stack: ExitStack) -> None:
    async def write_batch(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        made = batch.Batch(self._engine, self._state, self._grace, self._runtime)
        for one in waiting:
            try:
                one.result = await one.change.judge(made)
            except DroppexError as error:
                one.error = error
            one.done.set()
        await self._commit(made)

    _replace(stack, catalogue.Catalogue, "_write_batch", write_batch)


def _stale_look_ups(stack: ExitStack) -> None:
    look_up = app_download.Reader.look_up

    async def remembered(self, request):
        memory = self.__dict__.setdefault("_remembered", {})
        now = self._runtime.clock.now()
        found, until = memory.get(request.name, (None, 0.0))
        if found is None or now > until:
            found = await look_up(self, request)
            memory[request.name] = found, now + 1.0
        return found

    _replace(stack, app_download.Reader, "look_up", remembered)


def _serve_past_the_mandate(stack: ExitStack) -> None:
    """A master that cannot reach the store answers from what it read there last, and stays the master."""
    reach = simulated_group.StoreLink.ask

    async def get(self, keys):
        memory = self.__dict__.setdefault("_memory", {})
        if self._link.cut:
            return [memory.get(key) for key in keys]
        memory.update(self._store.engine.disk.entries)
        return await reach(self._link, lambda: self._store.engine.get(keys))

    async def keep(self) -> None:
        store = self._link.store
        while True:
            await trio.sleep(store.lease_s / 3)
            with suppress(CatalogError):
                await reach(self._link, partial(store.renew, self._mandate))

    _replace(stack, simulated_group.LinkedEngine, "get", get)
    _replace(stack, simulated_group.Leased, "keep", keep)


def _swap_unchecked(stack: ExitStack) -> None:
    async def decide(self, batch, _session):
        value = await batch.get(keys.version_key(self.version))
        if value is None:
            raise Conflict("it is gone")
        version = records.unpack_version(self.version, value)
        old = (await batch.extent(version.extents[self.place])).extent
        batch.swap_extent(version, self.place, replace(old, id=self.old), self.new)
        return self.version

    _replace(stack, relayouts.SwapExtent, "decide", decide)


def _keep_what_was_swapped(stack: ExitStack) -> None:
    swap = batch.Batch.swap_extent

    def swap_and_keep(self, version, place, old, new) -> None:
        with mock.patch.object(self, "_discard_extent"):
            swap(self, version, place, old, new)

    _replace(stack, batch.Batch, "swap_extent", swap_and_keep)


def _forget_uploads(stack: ExitStack) -> None:
    async def judge(self, made) -> bool:
        record = await uploads._record(made, self.version)
        if record is None:
            raise NotFound("it is gone")
        if self.before_ms is not None and record.touched_ms >= self.before_ms:
            return False
        await uploads._delete_record(made, record)
        return True

    _replace(stack, uploads.DropUpload, "judge", judge)


def _unchecked_conditions(stack: ExitStack) -> None:
    _replace(stack, catalogue.Expected, "check", lambda *_: None)
    _replace(stack, app._App, "_check_condition", _do_nothing)


async def _do_nothing(*_: object) -> None:
    return


def _believe_what_was_refused(stack: ExitStack) -> None:
    _replace(stack, batch.Batch, "refused", batch.Batch.committed)


def _ignore_confirmations(stack: ExitStack) -> None:
    _replace(stack, batch.Batch, "confirm_garbage", lambda *_: None)


def _unbounded_transfers(stack: ExitStack) -> None:
    def add(self, stream) -> int:
        self._last += 1
        self._streams[self._last] = stream
        return self._last

    _replace(stack, app._Streams, "add", add)


def _leak_budget(stack: ExitStack) -> None:
    _replace(stack, app.Lease, "release", lambda _: None)


def _answer_unconfirmed(stack: ExitStack) -> None:
    async def confirm(_self, *, changed) -> None:
        return

    _replace(stack, log_shipping.Led, "confirm", confirm)


def _skip_journals(stack: ExitStack) -> None:
    _replace(stack, log_shipping.Led, "_is_kept", lambda *_: True)


def _break_promises(stack: ExitStack) -> None:
    """A standby writes down what any master sends, of whatever term."""
    follow = followers.FollowersGroup._follow

    async def follow_anyone(self, cluster_id, term, name, address) -> bool:
        await follow(self, cluster_id, term, name, address)
        self._heard_from, self._heard_at = address, self._clock.now()
        return self._led is None

    _replace(stack, followers.FollowersGroup, "_follow", follow_anyone)

    async def heard(self, follower, reply, round_):
        return await listen(
            self, follower, dataclasses.replace(reply, promised=0, term=min(reply.term, self.term)), round_
        )

    listen = log_shipping.Led._heard
    _replace(stack, log_shipping.Led, "_heard", heard)


def _promote_with_too_few(stack: ExitStack) -> None:
    judged = followers.FollowersGroup._judged

    def judge(self, reached, term):
        return dataclasses.replace(judged(self, reached, term), needed=1)

    _replace(stack, followers.FollowersGroup, "_judged", judge)


def _take_over_nothing(stack: ExitStack) -> None:
    async def gather(self, wanted):
        position = await catching_up.position_of(self._replica)
        question = self._question(wanted, position, adopt=True, trial=False)
        votes = await self._ask(self._others(), question)
        return {name: vote for name, vote in votes.items() if vote.done}

    _replace(stack, followers.FollowersGroup, "_gather", gather)


_UNDONE = (AGREED, LINEARIZABLE, RECORDED, STAYS_DEAD, PLACED, DROPPED)
"""What may be seen first of a commit that is undone: that it is, an answer that contradicts it, or a shard of it that is
called dead."""

MUTANTS: dict[str, Mutant] = {
    # The rules that the design names.
    "acknowledge-before-flush": Mutant(
        breaks="a pool answers when a shard has arrived, and flushes it afterwards",
        # What is written late may also come after the verdict on it, and stay.
        caught_by=(FLUSHED, PLACED, RESTS),
        patch=_acknowledge_before_flush,
    ),
    "drop-without-word": Mutant(
        breaks="a pool drops what it wants to ask about, without asking the master",
        caught_by=(DROPPED, FLUSHED, PLACED),
        patch=_drop_without_word,
    ),
    "no-generation": Mutant(
        breaks="an order to drop a shard names no stored instance",
        caught_by=(DROPPED, FLUSHED, PLACED),
        patch=_no_generation,
        seed=18,
    ),
    "orphan-by-age": Mutant(
        breaks="a shard without a record is dead by its age, and not by its session",
        caught_by=(DROPPED, FLUSHED, PLACED),
        patch=_orphan_by_age,
        seed=2,
    ),
    "accept-lower-term": Mutant(
        breaks="the catalogue takes changes from a master of an earlier term",
        caught_by=(FENCED, COUNTED, STAYS_DEAD, DEGRADED),
        patch=_accept_lower_term,
        seed=34,
    ),
    "skip-checksum": Mutant(
        breaks="an app hands on pieces that it did not verify",
        caught_by=(EXACT, READABLE),
        patch=_skip_checksum,
        seed=9,
    ),
    "count-out-pool": Mutant(
        breaks="shards on a pool that is out count among the k+1 of a commit",
        caught_by=(COUNTS,),
        patch=_count_out_pool,
        seed=8,
    ),
    "forget-degraded": Mutant(
        breaks="an extent with a missing shard does not enter the degraded index",
        caught_by=(DEGRADED,),
        patch=_forget_degraded,
    ),
    "never-repaired": Mutant(
        breaks="the same, and nobody compares the index with the records",
        caught_by=(RESTS,),
        patch=_forget_degraded,
        ignoring=(DEGRADED,),
    ),
    # More, so that each checker has one that it alone must notice.
    "receipt-before-commit": Mutant(
        breaks="the catalogue answers before its transaction is flushed",
        caught_by=(RECORDED, LINEARIZABLE),
        patch=_receipt_before_commit,
    ),
    "forget-pins": Mutant(
        breaks="a verdict removes a shard that is being moved here",
        caught_by=(DROPPED, FLUSHED, PLACED),
        patch=_forget_pins,
        seed=7,
    ),
    "stale-look-ups": Mutant(
        breaks="an app answers reads from a look-up that is up to a second old",
        caught_by=(LINEARIZABLE,),
        patch=_stale_look_ups,
        seed=1,
    ),
    "serve-past-the-mandate": Mutant(
        breaks="a master that is cut off from the store goes on answering reads from memory",
        caught_by=(LINEARIZABLE,),
        patch=_serve_past_the_mandate,
        seed=80,
    ),
    "answer-unconfirmed": Mutant(
        breaks="a master with followers answers before any of them has written that down",
        caught_by=_UNDONE,
        patch=_answer_unconfirmed,
    ),
    "skip-journals": Mutant(
        breaks="a master acknowledges a change that no pool has written down in its journal",
        caught_by=(JOURNALED,),
        patch=_skip_journals,
        seed=22,
    ),
    "break-promises": Mutant(
        breaks="a standby goes on listening to a master of a lower term than it has promised",
        caught_by=(*_UNDONE, RESTS),
        patch=_break_promises,
        seed=11,
    ),
    "promote-with-too-few": Mutant(
        breaks="a controller is promoted without the promise of enough others",
        caught_by=_UNDONE,
        patch=_promote_with_too_few,
        seed=19,
    ),
    "take-over-nothing": Mutant(
        breaks="a controller that is promoted begins without what the others have",
        caught_by=_UNDONE,
        patch=_take_over_nothing,
        seed=4,
    ),
    "unchecked-conditions": Mutant(
        breaks="conditional changes are carried out whether or not the condition holds",
        caught_by=(LINEARIZABLE,),
        patch=_unchecked_conditions,
    ),
    "swap-unchecked": Mutant(
        breaks="an extent of another layout takes the place of one that was swapped already",
        caught_by=(LISTED, COUNTED),
        patch=_swap_unchecked,
        seed=3,
    ),
    "forget-uploads": Mutant(
        breaks="of an upload that is given up the record goes and what it stored stays",
        caught_by=(COUNTED,),
        patch=_forget_uploads,
        seed=54,
    ),
    "keep-what-was-swapped": Mutant(
        breaks="an extent stays on record that another has taken the place of",
        caught_by=(LISTED, RESTS),
        patch=_keep_what_was_swapped,
        seed=3,
    ),
    "believe-what-was-refused": Mutant(
        breaks="of a change for which the disk had no room, the master remembers that it was made",
        caught_by=(RESTS, COUNTED, LINEARIZABLE, RECORDED),
        patch=_believe_what_was_refused,
        seed=5,
    ),
    "ignore-confirmations": Mutant(
        breaks="the record of a dead extent stays when all pools have dropped it",
        caught_by=(RESTS,),
        patch=_ignore_confirmations,
    ),
    "unbounded-transfers": Mutant(
        breaks="an app opens as many transfers as it is asked for",
        caught_by=(BOUNDED,),
        patch=_unbounded_transfers,
        seed=20,
    ),
    "leak-budget": Mutant(
        breaks="a transfer does not give its memory back",
        caught_by=(RESTS, BOUNDED),
        patch=_leak_budget,
    ),
}
