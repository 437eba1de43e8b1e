"""The engine of a group of controllers: etcd, which keeps the keys and agrees on their order.

Below a prefix stand four kinds of keys: `format` says that they are droppex's, `master` is the mandate
(`etcd_group.py`), `txn` names the last transaction, and `k/` begins the catalogue's own keys.

**One change, once.** An answer of etcd may be lost when the change was made, and the same question may reach
etcd again, or late. So each transaction compares the revision of `txn` with what it was after the one before,
and writes its own name there. It can be sent as often as it takes: at most one of its copies finds what it
compares. Who finds another's name there has lost; who finds its own has won before.

**Large transactions.** etcd takes 128 operations in a transaction, on each level of those within it. The
catalogue's are larger, so they are sent as transactions within transactions, which are carried out as one.
What etcd limits besides is a request's size, `MOST_BYTES`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgpack
import trio

from droppexd.catalog.engine import Compare, Entry, LogEntry, Operation
from droppexd.catalog.etcd_client import (
    EtcdClient,
    EtcdCompacted,
    EtcdRefused,
    EtcdUnavailable,
    Json,
    decode,
    encode,
)
from droppexd.catalog.transactions import check_limit, check_txn, log_entries, log_trimmed
from droppexd.catalog.watching import Watch, Watchers
from droppexd.errors import CatalogError, NotMaster
from droppexd.runtime import Runtime

MOST_BYTES = 1_400_000
"""Of keys and values in one transaction. etcd takes 1.5 MiB in a request unless it is told otherwise."""

OPERATIONS_A_LEVEL = 40
"""Three levels of these are 120 operations by etcd's count, and room for 64000."""

READ_KEYS = 128
"""Keys that are read in one request, as etcd takes them on one level."""

KEEP_REVISIONS = 100_000
COMPACT_EVERY = 1000

TXN_S = 10.0
"""How long a transaction may take over all endpoints before its outcome counts as unknown."""
READ_S = 5.0

_FORMAT = 1
_TOKEN_BYTES = 12


class EtcdKeys:
    """The keys below one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.encode()
        self.format = self.prefix + b"format"
        self.master = self.prefix + b"master"
        self.txn = self.prefix + b"txn"
        self.catalogue = self.prefix + b"k/"

    @property
    def end(self) -> bytes:
        """The first key behind all of them."""
        return _end_of(self.prefix)


def _end_of(prefix: bytes) -> bytes:
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"


def put(key: bytes, value: bytes, lease: str = "") -> Json:
    """Return the operation that writes a key."""
    operation = {"key": encode(key), "value": encode(value)}
    if lease:
        operation["lease"] = lease
    return {"request_put": operation}


def range_of(key: bytes) -> Json:
    """Return the operation that reads a key."""
    return {"request_range": {"key": encode(key)}}


def modified_at(key: bytes, revision: int) -> Json:
    """Return the condition that a key was written by that revision; 0: that it is absent."""
    return {"key": encode(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def created_at(key: bytes, revision: int) -> Json:
    """Return the condition that a key was made by that revision; 0: that it is absent."""
    return {"key": encode(key), "target": "CREATE", "result": "EQUAL", "create_revision": str(revision)}


def revision_of(answer: Json) -> int:
    """Return the revision that etcd was at when it answered."""
    return int(answer["header"]["revision"])


def first_kv(response: Json) -> Json | None:
    """Return the key of an answer to `range_of`; None when it is absent."""
    kvs = response["response_range"].get("kvs")
    return kvs[0] if kvs else None


T = TypeVar("T")


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _nested(operations: list[Json]) -> list[Json]:
    """Put operations into transactions within transactions, until few enough are left on this level."""
    while len(operations) > OPERATIONS_A_LEVEL:
        operations = [
            {"request_txn": {"success": list(some)}} for some in _batched(operations, OPERATIONS_A_LEVEL)
        ]
    return operations


class _Read:
    """Keys that somebody waits for."""

    __slots__ = ("done", "error", "found", "keys")

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = keys
        self.found: list[Entry | None] = []
        self.error: CatalogError | None = None
        self.done = trio.Event()


class EtcdEngine:
    """An Engine on etcd, for the time of one mandate; made by `EtcdGroup.campaign`, which runs `work`."""

    most_bytes = MOST_BYTES
    shortage = ""
    """Of the room in etcd, its quota decides."""

    def __init__(
        self,
        client: EtcdClient,
        keys: EtcdKeys,
        runtime: Runtime,
        *,
        mandate: int,
        revision: int,
        last_txn: int,
        txn_s: float = TXN_S,
        keep_revisions: int = KEEP_REVISIONS,
    ) -> None:
        self._client = client
        self._keys = keys
        self._runtime = runtime
        self._mandate = mandate
        self._revision = revision
        self._last_txn = last_txn
        self._txn_s = txn_s
        self._keep_revisions = keep_revisions
        self._compacted_at = revision
        self._writing = trio.Lock()
        self._reads: deque[_Read] = deque()
        self._wake = trio.Event()
        self._failure: CatalogError | NotMaster | None = None
        self._watchers = Watchers()

    @property
    def revision(self) -> int:
        """The revision of the last transaction that was acknowledged here."""
        return self._revision

    @property
    def failure(self) -> str:
        """Why the engine takes no more writes; empty while it does."""
        return "" if self._failure is None else str(self._failure)

    # -- reading -------------------------------------------------------------------------------

    def peek(self, _keys: Sequence[bytes]) -> list[Entry | None] | None:
        """Return None: every read goes to etcd."""
        return None

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, in the order asked, all as of one moment.

        What is asked while a request is under way goes together in the next one.
        """
        self._check_open()
        if not keys:
            return []
        read = _Read(keys)
        self._reads.append(read)
        self._wake.set()
        await read.done.wait()
        if read.error is not None:
            raise CatalogError(str(read.error))
        return read.found

    async def work(self) -> None:
        """Serve reads for ever. Its end fails those that wait."""
        try:
            async with trio.open_nursery() as nursery:
                under_way = trio.CapacityLimiter(4)
                while True:
                    if not self._reads:
                        self._wake = trio.Event()
                        await self._wake.wait()
                    await under_way.acquire_on_behalf_of(token := object())
                    nursery.start_soon(self._serve, self._take_reads(), under_way, token)
        finally:
            self._failure = self._failure or CatalogError("the catalogue is closed")
            while self._reads:
                self._settle([self._reads.popleft()], CatalogError("the catalogue is closed"))

    def _take_reads(self) -> list[_Read]:
        """Return reads that fit into one request, or one that is larger."""
        taken = [self._reads.popleft()]
        room = READ_KEYS - len(taken[0].keys)
        while self._reads and len(self._reads[0].keys) <= room:
            taken.append(self._reads.popleft())
            room -= len(taken[-1].keys)
        return taken

    async def _serve(self, reads: list[_Read], under_way: trio.CapacityLimiter, token: object) -> None:
        failure: CatalogError = CatalogError("the catalogue is closed")
        served = False
        try:
            found = await self._read([key for read in reads for key in read.keys])
            position = 0
            for read in reads:
                read.found = found[position : position + len(read.keys)]
                position += len(read.keys)
            served = True
        except CatalogError as error:
            failure = error
        finally:
            self._settle(reads, None if served else failure)
            under_way.release_on_behalf_of(token)

    @staticmethod
    def _settle(reads: Sequence[_Read], error: CatalogError | None) -> None:
        for read in reads:
            read.error = error
            read.done.set()

    async def _read(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Read keys as of one moment: the first part says which, and the others are of that revision."""
        first, *others = _batched(keys, READ_KEYS)
        answer = await self._ask("/v3/kv/txn", {"success": self._ranges(first, 0)})
        parts = [answer, *({} for _ in others)]
        failures: list[CatalogError] = []

        async def read(index: int, some: Sequence[bytes]) -> None:
            try:
                parts[index] = await self._ask(
                    "/v3/kv/txn", {"success": self._ranges(some, revision_of(answer))}
                )
            except CatalogError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index, some in enumerate(others, 1):
                nursery.start_soon(read, index, some)
        if failures:
            raise failures[0]
        return [self._entry(first_kv(response)) for part in parts for response in part["responses"]]

    def _ranges(self, keys: Sequence[bytes], revision: int) -> list[Json]:
        operations = [range_of(self._keys.catalogue + key) for key in keys]
        if revision:
            for operation in operations:
                operation["request_range"]["revision"] = str(revision)
        return operations

    def _entry(self, kv: Json | None) -> Entry | None:
        if kv is None:
            return None
        key = decode(kv["key"])[len(self._keys.catalogue) :]
        return Entry(key, decode(kv.get("value", "")), int(kv["mod_revision"]))

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        check_limit(limit)
        self._check_open()
        if start >= end:
            return []
        question = {
            "key": encode(self._keys.catalogue + start),
            "range_end": encode(self._keys.catalogue + end),
            "limit": str(limit),
        }
        answer = await self._ask("/v3/kv/range", question)
        entries = map(self._entry, answer.get("kvs", ()))
        return [entry for entry in entries if entry is not None]

    async def _ask(self, path: str, question: Json) -> Json:
        try:
            return await self._client.ask(path, question, timeout_s=READ_S)
        except (KeyError, ValueError, TypeError) as error:
            raise CatalogError(f"etcd answered with something else than was asked for: {error!r}") from error

    def _check_open(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    # -- writing -------------------------------------------------------------------------------

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds; return the revision, or None when it did not hold.

        Raise NotMaster once the mandate is over, and CatalogError when etcd does not answer: the outcome is
        unknown then, and this engine takes no more writes. A caller that is cancelled does not know it
        either.
        """
        check_txn(then)
        self._check_open()
        async with self._writing:
            self._check_open()
            # In bounded time: a transaction that is half done would end the chain.
            with trio.CancelScope(shield=True):
                try:
                    revision = await self._carry_out(compare, then)
                except (CatalogError, NotMaster) as error:
                    self._failure = error
                    raise
            return revision

    async def _carry_out(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        token, time_ms = self._runtime.entropy.token(_TOKEN_BYTES), self._runtime.clock.wall_ms()
        question = self._question(compare, then, token, time_ms)
        answer = await self._client.ask("/v3/kv/txn", question, timeout_s=self._txn_s)
        if answer.get("succeeded"):
            if not then:
                return self._revision
            return self._acknowledged(revision_of(answer), time_ms, then)
        master, last = map(first_kv, answer["responses"])
        if last is not None and decode(last["value"])[:_TOKEN_BYTES] == token:
            # An earlier copy of the question has won.
            return self._acknowledged(int(last["mod_revision"]), time_ms, then)
        if master is None or int(master["create_revision"]) != self._mandate:
            raise NotMaster("another controller may be the master: the mandate in etcd is over")
        if (int(last["mod_revision"]) if last else 0) != self._last_txn:
            raise CatalogError("somebody else has written to the catalogue in etcd")
        return None

    def _question(
        self, compare: Sequence[Compare], then: Sequence[Operation], token: bytes, time_ms: int
    ) -> Json:
        keys = self._keys
        conditions = [created_at(keys.master, self._mandate), modified_at(keys.txn, self._last_txn)]
        conditions += [modified_at(keys.catalogue + key, revision) for key, revision in compare]
        operations = [
            {"request_delete_range": {"key": encode(keys.catalogue + key)}}
            if value is None
            else put(keys.catalogue + key, value)
            for key, value in then
        ]
        success = _nested(operations)
        if then:
            # The moment is for people who read the log.
            success = [put(keys.txn, token + msgpack.packb(time_ms)), *success]
        return {
            "compare": conditions,
            "success": success,
            "failure": [range_of(keys.master), range_of(keys.txn)],
        }

    def _acknowledged(self, revision: int, time_ms: int, then: Sequence[Operation]) -> int:
        self._last_txn = self._revision = revision
        if self._watchers:
            self._watchers.deliver(log_entries(revision, time_ms, then))
        return revision

    async def compact(self) -> None:
        """Let etcd forget what keys were long ago, now and then, for ever."""
        while True:
            await trio.sleep(1)
            if self._revision - self._compacted_at < COMPACT_EVERY:
                continue
            self._compacted_at = self._revision
            await self.forget_until(self._revision - self._keep_revisions)

    async def forget_until(self, revision: int) -> None:
        """Let etcd forget what keys were before this revision."""
        if revision <= 0:
            return
        try:
            await self._client.ask("/v3/kv/compaction", {"revision": str(revision)}, timeout_s=READ_S)
        except (EtcdCompacted, EtcdUnavailable, EtcdRefused):
            return  # It was forgotten already, or will be another time.

    # -- the log -------------------------------------------------------------------------------

    def watch(self, start: bytes, end: bytes) -> Watch:
        """Yield the operations on keys in [start, end) that are committed from now on, in order.

        While the mandate lasts, nobody else commits any.
        """
        return self._watchers.add(start, end)

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them.

        Raise CatalogError when etcd has forgotten some of them. A key that was deleted and was not there
        leaves no trace in etcd.
        """
        self._check_open()
        entries: list[LogEntry] = []
        if after_revision >= self._last_txn:
            return entries
        keys = self._keys
        question = {
            "create_request": {
                "key": encode(keys.prefix),
                "range_end": encode(keys.end),
                "start_revision": str(after_revision + 1),
            }
        }

        def take(part: Json) -> bool:
            result = part["result"]
            if result.get("canceled"):
                raise log_trimmed(after_revision, int(result.get("compact_revision", 0)))
            newest = self._take_events(result.get("events", ()), entries)
            return newest < self._last_txn and len(entries) < limit

        with trio.move_on_after(READ_S) as waited:
            await self._client.follow("/v3/watch", question, take)
        if waited.cancelled_caught:
            raise CatalogError("etcd does not tell its history in time")
        return _whole(entries, limit)

    def _take_events(self, events: Sequence[Json], entries: list[LogEntry]) -> int:
        """Append the operations of some events; return the revision of the last transaction among them."""
        times: dict[int, int] = {}
        for event in events:
            kv = event["kv"]
            if decode(kv["key"]) == self._keys.txn:
                times[int(kv["mod_revision"])] = msgpack.unpackb(decode(kv["value"])[_TOKEN_BYTES:])
        for event in events:
            kv = event["kv"]
            key, revision = decode(kv["key"]), int(kv["mod_revision"])
            if key.startswith(self._keys.catalogue):
                value = None if event.get("type") == "DELETE" else decode(kv.get("value", ""))
                name = key[len(self._keys.catalogue) :]
                entries.append(LogEntry(revision, times.get(revision, 0), name, value))
        return max(times, default=0)

    async def close(self) -> None:
        """Take no more questions. Idempotent; etcd goes on."""
        async with self._writing:
            self._failure = self._failure or CatalogError("the catalogue is closed")
            self._watchers.end()


def _whole(entries: list[LogEntry], limit: int) -> list[LogEntry]:
    """Return about `limit` of these entries, and of the last transaction all."""
    if len(entries) <= limit:
        return entries
    last = entries[limit - 1].revision
    return [entry for entry in entries if entry.revision <= last]
