"""The messages about members: who may connect, in which role.

Their kinds are numbered from 150.
"""

from typing import Annotated, NamedTuple

from droppexd.model import (
    MAX_MEMBER_ROLES,
    Address,
    ControllerAddresses,
    Label,
    MemberRecord,
    PublicKey,
    Role,
    Token16,
)
from droppexd.schema import Bounds
from droppexd.wire.messages import Done, Reply, Request, message

_CONTROLLER = (Role.CONTROLLER,)
_CLIENT = (Role.CLIENT, Role.APP)
_SERVERS = (Role.CONTROLLER, Role.APP, Role.POOL)

MEMBERS_PAGE = 512
MAX_TOKEN_USES = 1000
MAX_TOKEN_MS = 30 * 86_400_000
"""Of how long a join token may be good."""


@message(151)
class TokenMade(Reply):
    """The token can be used until then, at these controllers."""

    expires_ms: int
    controllers: ControllerAddresses


@message(150, reply=TokenMade, callers=_CONTROLLER)
class MakeToken(Request[TokenMade]):
    """Let machines join with the token that has this public key: so many, in these roles, for so long."""

    public: PublicKey
    roles: Annotated[tuple[Label, ...], Bounds(1, MAX_MEMBER_ROLES)]
    uses: Annotated[int, Bounds(1, MAX_TOKEN_USES)]
    ttl_ms: Annotated[int, Bounds(1, MAX_TOKEN_MS)]


@message(153)
class Enrolled(Reply):
    """The keys are members'. `cluster_secret` is for those that others connect to; empty for a client."""

    cluster_id: Token16
    controllers: ControllerAddresses
    apps: Annotated[tuple[Address, ...], Bounds(0, 64)]
    cluster_secret: Annotated[bytes, Bounds(0, 40)]


class NewKey(NamedTuple):
    """A public key, and the role that its owner wants to have."""

    role: Label
    public: PublicKey


@message(152, reply=Enrolled, callers=(Role.JOINER,))
class Enroll(Request[Enrolled]):
    """Who has a join token asks for its keys, one for each of its roles, to be made members'."""

    name: Label
    keys: Annotated[tuple[NewKey, ...], Bounds(1, MAX_MEMBER_ROLES)]


@message(155)
class MembersListed(Reply):
    """The members, the revoked among them, in the order of their keys; ask again behind the last if `more`.

    Nothing is listed when `version` is the one that was known.
    """

    version: int
    members: Annotated[tuple[MemberRecord, ...], Bounds(0, MEMBERS_PAGE)]
    more: bool = False


@message(154, reply=MembersListed, callers=(*_SERVERS, Role.CLIENT))
class ListMembers(Request[MembersListed]):
    """Ask who the members are. Any controller answers, master or not; pools tell a controller."""

    known: int = 0
    after: Annotated[bytes, Bounds(0, 40)] = b""


@message(157)
class MembersRevoked(Reply):
    """These are members no more."""

    members: Annotated[tuple[MemberRecord, ...], Bounds(0, MEMBERS_PAGE)]


@message(156, reply=MembersRevoked, callers=_CLIENT)
class RevokeMember(Request[MembersRevoked]):
    """Never let this member in again. `role` may be empty while the name is that of one role alone."""

    name: Label
    role: Label = ""


@message(158, reply=Done, callers=_CONTROLLER)
class TellMembers(Request[Done]):
    """The master says that the members are others now: this is the version of their list."""

    version: int
