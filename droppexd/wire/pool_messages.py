"""The messages about pools that work: to empty one, to take it out, and that there is work for it.

Their kinds are numbered from 160.
"""

from typing import Annotated

from droppexd.model import Label, PoolNumber, Role
from droppexd.schema import Bounds
from droppexd.wire.messages import Done, Reply, Request, message

_CLIENT = (Role.CLIENT, Role.APP)
_CONTROLLER = (Role.CONTROLLER,)


@message(161)
class PoolDrained(Reply):
    """How far a pool is emptied: `shards` are still recorded there.

    `stuck` of them have nowhere to go now.
    """

    number: PoolNumber
    name: Label
    membership: Label
    shards: int
    stuck: int = 0


@message(160, reply=PoolDrained, callers=_CLIENT)
class DrainPool(Request[PoolDrained]):
    """Move everything off a pool, named or numbered, and put nothing there.

    With `ask` nothing is changed, and only told how far it is. With `undo` it is a member like the others
    again. Without `force` refused when the others are too few for what is on it.
    """

    pool: Label
    undo: bool = False
    force: bool = False
    ask: bool = False


@message(163)
class PoolRemoved(Reply):
    """The pool is removed for good."""

    number: PoolNumber
    name: Label


@message(162, reply=PoolRemoved, callers=_CLIENT)
class RemovePool(Request[PoolRemoved]):
    """Remove a pool for good that was emptied. Refused while anything is recorded there."""

    pool: Annotated[str, Bounds(1, 128)]


@message(164, reply=Done, callers=_CONTROLLER)
class WorkWaits(Request[Done]):
    """The master has orders for this pool, which need not wait until a heartbeat's answer says so."""
