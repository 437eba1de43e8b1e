"""The messages that give files another layout. Their kinds are numbered from 170."""

from droppexd.model import Extent, ExtentId, FileName, Label, Layout, OperationId, Role, VersionId
from droppexd.wire.messages import Done, Reply, Request, message

_CLIENT = (Role.CLIENT, Role.APP)
_APP = (Role.APP,)


@message(171)
class RelayoutTold(Reply):
    """How far a file is.

    Of its `size` bytes `coded` have the layout by now, or keep theirs: `kept` of them because that survives
    more losses. `changed` bytes were coded anew since this was first asked for; they took `before` bytes on
    disks and take `after`.
    """

    layout: Label
    size: int
    coded: int
    kept: int
    changed: int
    before: int
    after: int
    finished: bool


@message(170, reply=RelayoutTold, callers=_CLIENT)
class Relayout(Request[RelayoutTold]):
    """Give a file another layout: without one, that of new files of its size.

    It is answered after some seconds, finished or not: ask again, for an app that is not asked gives up.
    Extents whose layout survives more losses than that of new files keep theirs unless `layout` is given.
    """

    name: FileName
    layout: Layout | None = None


@message(172, reply=Done, callers=_APP)
class SwapExtent(Request[Done]):
    """Let a version name the extent `new` at `place` of its list, where it names `old` now.

    Refused with Conflict when it names another there.
    """

    operation: OperationId
    version: VersionId
    place: int
    old: ExtentId
    new: Extent
