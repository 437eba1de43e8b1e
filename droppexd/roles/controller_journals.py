"""Which pools keep the journal of the catalogue: a few, on other machines, and the same for long."""

from collections.abc import Mapping, Sequence

from droppexd.model import DISK_FULL, PoolInfo, PoolState

MOST_JOURNALS = 3
"""Each has a whole copy, so that one that is lost need not be waited for while another is made."""


class JournalPools:
    """The choice of one master."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self._chosen: list[int] = []

    def choose(self, pools: Sequence[PoolInfo]) -> Mapping[str, str]:
        """Return the names and addresses of the pools that keep the journal now.

        A pool stays chosen while it takes shards. Those that are full come last: they have some room for the
        journal, and without it nothing could be deleted in a cluster that is full. There are none on the
        master's own machine: what takes its disk may take theirs.
        """
        usable = {
            pool.number: pool
            for pool in pools
            if (pool.state == PoolState.UP or pool.trouble == DISK_FULL)
            and pool.machine != self._machine
            and pool.address
        }
        chosen = [number for number in self._chosen if number in usable and not usable[number].trouble]
        machines = {usable[number].machine for number in chosen}
        for number, pool in sorted(usable.items(), key=self._preference):
            if len(chosen) < MOST_JOURNALS and pool.machine not in machines:
                chosen.append(number)
                machines.add(pool.machine)
        self._chosen = chosen
        return {usable[number].name: usable[number].address for number in chosen}

    def _preference(self, pool: tuple[int, PoolInfo]) -> tuple[bool, bool, int]:
        number, info = pool
        return bool(info.trouble), number not in self._chosen, number

    def most(self, pools: Sequence[PoolInfo]) -> int:
        """Return how many would keep it if all pools were up."""
        return min(MOST_JOURNALS, len({pool.machine for pool in pools} - {self._machine}))
