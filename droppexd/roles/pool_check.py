"""Whether a shard is whole: read from its first piece to its last, each against checksum and identity.

`check_shard` is all that knows what sound means; scrubs, `CheckShards` and the check of a stopped pool's
folder differ only in which shards they ask about, and whom they tell.
"""

import enum
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import trio

from droppexd.coding import piece_checksum
from droppexd.errors import IntegrityError, NoSuchShard, PeerBusy, StoreError
from droppexd.model import MISSING, ExtentId, VersionId
from droppexd.roles.master import MasterLink
from droppexd.runtime import Runtime
from droppexd.store.interface import Examined, ShardStore, StoredShard
from droppexd.wire.messages import (
    PAGE_LIMIT,
    CheckShards,
    LostShard,
    ReportLost,
    ShardCheck,
    ShardName,
    ShardsChecked,
)
from droppexd.wire.rpc import Answer, Call
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.pool")

_MASTER_S = 10.0
_CHECKS_AT_ONCE = 2
"""Shards that are read for `CheckShards` at the same time, whoever asks: clients need the disk too."""


class ShardState(enum.StrEnum):
    """What reading a shard from end to end found."""

    SOUND = "sound"
    ABSENT = "absent"
    """The pool holds no such shard."""
    DAMAGED = "damaged"
    """Its header, or some piece, is not what was stored, or cannot be read any more."""
    UNREADABLE = "unreadable"
    """The store could not tell: it is closed, or of a later release, or out of descriptors."""


LOST = frozenset((ShardState.ABSENT, ShardState.DAMAGED))
"""What the master must hear of: the shard does not count any more."""


class CheckedShard(NamedTuple):
    """A shard that was read whole, and what was found."""

    extent: ExtentId
    shard: int
    state: ShardState
    size: int = 0
    """Bytes of its pieces, as its header has it; 0 when there is no header to be read."""
    chunks: tuple[int, ...] = ()
    """Those whose piece is damaged; none when it is the header that is."""
    reason: str = ""
    """Why it is not sound, in one line."""
    name: str = ""
    version: VersionId | None = None
    """Hints of the header, for people."""


def check_shard(store: Examined, extent: ExtentId, shard: int) -> CheckedShard:
    """Read a shard whole and verify every piece. Blocking; keeps one piece in memory.

    A shard that is not sound is read a second time before it is called so: a disk may fail once, and the
    shard may have been replaced meanwhile.
    """
    checked = _check_once(store, extent, shard)
    if checked.state == ShardState.SOUND:
        return checked
    again = _check_once(store, extent, shard)
    if again.state == ShardState.SOUND:
        log.warning(
            "a shard was read at the second try: shard=%d extent=%s %s", shard, extent, checked.reason
        )
    return again


def _check_once(store: Examined, extent: ExtentId, shard: int) -> CheckedShard:
    try:
        stored = store.examine(extent, shard)
    except NoSuchShard as error:
        return CheckedShard(extent, shard, ShardState.ABSENT, reason=str(error))
    except IntegrityError as error:
        return CheckedShard(extent, shard, ShardState.DAMAGED, reason=str(error))
    except StoreError as error:
        return CheckedShard(extent, shard, ShardState.UNREADABLE, reason=str(error))
    header = stored.header
    reasons = {chunk: _fault_of_piece(stored, chunk) for chunk in range(len(header.checksums))}
    chunks = tuple(chunk for chunk, reason in reasons.items() if reason)
    return CheckedShard(
        extent,
        shard,
        ShardState.DAMAGED if chunks else ShardState.SOUND,
        size=header.stored_size,
        chunks=chunks,
        reason=reasons[chunks[0]] if chunks else "",
        name=header.name,
        version=header.version,
    )


def _fault_of_piece(stored: StoredShard, chunk: int) -> str:
    """Return what is wrong with a piece; nothing when it is whole."""
    header = stored.header
    try:
        piece, checksum = stored.read(chunk)
    except (IntegrityError, NoSuchShard) as error:
        return str(error)
    if len(piece) != header.piece_range(chunk)[1]:
        return f"piece {chunk} has {len(piece)} bytes, and should have {header.piece_range(chunk)[1]}"
    if piece_checksum(header.extent, header.layout, header.index, chunk, piece) != checksum:
        return f"piece {chunk} does not have its checksum"
    return ""


class LossReports:
    """Tells the master of shards that are lost. Raises what the master says, or that none answers."""

    def __init__(self, store: ShardStore, master: MasterLink) -> None:
        self._master = master
        self._boot_id = store.identity.boot_id
        self._on_damaged: Callable[[ExtentId], None] = lambda _: None
        self.number = MISSING
        """This pool's number, once it was announced."""

    def when_damaged(self, action: Callable[[ExtentId], None]) -> None:
        """Have this called for each extent whose damaged shard the master was told of."""
        self._on_damaged = action

    async def tell(self, checks: Iterable[CheckedShard]) -> None:
        """Tell of those shards among `checks` that are absent or damaged."""
        lost = [
            LostShard(check.extent, check.shard, check.state == ShardState.DAMAGED)
            for check in checks
            if check.state in LOST
        ]
        if lost and self.number == MISSING:
            raise PeerBusy("the pool is not known to the master yet; try again")
        for start in range(0, len(lost), PAGE_LIMIT):
            page = tuple(lost[start : start + PAGE_LIMIT])
            request = ReportLost(number=self.number, boot_id=self._boot_id, shards=page)
            await self._master.call(request, timeout_s=_MASTER_S)
            for shard in page:
                if shard.damaged:
                    self._on_damaged(shard.extent)


class ShardChecker:
    """Answers `CheckShards`."""

    def __init__(self, store: ShardStore, runtime: Runtime, reports: LossReports) -> None:
        self._store = store
        self._run_blocking = runtime.run_blocking
        self._reports = reports
        self._room = trio.CapacityLimiter(_CHECKS_AT_ONCE)

    async def check_shards(self, _call: Call, request: CheckShards, _body: Sequence[Frame]) -> Answer:
        """Read shards whole; the master knows of what is lost before the caller does."""
        checks: list[CheckedShard] = []
        for name in request.shards:
            async with self._room:  # Shard by shard, so that one long list keeps no short one waiting.
                check = await self._run_blocking(check_shard, self._store, name.extent, name.shard)
            checks.append(check)
            if check.state in LOST:
                log.warning(
                    "shard %d of extent %s is %s: %s", check.shard, check.extent, check.state, check.reason
                )
                # At once: while the others are read it may be rebuilt, and must not be called lost then.
                await self._reports.tell([check])
        return ShardsChecked(checks=tuple(map(_told, checks)))


def _told(check: CheckedShard) -> ShardCheck:
    return ShardCheck(ShardName(check.extent, check.shard), check.state.value, check.size)
