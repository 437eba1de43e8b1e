"""Controllers that share a catalogue in etcd: one of them has the mandate, under a lease.

The key `master` below the prefix is the mandate. Who makes it has it; etcd deletes it when its lease was not
renewed in time. Every transaction of the master compares the revision at which the key was made, so a master
that stood still past its lease, and does not know it yet, changes nothing.
"""

import logging
import math
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import trio

from droppexd.background import open_background
from droppexd.catalog.engine import Engine, Entry
from droppexd.catalog.etcd import (
    KEEP_REVISIONS,
    TXN_S,
    EtcdEngine,
    EtcdKeys,
    created_at,
    first_kv,
    put,
    range_of,
)
from droppexd.catalog.etcd_client import EtcdClient, Json, decode, encode, open_etcd_client
from droppexd.catalog.group import Health, Mandate, Stale, Undivided, Unrestricted
from droppexd.errors import CatalogError, IdentityError
from droppexd.runtime import Runtime

log = logging.getLogger("droppex.etcd")

FORMAT = b"droppex 1"
"""What the key `format` says."""

_ASK_S = 5.0
_POLL_S = 0.5
_LOOK_S = 10.0
"""Between two looks at the health of the members."""
_ALMOST_FULL = 0.8
_RESIGN_S = 1.0


class EtcdSettings(NamedTuple):
    """What an operator decides about etcd."""

    endpoints: tuple[str, ...]
    prefix: str = "droppex/"
    lease_s: int = 10
    quota_bytes: int = 2 * 1024**3
    """What etcd's --quota-backend-bytes says; etcd does not tell it."""
    txn_s: float = TXN_S
    keep_revisions: int = KEEP_REVISIONS


class _Leased(Undivided):
    """The mandate under a lease. It counts as lost when this process's own clock says that it may be."""

    def __init__(
        self, engine: EtcdEngine, client: EtcdClient, lease: str, until: float, lease_s: int
    ) -> None:
        self.engine: Engine = engine
        self._client = client
        self._lease = lease
        self._until = until
        self._lease_s = lease_s
        self._over = trio.Event()

    @property
    def renewed_at(self) -> float:
        """When the lease was renewed last."""
        return self._until - self._lease_s

    async def lost(self) -> None:
        """Return when the lease may be over."""
        await self._over.wait()

    async def keep(self, runtime: Runtime) -> None:
        """Renew the lease until it is over."""
        try:
            while True:
                left_s = self._until - runtime.clock.now()
                await trio.sleep(max(0.0, min(self._lease_s / 3, left_s)))
                asked_at = runtime.clock.now()
                left_s = self._until - asked_at
                if left_s <= 0:
                    return
                with suppress(CatalogError):
                    answer = await self._client.ask(
                        "/v3/lease/keepalive", {"ID": self._lease}, timeout_s=left_s
                    )
                    if int(answer.get("result", {}).get("TTL", 0)) <= 0:
                        return
                    # Counted from before the question: etcd renews it when the question arrives.
                    self._until = asked_at + self._lease_s
        finally:
            self._over.set()

    async def resign(self) -> None:
        """Give the mandate back, if etcd can be told in time."""
        with trio.move_on_after(_RESIGN_S, shield=True), suppress(CatalogError):
            await self._client.ask("/v3/lease/revoke", {"ID": self._lease}, timeout_s=_RESIGN_S)


class _OneMember:
    """Reads of one member of etcd, which may lag behind the others."""

    def __init__(
        self, client: EtcdClient, keys: EtcdKeys, runtime: Runtime, revision: int, current_at: float
    ) -> None:
        self._client = client
        self._keys = keys
        self._runtime = runtime
        self._revision = revision
        self._current_at = current_at
        self._behind = False

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        stem = self._keys.catalogue
        question = {
            "key": encode(stem + start),
            "range_end": encode(stem + end),
            "limit": str(limit),
            "serializable": True,
        }
        answer = await self._client.ask("/v3/kv/range", question, timeout_s=_ASK_S)
        try:
            self._behind |= int(answer["header"]["revision"]) < self._revision
            return [
                Entry(decode(kv["key"])[len(stem) :], decode(kv.get("value", "")), int(kv["mod_revision"]))
                for kv in answer.get("kvs", ())
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise CatalogError(f"etcd answered with something else than was asked for: {error!r}") from error

    def age_s(self) -> float:
        """Return how old what was read is at most, in seconds; infinite when nobody knows."""
        return math.inf if self._behind else self._runtime.clock.now() - self._current_at


class EtcdGroup(Unrestricted):
    """The controllers on one etcd, as one of them sees them; made by `open_etcd_group`."""

    kind = "etcd"
    alone = False

    def __init__(self, client: EtcdClient, settings: EtcdSettings, runtime: Runtime) -> None:
        self._client = client
        self._settings = settings
        self._runtime = runtime
        self._keys = EtcdKeys(settings.prefix)
        self._revision = 0
        self._current_at = -math.inf
        """When etcd said last what it is at."""
        self._engine: EtcdEngine | None = None
        self._failure = ""
        self._warnings: tuple[str, ...] = ()
        self.master = ""
        """The address of the controller that has the mandate, as etcd said last."""

    @property
    def endpoints(self) -> Sequence[str]:
        """Where etcd is."""
        return self._settings.endpoints

    @property
    def prefix(self) -> str:
        """What droppex's keys in etcd begin with."""
        return self._settings.prefix

    @property
    def revision(self) -> int:
        """The last revision that this controller has heard of."""
        return max(self._revision, self._engine.revision if self._engine is not None else 0)

    @property
    def health(self) -> Health:
        """How etcd was when it was used last."""
        failure = self._failure or (self._engine.failure if self._engine is not None else "")
        return Health(failure=failure, warnings=self._warnings)

    # -- the mandate ---------------------------------------------------------------------------

    @asynccontextmanager
    async def campaign(self, address: str) -> AsyncIterator[Mandate]:
        """Wait until this controller has the mandate; leaving returns it.

        Raise IdentityError when the prefix has keys that are not droppex's, or not of this format.
        """
        leased, engine = await self._win(address)
        self._engine, self.master = engine, address
        try:
            async with open_background() as nursery:
                nursery.start_soon(leased.keep, self._runtime)
                nursery.start_soon(engine.work)
                nursery.start_soon(engine.compact)
                try:
                    yield leased
                finally:
                    await engine.close()
        finally:
            self._revision, self._engine, self.master = engine.revision, None, ""
            self._current_at = leased.renewed_at
            await leased.resign()

    async def _win(self, address: str) -> tuple[_Leased, EtcdEngine]:
        while True:
            try:
                if await self._free():
                    won = await self._try(address)
                    if won is not None:
                        return won
            except CatalogError as error:
                if str(error) != self._failure:
                    log.warning("no word from etcd: %s", error)
                self._failure, self.master = str(error), ""
            else:
                self._failure = ""
            await trio.sleep(_POLL_S)

    async def _free(self) -> bool:
        """Return whether nobody has the mandate, and note who has."""
        answer = await self._ask("/v3/kv/range", {"key": encode(self._keys.master)})
        self._note(answer)
        kvs = answer.get("kvs", ())
        self.master = decode(kvs[0]["value"]).decode() if kvs else ""
        return not kvs

    async def _try(self, address: str) -> tuple[_Leased, EtcdEngine] | None:
        """Try to make the key of the mandate."""
        await self._require_own_keys()
        settings, keys = self._settings, self._keys
        asked_at = self._runtime.clock.now()
        granted = await self._ask("/v3/lease/grant", {"TTL": str(settings.lease_s)})
        lease = granted["ID"]
        question = {
            "compare": [created_at(keys.master, 0)],
            "success": [put(keys.master, address.encode(), lease)],
        }
        answer = await self._ask("/v3/kv/txn", question)
        self._note(answer)
        # Whether it was this controller that made the key is read from the key: an answer may be lost, and
        # the question put again.
        read = await self._ask("/v3/kv/txn", {"success": [range_of(keys.master), range_of(keys.txn)]})
        master, last = map(first_kv, read["responses"])
        if master is None or master.get("lease") != lease:
            with suppress(CatalogError):
                await self._ask("/v3/lease/revoke", {"ID": lease})
            return None
        engine = EtcdEngine(
            self._client,
            keys,
            self._runtime,
            mandate=int(master["create_revision"]),
            revision=int(read["header"]["revision"]),
            last_txn=int(last["mod_revision"]) if last else 0,
            txn_s=settings.txn_s,
            keep_revisions=settings.keep_revisions,
        )
        until = asked_at + settings.lease_s
        return _Leased(engine, self._client, lease, until, settings.lease_s), engine

    async def _require_own_keys(self) -> None:
        """Write down whose keys these are, where there are none; raise IdentityError for others'."""
        keys = self._keys
        question = {
            "success": [
                range_of(keys.format),
                {
                    "request_range": {
                        "key": encode(keys.prefix), "range_end": encode(keys.end), "limit": "1",
                        "keys_only": True,
                    }
                },
            ]
        }  # fmt: skip
        answer = await self._ask("/v3/kv/txn", question)
        own, any_key = map(first_kv, answer["responses"])
        found = decode(own["value"]) if own is not None else b""
        if found == FORMAT:
            return
        if own is not None:
            raise IdentityError(
                f"the keys below {self.prefix!r} in etcd have the format {found[:40]!r}, which this release "
                "does not read"
            )
        if any_key is not None:
            raise IdentityError(
                f"etcd has keys below {self.prefix!r} that are not droppex's, the first is "
                f"{decode(any_key['key'])[:60]!r}; choose another catalog.etcd_prefix"
            )
        make = {"compare": [created_at(keys.format, 0)], "success": [put(keys.format, FORMAT)]}
        await self._ask("/v3/kv/txn", make)

    async def _ask(self, path: str, question: Json) -> Json:
        return await self._client.ask(path, question, timeout_s=_ASK_S)

    def _note(self, answer: Json) -> None:
        self._revision = int(answer["header"]["revision"])
        self._current_at = self._runtime.clock.now()

    def stale(self) -> Stale:
        """Return what one member of etcd knows, whether or not it hears from the others."""
        return _OneMember(self._client, self._keys, self._runtime, self._revision, self._current_at)

    # -- health --------------------------------------------------------------------------------

    async def look_after(self) -> None:
        """Look at the members of etcd now and then, for ever."""
        while True:
            self._warnings = tuple(await self._look())
            await trio.sleep(_LOOK_S)

    async def _look(self) -> list[str]:
        found: list[str] = []
        silent: list[str] = []
        for endpoint in self.endpoints:
            try:
                status = await self._client.ask(
                    "/v3/maintenance/status", {}, timeout_s=2.0, endpoint=endpoint
                )
            except CatalogError:
                silent.append(endpoint)
                continue
            size = int(status.get("dbSize", 0))
            if size >= _ALMOST_FULL * self._settings.quota_bytes:
                share = 100 * size // self._settings.quota_bytes
                found.append(
                    f"the database of etcd at {endpoint} takes {share}% of its quota; it stops taking writes "
                    "at 100%: raise the quota or compact and defragment it"
                )
            found += [f"etcd at {endpoint} says: {error}" for error in status.get("errors", ())]
            if not int(status.get("leader", 0)):
                found.append(f"etcd at {endpoint} has no leader")
        if silent and len(silent) < len(self.endpoints):
            found.append(f"of {len(self.endpoints)} members of etcd these do not answer: {', '.join(silent)}")
        if len(silent) < len(self.endpoints):
            found += await self._alarms()
        return found

    async def _alarms(self) -> list[str]:
        try:
            answer = await self._client.ask("/v3/maintenance/alarm", {"action": "GET"}, timeout_s=2.0)
        except CatalogError:
            return []
        kinds = sorted({alarm.get("alarm", "NONE") for alarm in answer.get("alarms", ())} - {"NONE"})
        what = {
            "NOSPACE": "etcd is full and takes no writes",
            "CORRUPT": "members of etcd differ: it is damaged",
        }
        return [f"etcd raises the alarm {kind}: {what.get(kind, 'see its documentation')}" for kind in kinds]


@asynccontextmanager
async def open_etcd_group(
    settings: EtcdSettings, runtime: Runtime, tls: ssl.SSLContext | None = None
) -> AsyncIterator[EtcdGroup]:
    """Take part in the group of controllers on one etcd."""
    async with open_etcd_client(settings.endpoints, tls) as client, open_background() as nursery:
        group = EtcdGroup(client, settings, runtime)
        nursery.start_soon(group.look_after)
        yield group
