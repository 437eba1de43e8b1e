"""Invariant 3, and what the catalogue promises of itself: the dead stay dead, and its indexes are true.

A version lists its extents, whatever their layouts become, and each belongs to the version that lists it.
"""

from collections.abc import Sequence

from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.keys import EXTENTS, OUTCOMES, VERSIONS, parse_id
from droppexd.catalog.records import Placed, unpack_outcome, unpack_version
from droppexd.model import MISSING, VersionId
from tests.simulation.simulator import catalogue
from tests.simulation.simulator.world import World

STAYS_DEAD = "deleted-stays-deleted"
DEGRADED = "degraded-index"
COUNTED = "names-are-counted"
LISTED = "extents-are-listed"


class DeadStayDead:
    """Watches every write: a version or extent whose record went never gets one again."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._dead: dict[bytes, int] = {}
        world.on_write.append(self._written)

    def _written(self, revision: int, then: Sequence[Write]) -> None:
        for key, value in then:
            if key.startswith((VERSIONS, EXTENTS)):
                if value is None:
                    self._dead[key] = revision
                elif key in self._dead:
                    what = "version" if key.startswith(VERSIONS) else "extent"
                    self._world.report(
                        STAYS_DEAD,
                        f"{what} {VersionId(*parse_id(key))}, deleted by revision {self._dead[key]}, "
                        f"is back with revision {revision}",
                    )
        self._learn(then)

    def _learn(self, then: Sequence[Write]) -> None:
        for key, value in then:
            if value is None:
                continue
            if key.startswith(VERSIONS):
                version_id = VersionId(*parse_id(key))
                version = unpack_version(version_id, value)
                if not version.names:  # An upload, which grows.
                    continue
                if self._world.made.setdefault(version_id, version.size) != version.size:
                    self._world.report(
                        LISTED,
                        f"version {version_id} had {self._world.made[version_id]} bytes, now {version.size}",
                    )
                self._world.recorded.add(version_id)
            elif key.startswith(OUTCOMES):
                outcome = unpack_outcome(value)
                if isinstance(outcome, Placed):
                    # A version that is replaced by the transaction that brings it has no other record.
                    self._world.recorded.add(outcome.version)


def check_indexes(world: World) -> None:
    """The degraded index has each extent with a missing shard and no other; versions count their names."""
    wanted = {(record.survives, record.id) for record in catalogue.extents(world) if MISSING in record.pools}
    found = catalogue.degraded(world)
    if wanted != found:
        world.report(DEGRADED, f"not in the index: {wanted - found}; wrongly there: {found - wanted}")
    belongs = {one: version.id for version in catalogue.versions(world) for one in version.extents}
    owners = dict(catalogue.owners(world))
    if belongs != owners:
        world.report(LISTED, f"versions list {belongs}; extents belong to {owners}")
    counted: dict[VersionId, int] = {}
    for name in catalogue.names(world).values():
        counted[name.version] = counted.get(name.version, 0) + 1
    uploads = catalogue.uploads(world)
    recorded = {
        version.id: version.names
        for version in catalogue.versions(world)
        if version.names or version.id not in uploads
    }
    if counted != recorded:
        world.report(COUNTED, f"versions with names: {counted}; versions with records: {recorded}")
