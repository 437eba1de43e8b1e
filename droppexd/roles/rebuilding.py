"""A catalogue is made anew from the pools, for a cluster whose controllers lost theirs.

Of the journals that are found the one that goes furthest is copied whole: it has all that was acknowledged
while it was one of those that are waited for. What it does not know, shards of which only their headers tell,
pools keep. The catalogue has a mark, on which the master that serves it has an app read that and adopt it
(`controller_restored.py`). As after the restore of a backup a new incarnation begins, and nothing is dropped
until all pools have compared.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import trio

from droppexd.catalog.catalogue import read_all
from droppexd.catalog.copies import Facts, open_locked_catalogue, read_facts
from droppexd.catalog.engine import Compare, Operation
from droppexd.catalog.keys import CLUSTER, MEMBERS_VERSION, NEXT_POOL, POOLS, REBUILT, RESTORED, member_key
from droppexd.catalog.membership import forget_membership
from droppexd.catalog.records import pack_fields, pack_member, unpack_pool
from droppexd.catalog.replacement import commit_replacement, finish_replacement
from droppexd.catalog.replica import Replica
from droppexd.catalog.restoring import TERMS_AHEAD, begin_incarnation, is_begun, remove_prepared
from droppexd.catalog.sqlite import open_sqlite_engine, take_lock
from droppexd.catalog.terms import Position, begin_term
from droppexd.errors import CatalogError, Conflict, DroppexError, PeerError
from droppexd.folders import make_folder
from droppexd.model import Membership
from droppexd.roles.admission import fetch
from droppexd.roles.catching_up import Catching
from droppexd.runtime import Runtime
from droppexd.wire.keys import AllowList
from droppexd.wire.member_messages import ListMembers, MembersListed
from droppexd.wire.replication_messages import LogPage, ReadLog
from droppexd.wire.rpc import Connections, Terms, open_connections
from droppexd.wire.transport import Transport

log = logging.getLogger("droppex.catalog")

_ASK_S = 5.0
_NOWHERE = 2**63 - 1
"""A revision that no log has: who is asked for what follows says where its own ends."""


class Rebuilt(NamedTuple):
    """What a rebuild came to."""

    facts: Facts
    journal: str
    """The address of the pool whose journal it was; empty when there was none."""
    written_ms: int
    """When the last transaction of that was written, for people."""
    asked: int
    """How many pools answered."""
    silent: tuple[str, ...]
    """Pools that did not, by name or address: one of them may know of more."""


async def rebuild(path: Path, addresses: Sequence[str], transport: Transport, runtime: Runtime) -> Rebuilt:
    """Make the catalogue at `path` from what these pools, and those that they know of, keep of it.

    Raise IdentityError when a controller runs there, Conflict when there is a catalogue, PeerError when no
    pool answers, and CatalogError when they are of several clusters or what they have is not sound.
    """
    make_folder(path.parent)
    with ExitStack() as stack:
        stack.callback(os.close, take_lock(path))
        finish_replacement(path)
        if is_begun(path):
            raise Conflict(f"there is a catalogue already, {path}: only an empty folder takes a rebuilt one")
        prepared = path.with_name(f"{path.name}.preparing")
        remove_prepared(prepared)
        stack.callback(remove_prepared, prepared)
        async with open_connections(transport, terms=Terms()) as connections:
            survey = Survey(connections)
            await survey.ask({address: address for address in addresses})
            cluster_id = survey.cluster_id(addresses)
            async with open_sqlite_engine(prepared, runtime) as replica:
                written_ms = await collect(replica, survey, cluster_id, runtime)
        with prepared.open("rb") as file:
            os.fsync(file.fileno())
        forget_membership(path.parent)
        commit_replacement(prepared, path)
        finish_replacement(path)
        with open_locked_catalogue(path) as connection:
            facts = read_facts(connection)
    return Rebuilt(facts, survey.best, written_ms, len(survey.found), tuple(sorted(survey.silent.values())))


async def collect(replica: Replica, survey: "Survey", cluster_id: bytes, runtime: Runtime) -> int:
    """Copy the journal that goes furthest, and begin a new history; return when its last row was written."""
    copied = ""
    while survey.best and survey.best != copied:
        copied = survey.best
        catching = Catching(replica, survey.connections, cluster_id)
        if not replica.revision or await catching.take_log(copied) is not None:
            await catching.take_everything(copied)
        # It knows of all pools: another may have more, for a while a pool may have been no journal.
        pools = [unpack_pool(entry.value) for entry in await read_all(replica, POOLS)]
        members = [pool for pool in pools if pool.membership != Membership.REMOVED]
        await survey.ask({pool.address: pool.name for pool in members})
    if not copied:
        await _begin_empty(replica, cluster_id, survey, runtime)
        return 0
    (newest,) = await replica.rows(replica.revision - 1, 1)
    await begin_incarnation(
        replica, runtime.entropy, written_ms=newest.time_ms, rebuilt_from=len(survey.found)
    )
    return newest.time_ms


async def _begin_empty(replica: Replica, cluster_id: bytes, survey: "Survey", runtime: Runtime) -> None:
    """Begin a catalogue of this cluster that knows nothing."""
    operations = [
        Operation(CLUSTER, pack_fields((cluster_id, runtime.entropy.token(16)))),
        *begin_term(TERMS_AHEAD, None, None),
        Operation(NEXT_POOL, pack_fields((1,))),
        Operation(RESTORED, pack_fields((0,))),
        Operation(REBUILT, pack_fields((len(survey.found),))),
    ]
    members = await survey.members()
    if members.records:
        operations += [Operation(member_key(one.public), pack_member(one)) for one in members.records]
        operations.append(Operation(MEMBERS_VERSION, pack_fields((members.version + 1,))))
    await replica.txn([Compare(CLUSTER, 0)], operations)


class Survey:
    """What the pools say of their journals."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.found: dict[str, LogPage] = {}
        """By address."""
        self.silent: dict[str, str] = {}
        """Addresses of pools that did not answer, with what they are called."""

    @property
    def best(self) -> str:
        """The address of the pool whose journal goes furthest; empty when none has one."""
        having = [address for address, page in self.found.items() if page.revision]
        return max(
            having, key=lambda one: Position(self.found[one].term, self.found[one].revision), default=""
        )

    def cluster_id(self, addresses: Sequence[str]) -> bytes:
        """Return which cluster the pools are of. Raise PeerError and CatalogError."""
        if not self.found:
            raise PeerError(f"no pool answers at {', '.join(addresses)}")
        clusters = {page.cluster_id for page in self.found.values() if page.cluster_id}
        if len(clusters) != 1:
            several = "are of several clusters" if clusters else "have not joined a cluster yet"
            raise CatalogError(f"the pools at {', '.join(self.found)} {several}: name those of one")
        return clusters.pop()

    async def members(self) -> AllowList:
        """Return the newest list of who may connect that one of the pools has."""
        newest = AllowList()
        for address in self.found:
            allowed = AllowList()

            async def ask(request: ListMembers, address: str = address) -> MembersListed:
                return (await self.connections.call(address, request, timeout_s=_ASK_S))[0]

            try:
                await fetch(allowed, ask)
            except DroppexError as error:
                log.warning("the pool at %s does not say who may connect: %s", address, error)
            newest = max(newest, allowed, key=lambda one: one.version)
        return newest

    async def ask(self, pools: dict[str, str]) -> None:
        """Ask these pools, by address with their names, unless that was done.

        Raise CatalogError when one of them is no pool, or does not say.
        """
        refusals: list[str] = []

        async def ask(address: str, name: str) -> None:
            request = ReadLog(cluster_id=b"", after=_NOWHERE, after_term=0)
            try:
                page, _ = await self.connections.call(address, request, timeout_s=_ASK_S)
            except PeerError as error:
                log.info("no word from %s: %s", name, error)
                self.silent[address] = name
            except DroppexError as error:
                refusals.append(f"{address} does not say what it keeps: {error}")
            else:
                self.found[address] = page
                self.silent.pop(address, None)

        async with trio.open_nursery() as nursery:
            for address, name in pools.items():
                if address not in self.found:
                    nursery.start_soon(ask, address, name)
        if refusals:
            raise CatalogError(refusals[0])
