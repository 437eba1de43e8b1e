"""The changes about who is a member: tokens made, used and forgotten, keys let in and revoked.

A member is known by its public key. Each change of the members makes another version of their list, by which
those who let others in find out that theirs is old.

Changes are judged by what is in memory, which a commit changes: the caller waits for one before it begins the
next. Nothing is written before all is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from droppexd.catalog.batch import Batch
from droppexd.catalog.keys import MEMBERS_VERSION, member_key, token_key
from droppexd.catalog.records import pack_fields, pack_member, pack_token
from droppexd.errors import Conflict, NotAuthorised, NotFound
from droppexd.model import MemberRecord, TokenRecord

MAX_MEMBERS = 4096
MAX_TOKENS = 256

USED_TOKEN_MS = 60_000
"""For so long who joined may ask again for the answer that was lost; nobody else can use the token."""


@dataclass(frozen=True, slots=True)
class AddToken:
    """Enter a join token."""

    token: TokenRecord

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Write it. Raise Conflict when there are too many."""
        token, tokens = self.token, batch.state.tokens
        if len(tokens) >= MAX_TOKENS and token.public not in tokens:
            raise Conflict(f"there are {len(tokens)} join tokens that have not expired; wait, or make fewer")
        _put_token(batch, token)


@dataclass(frozen=True, slots=True)
class ForgetTokens:
    """Delete the tokens that nobody can use any more."""

    now_ms: int

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Delete them."""
        tokens = batch.state.tokens
        for public in used_up(tuple(tokens.values()), self.now_ms):
            batch.delete(token_key(public))
            batch.after_commit(partial(tokens.__delitem__, public))


def used_up(tokens: Sequence[TokenRecord], now_ms: int) -> list[bytes]:
    """Return the public keys of tokens that nobody can use any more."""
    return [token.public for token in tokens if not _usable(token, now_ms)]


def _usable(token: TokenRecord, now_ms: int) -> bool:
    return now_ms < (token.expires_ms if token.uses else token.used_ms + USED_TOKEN_MS)


@dataclass(frozen=True, slots=True)
class Enrol:
    """Make the keys of one machine members, on the strength of a token. May be repeated."""

    token: bytes
    members: Sequence[MemberRecord]
    now_ms: int

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Write them, and that the token was used.

        Raise NotAuthorised when it is used up, has expired or is for other roles, and Conflict when another
        member has the name.
        """
        token = batch.state.tokens.get(self.token)
        if token is None or not _usable(token, self.now_ms):
            raise NotAuthorised(
                "this join token has expired, or was used: make another with `droppexd join-token`"
            )
        if all(self._is_known(batch, member) for member in self.members):
            return
        if not token.uses:
            raise NotAuthorised("this join token was used: make another with `droppexd join-token`")
        others = sorted({member.role for member in self.members} - set(token.roles))
        if others:
            raise NotAuthorised(
                f"this join token is for {' and '.join(token.roles)}, and not for {' and '.join(others)}"
            )
        _check_new(batch, self.members)
        for member in self.members:
            _check_name(batch, member)
        for member in self.members:
            _put_member(batch, replace(member, token=self.token, joined_ms=self.now_ms, revoked_ms=0))
        _put_token(batch, replace(token, uses=token.uses - 1, used_ms=self.now_ms))

    def _is_known(self, batch: Batch, member: MemberRecord) -> bool:
        known = batch.state.members.get(member.public)
        said = (self.token, member.role, member.name, 0)
        return known is not None and (known.token, known.role, known.name, known.revoked_ms) == said


@dataclass(frozen=True, slots=True)
class AddFounders:
    """Enter the keys of a members file, but for those that are known: a revoked one stays out."""

    members: Sequence[MemberRecord]

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Write those that are new. Raise Conflict when there are too many members."""
        new = [member for member in self.members if member.public not in batch.state.members]
        _check_new(batch, new)
        for member in new:
            _put_member(batch, member)


@dataclass(frozen=True, slots=True)
class Revoke:
    """Take a member off the list, for ever: its key is never let in again."""

    role: str
    name: str
    now_ms: int

    def reads(self) -> list[bytes]:
        """Return nothing: all is in memory."""
        return []

    async def judge(self, batch: Batch) -> list[MemberRecord]:
        """Write that; return whose keys they were. Raise NotFound."""
        found = [
            member
            for member in batch.state.members.values()
            if member.name == self.name and self.role in ("", member.role) and not member.revoked_ms
        ]
        if not found:
            what = self.role or "member"
            raise NotFound(f"there is no {what} {self.name!r}: `droppex members` lists them")
        if len({member.role for member in found}) > 1:
            roles = " and ".join(sorted(member.role for member in found))
            raise Conflict(f"{self.name!r} is the name of several members, {roles}: say which with --role")
        revoked = [replace(member, revoked_ms=max(1, self.now_ms)) for member in found]
        for member in revoked:
            _put_member(batch, member)
        return revoked


def _check_new(batch: Batch, members: Sequence[MemberRecord]) -> None:
    """Raise Conflict when one of the keys is on record, or there would be too many."""
    known = batch.state.members
    if len(known) + len(members) > MAX_MEMBERS:
        raise Conflict(f"there are {len(known)} members on record, and at most {MAX_MEMBERS} may be")
    publics = [member.public for member in members]
    if len(set(publics)) < len(publics) or not known.keys().isdisjoint(publics):
        raise Conflict("one of the keys is on record already, as another member's or as a revoked one")


def _check_name(batch: Batch, member: MemberRecord) -> None:
    """Raise Conflict when another member has its role and name."""
    for other in batch.state.members.values():
        if (other.role, other.name, other.revoked_ms) == (member.role, member.name, 0):
            raise Conflict(
                f"the name {member.name!r} is that of another {member.role}: choose another --name, or if it "
                f"is gone for good, `droppex members revoke {member.name} --role {member.role}` first"
            )


def _put_member(batch: Batch, member: MemberRecord) -> None:
    state = batch.state
    batch.put(member_key(member.public), pack_member(member))
    version = state.members_version + 1
    batch.put(MEMBERS_VERSION, pack_fields((version,)))

    def remember() -> None:
        state.members[member.public] = member
        state.members_version = max(version, state.members_version)

    batch.after_commit(remember)


def _put_token(batch: Batch, token: TokenRecord) -> None:
    tokens = batch.state.tokens
    batch.put(token_key(token.public), pack_token(token))
    batch.after_commit(lambda: tokens.__setitem__(token.public, token))
