"""Let the power go at every moment of a recording, and judge what is left each time."""

import bisect
import random
from functools import cache

from droppexd.errors import DroppexError
from powerloss.catalogues import open_catalogue_folder
from powerloss.disk import AllDropped, AllKept, Flush, Mixed
from powerloss.pools import Scratch, open_pool
from powerloss.recording import LAID
from powerloss.verdict import CataloguePromises, PoolPromises, wrong_with_catalogue, wrong_with_pool

POOL = "pool-1"
CONTROLLER = "controller"

_PROMISES = frozenset(("WritePiece", "revision", "Announce"))
"""The notes that each say more than those before; answers of a controller follow a revision at once."""


class Opened:
    """What was found in each folder that was rebuilt: the same folder is not opened twice."""

    def __init__(self, history):
        self.history = history
        self._pool_scratch, self._controller_scratch = Scratch(), Scratch()
        self._pools, self._catalogues = {}, {}

    @property
    def counts(self):
        """How many different folders of pools and of controllers were opened."""
        return len(self._pools), len(self._catalogues)

    def pool(self, image):
        digest = image.digest()
        if digest not in self._pools:
            self._pools[digest] = open_pool(self._pool_scratch.fill(image))
        return self._pools[digest]

    def catalogue(self, image):
        digest = image.digest()
        if digest not in self._catalogues:
            folder = self._controller_scratch.fill(image)
            self._catalogues[digest] = open_catalogue_folder(folder, self.history)
        return self._catalogues[digest]

    def close(self):
        self._pool_scratch.close()
        self._controller_scratch.close()


class Crashes:
    """The crashes of one recording."""

    def __init__(self, recording, opened):
        self._disk = recording.disk()
        self._opened = opened
        self._pool_promises = PoolPromises(recording.notes, POOL)
        self._catalogue_promises = CataloguePromises(recording.notes, opened.history)
        self._shards_on = cache(opened.history.shards_on)

    def image(self, moment, luck):
        """Return what a crash at this moment leaves of both folders."""
        return self._disk.after_crash(moment, luck)

    def failures_of_second(self, recording, first_moment, every):
        """Yield what is lost when the power goes again while all that a first crash left is opened."""
        disk = recording.disk()
        for moment in (one for one in moments(recording, every) if one > LAID):
            lucks = AllDropped(), AllKept(), Mixed(random.Random(moment))
            for luck in lucks:
                image = disk.after_crash(moment, luck)
                pool = self._opened.pool(image.below(POOL))
                wrong = wrong_with_pool(pool, self._pool_promises, first_moment, started_since=True)
                catalogue = self._opened.catalogue(image.below(CONTROLLER))
                wrong = wrong or wrong_with_catalogue(catalogue, self._catalogue_promises, first_moment)
                if wrong:
                    yield f"{first_moment}, then {moment}: {type(luck).__name__}: {wrong}"

    def failures(self, moments, mixtures, seed):
        """Yield what is lost by a crash at each of these moments, in words.

        Each time with everything unflushed dropped, with everything kept, and with so many mixtures.
        """
        for moment in moments:
            lucks = {"all dropped": AllDropped(), "all kept": AllKept()}
            for number in range(mixtures):
                mixture = f"{seed} {moment} {number}"
                lucks[f"mixture {mixture!r}"] = Mixed(random.Random(mixture))
            pools, catalogues = {}, {}
            for name, luck in lucks.items():
                image = self._disk.after_crash(moment, luck)
                pools[name] = self._opened.pool(image.below(POOL))
                catalogues[name] = self._opened.catalogue(image.below(CONTROLLER))
            yield from (f"{moment}, {what}" for what in self._judge(moment, pools, catalogues))

    def _judge(self, moment, pools, catalogues):
        for name, pool in pools.items():
            if wrong := wrong_with_pool(pool, self._pool_promises, moment):
                yield f"{name}: {POOL}: {wrong}"
        for name, catalogue in catalogues.items():
            if wrong := wrong_with_catalogue(catalogue, self._catalogue_promises, moment):
                yield f"{name}: {CONTROLLER}: {wrong}"
                continue
            placed = self._shards_on(self._pool_promises.number, catalogue.revision)
            for pool_name, pool in pools.items():
                if not isinstance(pool, DroppexError) and not placed <= pool.shards.keys():
                    yield (
                        f"{name} at the controller, {pool_name} at the pool: recorded there and not there: "
                        f"{sorted(placed - pool.shards.keys())}"
                    )


def moments(recording, every):
    """Return moments at which a crash may leave something new.

    All those at which a flush ended, or something was promised; the last at which what a flush makes safe was
    still open; and `every`th of the others, at which one more call had begun.
    """
    began = sorted(operation.began for operation in recording.operations)
    flushed = [operation.ended for operation in recording.operations if isinstance(operation, Flush)]
    open_still = [began[bisect.bisect_left(began, ended) - 1] for ended in flushed]
    promised = [note.moment for note in recording.notes if note.kind in _PROMISES]
    return sorted({*flushed, *open_still, *promised, *began[::every]})
