"""How a controller takes over what another one's copy of the catalogue has and its own lacks."""

import logging
from collections.abc import Sequence
from contextlib import suppress

import trio

from droppexd.catalog.engine import Entry
from droppexd.catalog.keys import CLUSTER
from droppexd.catalog.records import unpack_fields
from droppexd.catalog.replica import (
    Replica,
    pack_entries,
    pack_rows,
    unpack_entries,
    unpack_rows,
)
from droppexd.catalog.terms import Position, read_history
from droppexd.errors import CatalogError, DroppexError, IdentityError, PeerError, RemoteProtocolError
from droppexd.roles.log_shipping import PAGE_BYTES, cut, joined
from droppexd.wire.replication_messages import EntriesPage, LogPage, ReadEntries, ReadLog
from droppexd.wire.rpc import Answer, Call, Connections
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

_READ_S = 30.0
_NOWHERE = 2**63 - 1
"""A revision that no log has: who is asked for what follows says where its own ends."""

_ENTRIES = 512
"""Read at once."""
_BEHIND_ALL = b"\xff" * 16

Body = Sequence[Frame]


async def position_of(replica: Replica) -> Position:
    """Return how far a copy goes."""
    return Position((await read_history(replica)).term, replica.revision)


async def cluster_of(replica: Replica) -> bytes:
    """Return which cluster a copy is of; empty for an empty one."""
    (cluster,) = await replica.get((CLUSTER,))
    found: bytes = unpack_fields(cluster.value, "cluster")[0] if cluster is not None else b""
    return found


async def ask_positions(
    connections: Connections, addresses: Sequence[str], cluster_id: bytes, *, timeout_s: float
) -> dict[str, Position]:
    """Return how far the copies at these addresses go; of those that answer in time, and have one."""
    found: dict[str, Position] = {}

    async def ask(address: str) -> None:
        request = ReadLog(cluster_id=cluster_id, after=_NOWHERE, after_term=0)
        with suppress(DroppexError):
            page, _ = await connections.call(address, request, timeout_s=timeout_s)
            if page.revision:
                found[address] = Position(page.term, page.revision)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask, address)
    return found


class Source:
    """Answers those who take over from this controller's copy."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def read_log(self, _call: Call, request: ReadLog, _body: Body) -> Answer:
        """Return what follows a revision. Raise IdentityError for another cluster's controller."""
        own = await self._require_same(request.cluster_id)
        history = await read_history(self._replica)
        newest = self._replica.revision
        known = request.after <= newest
        if request.after_term and request.after:
            known = known and history.term_at(request.after) == request.after_term
        if known:
            try:
                rows = await self._replica.rows(request.after, PAGE_BYTES)
            except CatalogError:
                known = False
        if not known:
            common = min(history.end_of(request.after_term) or 0, newest)
            return LogPage(term=history.term, revision=newest, diverged=True, common=common, cluster_id=own)
        return LogPage(term=history.term, revision=newest, cluster_id=own), cut(pack_rows(rows))

    async def read_entries(self, _call: Call, request: ReadEntries, _body: Body) -> Answer:
        """Return entries from a key on. Raise IdentityError for another cluster's controller."""
        await self._require_same(request.cluster_id)
        history = await read_history(self._replica)
        newest = self._replica.revision
        found = await self._replica.range(request.start, _BEHIND_ALL, _ENTRIES)
        some, size = 0, 0
        while some < len(found) and (not some or size < PAGE_BYTES):
            size += len(found[some].key) + len(found[some].value)
            some += 1
        last = some == len(found) < _ENTRIES
        return EntriesPage(term=history.term, revision=newest, last=last), cut(pack_entries(found[:some]))

    async def _require_same(self, cluster_id: bytes) -> bytes:
        own = await cluster_of(self._replica)
        if cluster_id and own and cluster_id != own:
            raise IdentityError("this copy of a catalogue is of another cluster")
        return own


class Catching:
    """Takes over from another controller's copy into the own one. Nobody else may write there meanwhile."""

    def __init__(self, replica: Replica, connections: Connections, cluster_id: bytes) -> None:
        self._replica = replica
        self._connections = connections
        self._cluster_id = cluster_id

    async def take_log(self, address: str) -> int | None:
        """Append what the other has behind the own log.

        Return None, or when the own log does not lead there the last revision that both may have in common.
        """
        while True:
            term, after = await position_of(self._replica)
            page, body = await self._connections.call(
                address,
                ReadLog(cluster_id=self._cluster_id, after=after, after_term=term),
                timeout_s=_READ_S,
            )
            if page.diverged:
                return page.common
            rows = unpack_rows(joined(body), after)
            if rows:
                await self._replica.append(rows)
            if self._replica.revision >= page.revision or not rows:
                return None

    async def take_everything(self, address: str) -> None:
        """Replace the own copy by the other's, as it is at some moment meanwhile."""
        began, term, copied = 0, 0, 0
        newest = 0
        async with self._replica.install() as copy:
            start = b""
            while True:
                page, body = await self._connections.call(
                    address, ReadEntries(cluster_id=self._cluster_id, start=start), timeout_s=_READ_S
                )
                entries: list[Entry] = unpack_entries(joined(body))
                if not began:
                    began, term = page.revision, page.term
                    if not began:
                        raise CatalogError(f"the controller at {address} has no catalogue to copy")
                self._require_same_term(address, term, page.term)
                if entries and entries[0].key < start:
                    raise RemoteProtocolError(
                        f"the controller at {address} sent entries that were sent before"
                    )
                await copy.put(entries)
                copied += len(entries)
                newest = page.revision
                if page.last or not entries:
                    break
                start = entries[-1].key + b"\0"
            # What was changed while it was read is done again: in the end it is as it was at one revision.
            after = began - 1
            while after < newest:
                found, body = await self._connections.call(
                    address,
                    ReadLog(cluster_id=self._cluster_id, after=after, after_term=0),
                    timeout_s=_READ_S,
                )
                self._require_same_term(address, term, found.term)
                rows = unpack_rows(joined(body), after)
                if found.diverged or not rows:
                    raise CatalogError(
                        f"the log of the controller at {address} does not reach back to {began}"
                    )
                await copy.append(rows)
                after = rows[-1].revision
        log.info("copied the catalogue from %s entries=%d revision=%d", address, copied, after)

    @staticmethod
    def _require_same_term(address: str, term: int, now: int) -> None:
        if term != now:
            raise PeerError(f"the controller at {address} got another master while it was copied from")
