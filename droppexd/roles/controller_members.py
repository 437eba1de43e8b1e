"""Who is a member: what the master does about join tokens, new members and revoked ones.

Only what is in the catalogue counts. The process's own list, by which its listener lets others in, is made
from it after each change, and everybody is told that there is another.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio

from droppexd.catalog.catalogue import Catalogue, read_all
from droppexd.catalog.enrolment import AddFounders, AddToken, Enrol, ForgetTokens, Revoke, used_up
from droppexd.catalog.group import Group, Ranges
from droppexd.catalog.keys import MEMBERS, MEMBERS_VERSION, TOKENS
from droppexd.catalog.records import unpack_fields, unpack_member, unpack_token
from droppexd.errors import CatalogFull, ConfigError, DroppexError, InvalidRequest, NotAuthorised
from droppexd.model import MAX_CONTROLLERS, MEMBER_ROLES, SERVER_ROLES, MemberRecord, Role, TokenRecord
from droppexd.runtime import Clock
from droppexd.wire.keys import Member, TransportKeys, check_member
from droppexd.wire.member_messages import (
    Enroll,
    Enrolled,
    MakeToken,
    MembersRevoked,
    RevokeMember,
    TellMembers,
    TokenMade,
)
from droppexd.wire.messages import Request
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

Body = Sequence[Frame]
Change = AddToken | ForgetTokens | Enrol | AddFounders | Revoke

_LOOK_S = 2.0
_MOST_APPS = 64


class MemberDesk:
    """The handlers of a master, and its list."""

    def __init__(
        self,
        catalogue: Catalogue,
        keys: TransportKeys | None,
        clock: Clock,
        check_term: Callable[[], None],
        controllers: Callable[[], Sequence[str]],
        tell: Callable[[Request[Any]], Awaitable[object]],
    ) -> None:
        self._catalogue = catalogue
        self._keys = keys
        self._clock = clock
        self._check_term = check_term
        self._controllers = controllers
        self._tell = tell
        self._changing = trio.Lock()
        """Held while one change is judged and written."""
        self._news = trio.Event()

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {MakeToken: self.make_token, Enroll: self.enroll, RevokeMember: self.revoke}

    async def begin(self) -> None:
        """Enter the founders, and let in whom the catalogue names."""
        keys = self._keys
        if keys is None:
            return
        now_ms = self._clock.wall_ms()
        founders = [
            MemberRecord(public=public, role=member.role.value, name=member.name, joined_ms=now_ms)
            for public, member in sorted(keys.allowed.founders.items())
            if public not in self._catalogue.members
        ]
        if founders:
            await self._change(AddFounders(founders))
        self._let_in(keys)

    async def run(self) -> None:
        """Tell everybody of changes, and forget tokens that nobody can use any more, for ever."""
        while True:
            news = self._news
            await self._tell(TellMembers(version=self._catalogue.members_version))
            while not news.is_set():
                with trio.move_on_after(_LOOK_S):
                    await news.wait()
                now_ms = self._clock.wall_ms()
                if used_up(tuple(self._catalogue.tokens.values()), now_ms):
                    with suppress(CatalogFull):  # They are of no use, and go at the next look.
                        await self._change(ForgetTokens(now_ms))

    async def _change(self, change: Change) -> Any:
        before = self._catalogue.members_version
        async with self._changing:
            changed = await self._catalogue.change_members(change)
        if self._keys is not None:
            self._let_in(self._keys)
        if self._catalogue.members_version != before:
            self._news.set()
            self._news = trio.Event()
        return changed

    def _let_in(self, keys: TransportKeys) -> None:
        catalogue = self._catalogue
        records = sorted(catalogue.members.values(), key=lambda record: record.public)
        keys.allowed.learn(catalogue.members_version, records, catalogue.tokens.values())

    def _need_keys(self) -> TransportKeys:
        if self._keys is None:
            raise InvalidRequest("this cluster has no keys, and lets everybody in on this machine alone")
        return self._keys

    # -- handlers ------------------------------------------------------------------------------

    async def make_token(self, _call: Call, request: MakeToken, _body: Body) -> Answer:
        """Enter a join token."""
        self._check_term()
        self._need_keys()
        unknown = set(request.roles) - set(MEMBER_ROLES)
        if unknown or len(set(request.roles)) < len(request.roles):
            raise InvalidRequest(f"a token is for some of {', '.join(MEMBER_ROLES)}, each once")
        token = TokenRecord(
            public=request.public,
            roles=request.roles,
            expires_ms=self._clock.wall_ms() + request.ttl_ms,
            uses=request.uses,
        )
        await self._change(AddToken(token))
        log.warning("join token made roles=%s uses=%d", ",".join(request.roles), request.uses)
        controllers = tuple(self._controllers())[:MAX_CONTROLLERS]
        return TokenMade(expires_ms=token.expires_ms, controllers=controllers)

    async def enroll(self, call: Call, request: Enroll, _body: Body) -> Answer:
        """Make the keys of one machine members."""
        self._check_term()
        keys = self._need_keys()
        if call.peer.role is not Role.JOINER:
            raise NotAuthorised("only who has a join token can join")
        roles = [key.role for key in request.keys]
        if len(set(roles)) < len(roles) or not set(roles) <= set(MEMBER_ROLES):
            raise InvalidRequest(f"one key for each role, and a role is one of {', '.join(MEMBER_ROLES)}")
        try:
            check_member(Member(Role(roles[0]), request.name))
        except ConfigError as error:
            raise InvalidRequest(str(error)) from error
        members = [MemberRecord(public=key.public, role=key.role, name=request.name) for key in request.keys]
        await self._change(Enrol(call.peer.name.encode(), members, self._clock.wall_ms()))
        log.warning("member joined name=%s roles=%s", request.name, ",".join(roles))
        serves = bool(set(roles) & set(SERVER_ROLES))
        sessions = self._catalogue.sessions.values()
        apps = sorted({session.address for session in sessions if not session.closed})
        return Enrolled(
            cluster_id=self._catalogue.cluster_id,
            controllers=tuple(self._controllers())[:MAX_CONTROLLERS],
            apps=tuple(apps[:_MOST_APPS]),
            cluster_secret=(keys.cluster_secret or b"") if serves else b"",
        )

    async def revoke(self, _call: Call, request: RevokeMember, _body: Body) -> Answer:
        """Take a member off the list."""
        self._check_term()
        keys = self._need_keys()
        own = self._catalogue.members.get(keys.own.public)
        meant = [
            member
            for member in self._catalogue.members.values()
            if member.name == request.name and request.role in ("", member.role) and not member.revoked_ms
        ]
        if own in meant and {member.role for member in meant} == {Role.CONTROLLER.value}:
            raise InvalidRequest(
                f"{request.name} is the master itself: make another controller the master first"
            )
        found: list[MemberRecord] = await self._change(
            Revoke(request.role, request.name, self._clock.wall_ms())
        )
        for member in found:
            log.warning("member revoked name=%s role=%s", member.name, member.role)
        return MembersRevoked(members=tuple(found))


async def follow_members(group: Group, keys: TransportKeys | None, is_master: Callable[[], bool]) -> None:
    """While this is a standby, let in whom its own view of the catalogue names, for ever."""
    if keys is None:
        return
    seen = -1
    while True:
        stale = None if is_master() else group.stale()
        if stale is not None and group.revision != seen:
            seen = group.revision
            try:
                await _learn(stale, keys)
            except DroppexError as error:
                log.info("who may connect is not known anew: %s", error)
        await trio.sleep(_LOOK_S)


async def _learn(source: Ranges, keys: TransportKeys) -> None:
    (version,) = await read_all(source, MEMBERS_VERSION) or (None,)
    records = [
        unpack_member(entry.key[len(MEMBERS) :], entry.value) for entry in await read_all(source, MEMBERS)
    ]
    tokens = [unpack_token(entry.key[len(TOKENS) :], entry.value) for entry in await read_all(source, TOKENS)]
    number = unpack_fields(version.value, "members")[0] if version is not None else 0
    if number or not keys.allowed.version:  # Else this is a copy that has only just begun.
        keys.allowed.learn(number, records, tokens)
