"""The change that gives a part of a version another layout: a new extent in the place of an old one."""

from collections.abc import Sequence
from dataclasses import dataclass

from droppexd.catalog.batch import Batch
from droppexd.catalog.changes import RememberedChange, check_new_id, checked_extent
from droppexd.catalog.keys import extent_key, garbage_key, outcome_key, version_key
from droppexd.catalog.records import Decided, unpack_version
from droppexd.catalog.state import Session
from droppexd.errors import Conflict, InvalidRequest
from droppexd.model import MISSING, Extent, ExtentId, OperationId, VersionId


@dataclass(frozen=True, slots=True)
class SwapExtent(RememberedChange):
    """Let a version name a newly coded extent where it names another with the same content.

    It is a compare-and-set of the version's list of extents: the one at `place` must be `old` still. The old
    extent becomes garbage, as those of a removed version do.
    """

    operation: OperationId
    version: VersionId
    place: int
    old: ExtentId
    new: Extent

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [
            outcome_key(self.operation),
            version_key(self.version),
            extent_key(self.old),
            *self._keys_of_new(),
        ]

    def _keys_of_new(self) -> Sequence[bytes]:
        return extent_key(self.new.id), garbage_key(self.new.id)

    async def decide(self, batch: Batch, session: Session) -> VersionId:
        """Check that nothing changed and nothing is lost by it, then write version and extents."""
        new = self.new
        check_new_id(new.id, self.operation, session)
        for key in self._keys_of_new():
            if await batch.get(key) is not None:
                raise InvalidRequest(f"extent {new.id} was used before")
        value = await batch.get(version_key(self.version))
        if value is None:
            raise Conflict(f"version {self.version} was removed meanwhile")
        version = unpack_version(self.version, value)
        if not self.place < len(version.extents) or version.extents[self.place] != self.old:
            raise Conflict(f"version {self.version} has another extent than {self.old} there by now")
        old = (await batch.extent(self.old)).extent
        if (new.size, new.chunk_size) != (old.size, old.chunk_size):
            raise InvalidRequest(f"extent {new.id} is not cut as {old.id} is, whose place it shall take")
        new = checked_extent(new, batch.state)
        if MISSING in new.pools:
            raise Conflict(f"extent {new.id} lacks shards: it would be no better than {old.id}")
        batch.swap_extent(version, self.place, old, new)
        return self.version

    def answer(self, outcome: Decided) -> VersionId:
        """Return the version."""
        if outcome != self.version or not isinstance(outcome, VersionId):
            raise self.wrong_repeat()
        return outcome
