"""A put that breaks off is made again from the beginning of its source, where that can be read again."""

from collections.abc import Awaitable, Callable
from typing import BinaryIO

from blake3 import blake3

from droppexd.client.patience import Trying, leaves_open
from droppexd.client.upload import Progress
from droppexd.errors import ClusterFull, Conflict, DroppexError, NotEnoughShards, NotFound
from droppexd.model import Receipt
from droppexd.runtime import RunBlocking
from droppexd.wire.messages import Described

_HASH_STEP = 1024 * 1024

_MOST_BREAKS = 10
"""Of attempts that got somewhere: an app that fails at the same chunk every time is not being restarted."""

Attempt = Callable[[Progress | None], Awaitable[Receipt]]
"""Puts the source once, from where it stands."""

OnAgain = Callable[[], None]
"""Is told that a put begins anew: what was sent before counts for nothing."""


def layout_text(described: Described) -> str:
    """Return the layouts of a file's extents; most files have one, and empty ones none."""
    return ", ".join(dict.fromkeys(str(extent.layout) for extent in described.extents))


class Put:
    """One file on its way in, through as many attempts as it takes."""

    def __init__(
        self,
        source: BinaryIO,
        *,
        attempt: Attempt,
        describe: Callable[[], Awaitable[Described]],
        run_blocking: RunBlocking,
        progress: Progress | None,
        on_again: OnAgain | None,
    ) -> None:
        self._source = source
        self._attempt = attempt
        self._describe = describe
        self._run_blocking = run_blocking
        self._progress = progress
        self._on_again = on_again
        self._open = False
        """Whether an attempt may have been committed, and only its answer was lost."""
        self._lacked = False

    async def run(self, trying: Trying) -> Receipt:
        """Store the file and return its receipt."""
        begin = self._source.tell() if self._source.seekable() else None

        got_somewhere = False
        breaks = 0

        def through(size: int) -> None:
            nonlocal got_somewhere
            got_somewhere = True
            trying.went_on()
            if self._progress is not None:
                self._progress(size)

        while True:
            got_somewhere = False
            try:
                return await self._attempt(through)
            except Conflict:
                receipt = await self._stored_before(begin)
                if receipt is None:
                    raise
                return receipt
            except DroppexError as error:
                breaks += got_somewhere
                if begin is None or breaks == _MOST_BREAKS:
                    raise
                self._open = self._open or leaves_open(error)
                await trying.pause(error, anyway=self._may_pass(error))
            receipt = await self._stored_before(begin)
            if receipt is not None:
                return receipt
            if self._on_again is not None:
                self._on_again()
            await self._run_blocking(self._source.seek, begin)

    def _may_pass(self, error: DroppexError) -> bool:
        """Take a lack of pools for something that passes, once: the app has to notice which are gone."""
        lacks = isinstance(error, NotEnoughShards) and not isinstance(error, ClusterFull)
        first, self._lacked = lacks and not self._lacked, self._lacked or lacks
        return first

    async def _stored_before(self, begin: int | None) -> Receipt | None:
        """Return the receipt of an earlier attempt if that was committed after all."""
        if not self._open or begin is None:
            return None
        try:
            described = await self._describe()
        except NotFound:
            return None
        digest, size = await self._run_blocking(self._digest, begin)
        return _receipt_of(described) if (described.blake3, described.size) == (digest, size) else None

    def _digest(self, begin: int) -> tuple[bytes, int]:
        hasher, size = blake3(), 0
        self._source.seek(begin)
        while block := self._source.read(_HASH_STEP):
            hasher.update(block)
            size += len(block)
        return hasher.digest(), size


def _receipt_of(described: Described) -> Receipt:
    return Receipt(
        name=described.name,
        version=described.version,
        size=described.size,
        blake3=described.blake3,
        layout=layout_text(described),
        survives_pools=described.survives_pools,
        survives_machines=described.survives_machines,
        note="stored by an earlier attempt, whose answer was lost",
    )
