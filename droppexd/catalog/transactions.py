"""What the engines share: a waiting transaction, and the check of what they are asked."""

from collections.abc import Sequence

import trio

from droppexd.catalog.engine import MAX_KEY_BYTES, MAX_RANGE, MAX_VALUE_BYTES, Compare, LogEntry, Operation
from droppexd.errors import CatalogError, LocalProtocolError


class WaitingTxn:
    """A transaction on its way to the disk. Its task waits for `done`, then reads `result`."""

    __slots__ = ("compare", "done", "error", "revision", "then")

    def __init__(self, compare: Sequence[Compare], then: Sequence[Operation]) -> None:
        self.compare = compare
        self.then = then
        self.done = trio.Event()
        self.revision: int | None = None
        self.error: CatalogError | None = None

    def succeed(self, revision: int | None) -> None:
        """Wake the task with a revision, or None when the compares did not hold."""
        self.revision = revision
        self.done.set()

    def fail(self, error: CatalogError) -> None:
        """Wake the task with an error like this one."""
        self.error = error
        self.done.set()

    def result(self) -> int | None:
        """Return the outcome, or raise CatalogError with a traceback of the task that asks."""
        if self.error is not None:
            raise type(self.error)(str(self.error))
        return self.revision


def check_txn(then: Sequence[Operation]) -> None:
    """Raise LocalProtocolError when a transaction breaks the bounds of the interface."""
    for key, value in then:
        if len(key) > MAX_KEY_BYTES:
            raise LocalProtocolError(
                f"a catalogue key of {len(key)} bytes; at most {MAX_KEY_BYTES} are allowed"
            )
        if value is not None and len(value) > MAX_VALUE_BYTES:
            raise LocalProtocolError(
                f"a catalogue value of {len(value)} bytes; at most {MAX_VALUE_BYTES} are allowed"
            )


def check_limit(limit: int) -> None:
    """Raise LocalProtocolError when a range is asked for without a sane bound."""
    if not 1 <= limit <= MAX_RANGE:
        raise LocalProtocolError(f"a range of {limit} entries; 1 to {MAX_RANGE} are allowed")


def log_entries(revision: int, time_ms: int, then: Sequence[Operation]) -> list[LogEntry]:
    """Return the log's entries for one transaction."""
    return [LogEntry(revision, time_ms, key, value) for key, value in then]


def log_trimmed(after_revision: int, oldest: int) -> CatalogError:
    """Return the error for a reader of the log that comes too late."""
    return CatalogError(
        f"the catalogue's log begins at revision {oldest} and was asked for what follows "
        f"{after_revision}; take a whole copy of the catalogue instead"
    )
