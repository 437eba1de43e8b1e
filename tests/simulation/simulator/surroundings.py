"""What a simulated process stands on: its clock, its randomness, its blocking work, and a seeded trio."""

import random
from collections.abc import Awaitable, Callable
from contextlib import contextmanager

import trio
import trio.testing

from droppexd.runtime import Runtime

START_MS = 1_700_000_000_000


class ProcessClock:
    """The mock clock as one process sees it, and a wall clock that may be wrong."""

    def __init__(self) -> None:
        self.wall_offset_ms = 0
        self._spent_s = 0.0

    def now(self) -> float:
        return trio.current_time() + self._spent_s

    def wall_ms(self) -> int:
        return START_MS + self.wall_offset_ms + int(trio.current_time() * 1000)

    def spend(self, seconds: float) -> None:
        """Let this process think that time passed: the mock clock cannot move within a call."""
        self._spent_s += seconds


class SeededEntropy:
    """Randomness that depends on a seed alone."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def token(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class BlockingWork:
    """Blocking work of one process: done inline, after the time that its disk takes in a thread.

    Like a real thread it cannot be cancelled once it has begun. `on_access` is for a disk whose work is
    done at once, on the event loop's thread: the process notices that it took long.
    """

    def __init__(self, clock: ProcessClock) -> None:
        self._clock = clock
        self.latency_s = 0.0
        self._in_thread = False

    def on_access(self) -> None:
        if not self._in_thread and self.latency_s:
            self._clock.spend(self.latency_s)

    async def __call__(self, function, *args):
        await trio.lowlevel.checkpoint()
        if self.latency_s:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.latency_s)
        self._in_thread = True
        try:
            return function(*args)
        finally:
            self._in_thread = False


def runtime_of(seed: int | str) -> tuple[Runtime, ProcessClock, BlockingWork]:
    """Return a runtime whose randomness depends on the seed alone, and its parts."""
    clock = ProcessClock()
    work = BlockingWork(clock)
    return Runtime(clock=clock, entropy=SeededEntropy(seed), run_blocking=work), clock, work


@contextmanager
def seeded_scheduling(seed: int):
    """Have trio shuffle the tasks that are ready at the same moment by this seed."""
    run_module = trio._core._run
    before = run_module._ALLOW_DETERMINISTIC_SCHEDULING, run_module._r.getstate()
    run_module._ALLOW_DETERMINISTIC_SCHEDULING = True
    run_module._r.seed(seed)
    try:
        yield
    finally:
        run_module._ALLOW_DETERMINISTIC_SCHEDULING = before[0]
        run_module._r.setstate(before[1])


def run_mocked(main: Callable[[], Awaitable[None]], *, seed: int) -> None:
    """Run `main` on a mock clock that jumps whenever everybody waits."""
    with seeded_scheduling(seed):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
