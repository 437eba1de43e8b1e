"""What a role is handed instead of reaching for it: clock, entropy and blocking work.

With these three (and a transport and a store) handed in, a whole cluster runs in one process under
trio's mock clock, and one seed gives one trace.
"""

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


class Clock(Protocol):
    """Time, twice: one that decides, and one for people."""

    def now(self) -> float:
        """Return seconds since an unspecified moment; never goes back. Decides every expiry."""
        ...

    def wall_ms(self) -> int:
        """Return milliseconds since 1970, for people. It decides nothing but when a join token expires."""
        ...


class Entropy(Protocol):
    """Randomness: from the system in production, from a seed in the simulation."""

    def token(self, size_bytes: int) -> bytes:
        """Return that many unpredictable bytes."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """Return a number between the two, to spread out timers and retries."""
        ...


class RunBlocking(Protocol):
    """Run a function that may block where it does not stop the event loop."""

    def __call__(self, function: Callable[[*Ts], T], *args: *Ts) -> Awaitable[T]:
        """Return what `function(*args)` returns: from a worker thread, or inline in the simulation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The three things together, as each role gets them."""

    clock: Clock
    entropy: Entropy
    run_blocking: RunBlocking
    waits: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)
    """How often this thread had to wait so far, as the system counts it. Where nothing counts it, every call
    is taken to have waited."""
