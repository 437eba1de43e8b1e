"""Blocking work that is usually briefer than handing it to a thread: done at once while that holds.

From the page cache a small read takes 15 us, and a small commit where flushes cost nothing 60 us; the way
to a thread and back takes 100 to 200 us of processor time. On a disk that has to be waited for, threads
are right. So it is measured, call by call: how long it took, and whether the thread had to wait at all. The
second tells a slow disk from a busy processor: on a machine that others use as well, a MiB for the page
cache takes longer than a millisecond again and again, and threads then cost what is short already.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from droppexd.runtime import Runtime

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

BRIEF_S = 0.001
"""A call that waits and takes longer than this holds the event loop up for too long;"""
STRIKES = 3
"""so many of them in a row are the disk's doing and no accident,"""
SLOW_S = 1.0
"""and for so long the calls go through threads again."""


class BriefWork:
    """Runs one sort of blocking work: inline while it is brief, else through `run_blocking`."""

    def __init__(self, runtime: Runtime) -> None:
        self._clock = runtime.clock
        self._run_blocking = runtime.run_blocking
        self._waits = runtime.waits
        self._strikes = 0
        self._slow_until = 0.0

    @property
    def brief(self) -> bool:
        """Whether the work may be done at once by `now`."""
        return self._clock.now() >= self._slow_until

    def now(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do the work at once, and take note of how long it took."""
        # To count costs as much as a small read: begun only when the call before was slow.
        waits = self._waits() if self._strikes else -1
        began = self._clock.now()
        try:
            return function(*args)
        finally:
            ended = self._clock.now()
            slow = ended - began > BRIEF_S and (waits < 0 or self._waits() != waits)
            self._strikes = self._strikes + 1 if slow else 0
            if self._strikes == STRIKES:
                self._strikes = STRIKES - 1  # One more is enough to go back to threads.
                self._slow_until = ended + SLOW_S

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do the work at once or in a thread. Inline it lets no other task run: callers wait elsewhere."""
        if self.brief:
            return self.now(function, *args)
        return await self._run_blocking(function, *args)
