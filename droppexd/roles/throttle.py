"""A limit on background work that counts only while clients are served."""

from collections.abc import Callable

import trio

from droppexd.runtime import Clock

BUSY_S = 1.0
"""A client that asked for something within this time is being served."""


class Throttle:
    """Slows its callers down, all together, to so many bytes a second while clients are served.

    `served` counts the requests of clients; how far it rises does not matter, only that it does.
    """

    def __init__(self, clock: Clock, bytes_per_s: int, served: Callable[[], int]) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._served = served
        self._seen = served()
        self._busy_until = 0.0
        self._due = 0.0

    @property
    def busy(self) -> bool:
        """Whether clients are being served."""
        now = self._clock.now()
        served = self._served()
        if served != self._seen:
            self._seen = served
            self._busy_until = now + BUSY_S
        return now < self._busy_until

    async def wait(self, size: int) -> None:
        """Return when `size` more bytes may be worked on."""
        now = self._clock.now()
        if not self.busy:
            self._due = now
            return
        self._due = max(self._due, now) + size / self._bytes_per_s
        await trio.sleep(self._due - now)
