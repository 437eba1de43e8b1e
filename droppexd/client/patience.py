"""How long a client goes on when its app is away for a moment: it is restarted, or busy.

Here is only when to try again, and for how long. What may be asked a second time without harm, the callers
know.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from droppexd.errors import DroppexError, KeyRefused, NotAuthorised, PeerBusy, PeerError, SessionClosed
from droppexd.runtime import Runtime

T = TypeVar("T")

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0

OnWait = Callable[[DroppexError, float], None]
"""Is told what failed, and for how many seconds it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """For how long something is tried that gets nowhere; 0: once."""

    total_s: float = 0.0
    on_wait: OnWait | None = None


NONE = Patience()


def passes(error: DroppexError) -> bool:
    """Whether an error may be over in a moment: of an app that is away, or that lost its session."""
    if isinstance(error, NotAuthorised | KeyRefused):
        return False
    return isinstance(error, PeerError | SessionClosed)


def leaves_open(error: DroppexError) -> bool:
    """Whether a change that ended so may have been made all the same."""
    return passes(error) and not isinstance(error, PeerBusy)


class Trying:
    """One piece of work that is tried until it is done, or has got nowhere for too long."""

    def __init__(self, patience: Patience, runtime: Runtime) -> None:
        self._patience = patience
        self._runtime = runtime
        self._told = False
        self.went_on()

    def went_on(self) -> None:
        """Start the time anew: something was achieved."""
        self._since = self._runtime.clock.now()
        self._pause_s = _FIRST_PAUSE_S

    async def pause(self, error: DroppexError, *, anyway: bool = False) -> None:
        """Wait before the next attempt; raise `error` when there is to be none.

        With `anyway` there is another as long as there is time, whatever the error is.
        """
        left_s = self._since + self._patience.total_s - self._runtime.clock.now()
        pause_s = self._runtime.entropy.uniform(0.5, 1.0) * self._pause_s
        if not (anyway or passes(error)) or left_s < pause_s:
            raise error
        if self._patience.on_wait is not None and not self._told:
            self._patience.on_wait(error, left_s)
        self._told = True
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await trio.sleep(pause_s)

    async def until_done(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns, which may be made any number of times."""
        while True:
            try:
                return await attempt()
            except DroppexError as error:
                await self.pause(error)
