"""One memory budget for all transfers of an app, handed out as credit. Pure but for the waiting line.

A unit is one chunk on its way: its bytes, and what coding adds. A stream may have as many chunks
unanswered as it holds units; each answer tells it how many it holds now. The sum never exceeds the budget.
"""

from collections import deque

import trio

_MOST_ALONE = 8
"""More chunks in flight make one stream no faster: two messages of four chunks each."""

_MOST = 4
"""What a stream holds that is not alone: one whose client pauses, or has vanished, keeps what it holds until
it goes on or is forgotten, and the others must not come to a stop for it."""

_RESERVED = 8
"""One unit in so many, and at least one, is left to streams that have none yet: so they begin, however many
pause."""


class Lease:
    """The units of one stream."""

    def __init__(self, budget: "Budget") -> None:
        self._budget = budget
        self.units = 1

    def adjust(self) -> int:
        """Move towards a fair share, and return how many units the stream holds now.

        A released lease stays at none: a request that was still running must not take units for ever.
        """
        if not self.units:
            return 0
        budget = self._budget
        most = _MOST_ALONE if budget.wanting == 1 else _MOST
        fair = max(1, min(most, budget.total // budget.wanting))
        if self.units > fair:
            self.units -= 1
            budget.give_back(1)
        else:
            while self.units < fair and budget.spare and budget.take():
                self.units += 1
        return self.units

    def release(self) -> None:
        """Give everything back. Idempotent."""
        if self.units:
            self._budget.streams -= 1
            self._budget.give_back(self.units)
            self.units = 0


class Budget:
    """A number of units; streams beyond it wait in order of arrival."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.streams = 0
        self._free = total
        self._waiting: deque[trio.Event] = deque()

    @property
    def wanting(self) -> int:
        """How many streams share the units: those that wait count too, or the others would never yield."""
        return self.streams + len(self._waiting)

    @property
    def spare(self) -> bool:
        """Whether there is more than what is kept for streams that have nothing yet."""
        return self._free > max(1, self.total // _RESERVED)

    async def lease(self) -> Lease:
        """Return a lease of at least one unit; wait until there is one."""
        if not self.take():
            turn = trio.Event()
            self._waiting.append(turn)
            try:
                await turn.wait()
            except trio.Cancelled:
                self._forget(turn)
                raise
        self.streams += 1
        lease = Lease(self)
        lease.adjust()
        return lease

    def take(self) -> bool:
        """Take one unit if one is free and nobody waits for it."""
        if not self._free or self._waiting:
            return False
        self._free -= 1
        return True

    def give_back(self, units: int) -> None:
        """Return units, and hand one to each who waits, in order: nobody who comes later can take it."""
        self._free += units
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().set()

    def _forget(self, turn: trio.Event) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        else:
            self.give_back(1)
