"""What the master does about shards of histories that its catalogue does not know: what a person decides."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from droppexd.catalog.catalogue import Catalogue
from droppexd.model import normal_name
from droppexd.roles.controller_repair import Repair
from droppexd.wire.messages import Adopt, Adopted, DropOrphans, OrphansDropped, Request
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

Body = Sequence[Frame]


class OrphanRulings:
    """The handlers. The catalogue checks, in the transaction itself, that nothing live is touched."""

    def __init__(self, catalogue: Catalogue, repair: Repair, check_term: Callable[[], None]) -> None:
        self._catalogue = catalogue
        self._repair = repair
        self._check_term = check_term

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {Adopt: self.adopt, DropOrphans: self.drop}

    async def adopt(self, _call: Call, request: Adopt, _body: Body) -> Answer:
        """Enter a version that an app has read whole."""
        self._check_term()
        receipt = await self._catalogue.adopt(
            request.operation, normal_name(request.name), request.version, request.extents
        )
        log.warning("version adopted version=%s name=%r size=%d", receipt.version, receipt.name, receipt.size)
        self._repair.look_afresh()
        return Adopted(receipt=receipt)

    async def drop(self, _call: Call, request: DropOrphans, _body: Body) -> Answer:
        """Call dead what no record names."""
        self._check_term()
        refused = await self._catalogue.drop_orphans(request.extents)
        dropped = len(request.extents) - len(refused)
        log.warning("orphans dropped extents=%d refused=%d", dropped, len(refused))
        return OrphansDropped(dropped=dropped, refused=tuple(refused))
