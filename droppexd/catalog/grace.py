"""When garbage may be dropped: after a grace of the master's own observation, in bounded memory.

Each dead extent is stamped with an *epoch*: a number that the master counts up every so often. Only for
the few epochs that are younger than the grace does it remember when their last garbage was committed. Epochs
of earlier masters count from the moment this one began.
"""

from collections import deque

_STEPS = 16
_EPOCHS_PER_TERM_BITS = 32


class Grace:
    """The epochs of one master. All times are of its own monotonic clock, in seconds.

    Transactions that make garbage come one at a time: `begin`, flush, `end`.
    """

    def __init__(self, term: int, grace_s: float, now: float) -> None:
        self._grace_s = grace_s
        self._step_s = grace_s / _STEPS
        self._epoch = term << _EPOCHS_PER_TERM_BITS
        self._began = now
        self._last = now
        self._closed: deque[tuple[int, float]] = deque([(self._epoch - 1, now)])
        self._ripe = -1
        self._flushing = False

    def begin(self, now: float) -> int:
        """Return the epoch for the garbage of a transaction that is about to be flushed."""
        self._roll(now)
        self._flushing = True
        return self._epoch

    def end(self, now: float) -> None:
        """Note that the garbage of that transaction was committed just now: its grace begins."""
        self._last = now
        self._flushing = False

    def ripe(self, now: float) -> int:
        """Return the newest epoch whose garbage may be dropped; all before it may be as well."""
        if not self._flushing:
            self._roll(now)
        closed = self._closed
        while closed and closed[0][1] + self._grace_s <= now:
            self._ripe = closed.popleft()[0]
        return self._ripe

    def _roll(self, now: float) -> None:
        if now - self._began >= self._step_s:
            self._closed.append((self._epoch, self._last))
            self._epoch += 1
            self._began = self._last = now
