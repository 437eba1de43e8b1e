"""The messages of controllers: who is the master, who joins, how each of them is, and what apps do for them.

Their kinds are numbered from 120.
"""

from typing import Annotated

from droppexd.model import (
    Address,
    ControllerAddresses,
    ControllerInfo,
    FileName,
    Label,
    Role,
    Token16,
    Trouble,
)
from droppexd.schema import Bounds, record
from droppexd.wire.messages import BootId, Done, Reply, Request, message

_CONTROLLER = (Role.CONTROLLER,)
_CLIENT = (Role.CLIENT, Role.APP)
_ASKERS = (Role.APP, Role.CONTROLLER)

MAX_ENDPOINTS = 16

Endpoints = Annotated[tuple[Address, ...], Bounds(0, MAX_ENDPOINTS)]


@message(121)
class Joined(Reply):
    """The controller is known to the catalogue, and stands by."""

    cluster_id: Token16
    incarnation: Token16
    term: int
    controllers: ControllerAddresses
    pools: int


@message(120, reply=Joined, callers=_CONTROLLER)
class JoinController(Request[Joined]):
    """A controller says to the master who and where it is; `cluster_id` is empty when it knows none."""

    name: Label
    address: Address
    boot_id: Token16
    cluster_id: BootId


@message(123)
class ControllerState(Reply):
    """A controller as it is. `cluster_id` is empty when it does not know it yet."""

    info: ControllerInfo
    boot_id: Token16
    cluster_id: BootId


@message(122, reply=ControllerState, callers=_ASKERS)
class DescribeController(Request[ControllerState]):
    """Ask a controller, master or not, how it is."""


@message(125)
class ControllersListed(Reply):
    """All controllers that are known, and how they are. `master` is empty when none is reached."""

    master: Annotated[str, Bounds(0, 256)]
    controllers: Annotated[tuple[ControllerInfo, ...], Bounds(0, 128)]


@message(124, reply=ControllersListed, callers=_CLIENT)
class ListControllers(Request[ControllersListed]):
    """Ask which controllers there are. Asked of an app, which asks each of them."""


@record
class PeerReport:
    """What came of asking a peer who it is: an answer, or a `failure` with the `code` of its error."""

    role: Label
    """What it is taken for."""
    name: Label
    """What it says, or is known as; empty when neither is known."""
    address: Address
    code: Label = ""
    failure: Trouble = ""
    round_trip_us: int = 0
    """Of the quickest of a few questions, on a connection that was made already."""
    ahead_ms: Annotated[int, Bounds(-(2**53), 2**53)] | None = None
    """Its clock less the asker's, give or take half the round trip; None when it does not say."""
    release: Label = ""
    """Empty: it is older than this question."""
    python: Label = ""


@message(145)
class PeersExamined(Reply):
    """What an app finds when it asks all whom it knows of, itself among them."""

    peers: Annotated[tuple[PeerReport, ...], Bounds(0, 4096)]


@message(144, reply=PeersExamined, callers=_CLIENT)
class ExaminePeers(Request[PeersExamined]):
    """Have an app ask the controllers, apps and pools that it knows of who they are."""


@message(143)
class AllAdopted(Reply):
    """How far the adoption of all orphans is. `left` cannot be read with what is there, and stay orphans."""

    adopted: Annotated[int, Bounds(0, 2**48)]
    left: Annotated[int, Bounds(0, 2**48)]
    done: bool


@message(142, reply=AllAdopted, callers=_CONTROLLER)
class AdoptAll(Request[AllAdopted]):
    """Have an app read every version that the catalogue does not know, and give it a name in `folder`.

    It is answered after some seconds, done or not: ask again, for an app that is not asked gives up. An app
    refuses while a pool cannot be asked.
    """

    folder: FileName


@message(129)
class GroupDescribed(Reply):
    """What a controller must know to take part.

    `cluster_id` is empty when the one asked does not know it yet. `endpoints` are where the engine is, and
    `prefix` is what its keys begin with; both are empty where each controller has an engine of its own.
    """

    cluster_id: BootId
    engine: Label
    endpoints: Endpoints
    prefix: Label
    master: Annotated[str, Bounds(0, 256)]


@message(128, reply=GroupDescribed, callers=_CONTROLLER)
class DescribeGroup(Request[GroupDescribed]):
    """A controller that is to join asks another, master or not, what it must know."""


@message(126, reply=Done, callers=_CONTROLLER)
class TellMaster(Request[Done]):
    """The master says who it is, and which controllers there are. Pools, apps and standbys take note.

    The term that the message carries is the master's.
    """

    cluster_id: Token16
    address: Address
    controllers: ControllerAddresses


@message(127, reply=Done, callers=_CLIENT)
class RemoveController(Request[Done]):
    """Forget a controller that is gone for good. It must not answer any more.

    With `force` an operator vouches that it never comes back, though there are too few others without it.
    """

    name: Label
    force: bool = False
