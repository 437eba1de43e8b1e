"""The messages of controllers that each have a copy of the catalogue: its log, whole copies, and promotions.

Their kinds are numbered from 130.
"""

from typing import Annotated

from droppexd.model import MAX_CONTROLLERS, Address, Label, Role, Token16
from droppexd.schema import Bounds
from droppexd.wire.messages import BootId, Reply, Request, message

_CONTROLLER = (Role.CONTROLLER,)
_CLIENT = (Role.CLIENT, Role.APP)
_COPIERS = (Role.CONTROLLER, Role.POOL)

LOG_FRAME_BYTES = 4 * 1024 * 1024
LOG_FRAMES = 24
"""A transaction of the log may be larger than a frame: what is sent is cut into so many."""
_LOG_BYTES = LOG_FRAMES * LOG_FRAME_BYTES

Key = Annotated[bytes, Bounds(0, 2049)]
"""Of the catalogue, or behind the longest."""


@message(131)
class LogPosition(Reply):
    """How far a controller's copy of the catalogue goes, and whom it listens to.

    The last transaction of its log is `revision`, in the term `term`. `promised` is the highest term that it
    has heard of; it takes nothing from a master of a lower one.
    """

    name: Label
    promised: int
    promised_to: Label
    """The name of the controller that has that term."""
    promised_at: Annotated[str, Bounds(0, 256)]
    term: int
    revision: int
    done: bool
    """Whether it did what it was asked to."""
    busy: bool = False
    """A whole copy is on its way there."""


@message(130, reply=LogPosition, callers=_CONTROLLER, body_frames=LOG_FRAMES, body_bytes=_LOG_BYTES)
class AppendLog(Request[LogPosition]):
    """The master of a term sends what follows `after`, a revision of the term `after_term`; often nothing.

    It is written down, flushed, where just that is the last revision; `done` says so.
    """

    cluster_id: Token16
    term: int
    name: Label
    address: Address
    after: int
    after_term: int
    newest: int
    """The last revision that the master has."""


@message(132, reply=LogPosition, callers=_CONTROLLER)
class CopyAnew(Request[LogPosition]):
    """The master of a term has what a controller's log does not lead to: it is to copy everything.

    What its log has behind the revision `common` nobody else has.
    """

    cluster_id: Token16
    term: int
    name: Label
    address: Address
    common: int


@message(133, body_frames=LOG_FRAMES, body_bytes=_LOG_BYTES)
class LogPage(Reply):
    """Rows of the log, packed, in the body. `term` and `revision` are where it ends by now.

    `diverged` when the revision that was named is of another term here, or forgotten; behind `common` the two
    logs may differ.
    """

    term: int
    revision: int
    diverged: bool = False
    common: int = 0
    cluster_id: BootId = b""


@message(134, reply=LogPage, callers=_COPIERS)
class ReadLog(Request[LogPage]):
    """Ask for what follows a revision of a term; a term of 0 stands for any."""

    cluster_id: BootId
    after: int
    after_term: int


@message(135, body_frames=LOG_FRAMES, body_bytes=_LOG_BYTES)
class EntriesPage(Reply):
    """Entries of the catalogue, packed, in the body, as of `revision` or later.

    `last` when there are none behind them. `term` is the last that has begun there.
    """

    term: int
    revision: int
    last: bool


@message(136, reply=EntriesPage, callers=_COPIERS)
class ReadEntries(Request[EntriesPage]):
    """Ask for the entries from a key on."""

    cluster_id: BootId
    start: Key


@message(138, reply=LogPosition, callers=_CONTROLLER)
class AskVote(Request[LogPosition]):
    """A controller wants to begin a term, and asks that nothing be taken from a master of a lower one.

    `term` and `revision` say how far its log goes. With `adopt` it takes over the longest log that it hears
    of; without, it is the last master, and is refused by whoever knows of a later one, or has promised a
    later term to another: but for those that are `excused`, who have promised the wanted term, and so never
    begin theirs. `trial` asks only what the answer would be.
    """

    cluster_id: BootId
    wanted: int
    name: Label
    address: Address
    term: int
    revision: int
    adopt: bool
    trial: bool
    excused: Annotated[tuple[Label, ...], Bounds(0, MAX_CONTROLLERS)] = ()


@message(141)
class Promoted(Reply):
    """The controller is the master of a term, or would be.

    `lost` says, for people, a line each, what may be lost by it.
    """

    term: int
    revision: int
    reached: int
    needed: int
    lost: Annotated[tuple[Annotated[str, Bounds(0, 1024)], ...], Bounds(0, 64)] = ()


@message(140, reply=Promoted, callers=_CLIENT)
class Promote(Request[Promoted]):
    """An operator wants the controller at this address to become the master.

    An app passes it on. Without enough other controllers it is refused, unless `accept_loss`. `trial` asks
    only what would be.
    """

    address: Address
    accept_loss: bool
    trial: bool
