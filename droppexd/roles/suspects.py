"""Pools that did not do what was asked of them a moment ago: known to one app before the master notices."""

from droppexd.runtime import Clock

SUSPECT_S = 5.0
"""How long: until then the master has noticed, or it was a passing matter."""


class Suspects:
    """Suspected pools, each for SUSPECT_S. Shared by all transfers of an app."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[int, float] = {}

    def add(self, pool: int) -> None:
        """Suspect a pool from now on for a while."""
        self._until[pool] = self._clock.now() + SUSPECT_S

    def __contains__(self, pool: int) -> bool:
        until = self._until.get(pool)
        if until is None:
            return False
        if self._clock.now() < until:
            return True
        del self._until[pool]
        return False
