"""What was promised by a moment, and whether a folder after a crash keeps it."""

import bisect

from droppexd.errors import DroppexError
from powerloss.pools import Shard


def wrong_with_pool(pool, promises, moment, *, started_since=False):
    """Return what a pool's folder lacks of what was promised by then; empty when nothing.

    With `started_since` there may have been a start that nobody was told of.
    """
    if isinstance(pool, DroppexError):
        return f"the store refuses the folder: {pool}"
    if pool.broken:
        return f"not whole: {pool.broken}"
    lost = [key for key, shard in promises.shards(moment).items() if pool.shards.get(key) != shard]
    if lost:
        return f"acknowledged and not there as it was: {lost}"
    strangers = [
        key
        for key, shard in pool.shards.items()
        if promises.checksums.get(key, shard.checksums) != shard.checksums
    ]
    if strangers:
        return f"other bytes than were sent: {strangers}"
    if promises.pool_id(moment) not in ("", pool.pool_id):
        return f"another pool: {pool.pool_id}"
    if promises.cluster_id(moment) not in ("", pool.cluster_id):
        return f"of cluster {pool.cluster_id!r}, and it had joined"
    known, under_way = promises.boots(moment)
    if known and not started_since and pool.boot_id_before not in (known, under_way):
        return f"start {pool.boot_id_before!r} is not the latest"
    return ""


def wrong_with_catalogue(catalogue, promises, moment):
    """Return what a catalogue lacks of what was promised by then; empty when nothing."""
    if isinstance(catalogue, DroppexError):
        return f"the catalogue is refused: {catalogue}"
    if catalogue.wrong:
        return catalogue.wrong
    if catalogue.revision < promises.revision(moment):
        return f"revision {promises.revision(moment)} was acknowledged, and {catalogue.revision} is the last"
    return ""


class _Steps:
    """A value that changes at moments."""

    def __init__(self, first):
        self._moments = []
        self._values = [first]

    def add(self, moment, value):
        assert not self._moments or moment >= self._moments[-1]
        self._moments.append(moment)
        self._values.append(value)

    def at(self, moment):
        return self._values[bisect.bisect_right(self._moments, moment)]

    def around(self, moment):
        """Return the value then, and the one that comes next."""
        number = bisect.bisect_right(self._moments, moment)
        return self._values[number], self._values[min(number + 1, len(self._moments))]

    @property
    def last(self):
        return self._values[-1]


class PoolPromises:
    """What one pool has promised, from the notes of its own process and of the controller."""

    def __init__(self, notes, name):
        self.checksums = {}
        """Those of every shard that ever was sent to this pool whole, by (extent, index)."""
        self.number = 0
        self._shards = _Steps({})
        self._pool_id, self._cluster_id, self._boots = _Steps(""), _Steps(""), _Steps("")
        pieces = {}
        joining = ""
        for note in sorted(notes, key=lambda note: note.moment):
            fields = note.fields
            if note.kind == "WritePiece" and note.process == name:
                key = fields["extent"], fields["index"]
                pieces.setdefault(key, {})[fields["chunk"]] = fields["checksum"]
                if fields["generation"]:
                    self._acknowledge(note.moment, key, fields["generation"], pieces.pop(key))
            elif note.kind == "Announce" and fields["name"] == name:
                self.number = fields["number"]
                joining = fields["cluster_id"]
                self._pool_id.add(note.moment, fields["pool_id"])
                self._boots.add(note.moment, fields["boot_id"])
            elif note.kind == "Heartbeat" and fields["number"] == self.number:
                self._cluster_id.add(note.moment, joining)  # It has joined before it sends one.
            elif note.kind == "Review" and fields["pool"] == self.number and fields["drop"]:
                self._release(note.moment, fields["drop"])

    def _acknowledge(self, moment, key, generation, pieces):
        checksums = tuple(pieces[chunk] for chunk in range(len(pieces)))
        self.checksums[key] = checksums
        self._shards.add(moment, {**self._shards.last, key: Shard(generation, checksums)})

    def _release(self, moment, drop):
        """From here on the pool may drop these instances."""
        gone = {((extent, index), generation) for extent, index, generation in drop}
        left = {key: held for key, held in self._shards.last.items() if (key, held.generation) not in gone}
        self._shards.add(moment, left)

    def shards(self, moment):
        return self._shards.at(moment)

    def pool_id(self, moment):
        return self._pool_id.at(moment)

    def cluster_id(self, moment):
        return self._cluster_id.at(moment)

    def boots(self, moment):
        """Return the start that was known last, and the one that may be under way."""
        return self._boots.around(moment)


class CataloguePromises:
    """What a controller has promised, from the notes of its process and the history of its catalogue."""

    def __init__(self, notes, history):
        self._revisions = _Steps(0)
        for note in sorted(notes, key=lambda note: note.moment):
            if note.process == "controller":
                promised = _revision(note, history)
                self._revisions.add(note.moment, max(promised, self._revisions.last))

    def revision(self, moment):
        """Return the revision that a crash at this moment must not undo."""
        return self._revisions.at(moment)


def _revision(note, history):
    fields = note.fields
    match note.kind:
        case "revision":
            return fields["revision"]
        case "Commit":
            return history.named(fields["name"], fields["version"])
        case "Remove":
            return history.removed(fields["name"], fields["version"])
        case "Rename":
            return max(
                history.named(fields["name"], fields["version"]),
                history.removed(fields["source"], fields["version"]),
            )
        case _:
            return 0
