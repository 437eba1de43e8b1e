"""Whom a process lets in: it keeps its list as the master has it, and remembers it over a start without one.

The master tells everybody when the list is another, and everybody asks now and then besides: who was told
nothing finds out. By a file in its data folder a pool, or a controller that has no catalogue yet, is reached
before it has heard from a master; a new catalogue takes it from there when all controllers are lost.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from droppexd.errors import ConfigError, DroppexError, NotAuthorised
from droppexd.folders import read_small_file, replace_file
from droppexd.model import MemberRecord, Role
from droppexd.wire.keys import AllowList
from droppexd.wire.member_messages import MEMBERS_PAGE, ListMembers, MembersListed, TellMembers
from droppexd.wire.messages import Done, Request
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.members")

MEMBERS_FILE = "members.json"
"""Its name in a data folder."""

_FORMAT = 1
_MOST_BYTES = 4 * 1024 * 1024
_EVERY_S = 10.0
_ASK_S = 10.0

Ask = Callable[[ListMembers], Awaitable[MembersListed]]
"""Asks the master, or whoever knows."""

Keep = Callable[[AllowList], Awaitable[None]]
"""Writes the list down."""


class Admission:
    """Keeps the list of one process. Its handlers are for pools and apps."""

    def __init__(self, allowed: AllowList, ask: Ask, keep: Keep | None = None) -> None:
        self._allowed = allowed
        self._ask = ask
        self._keep = keep
        self._told = trio.Event()

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {TellMembers: self.tell_members, ListMembers: self.list_members}

    async def tell_members(self, _call: Call, request: TellMembers, _body: Sequence[Frame]) -> Answer:
        """Hear from the master that the list may be another."""
        if request.version != self._allowed.version:
            self._told.set()
        return Done()

    async def list_members(self, call: Call, request: ListMembers, _body: Sequence[Frame]) -> Answer:
        """Tell a controller what is known here, which may have lost what it knew."""
        if call.peer.role not in (None, Role.CONTROLLER):
            raise NotAuthorised("the controllers tell who may connect")
        return page_of(self._allowed, request)

    async def run(self) -> None:
        """Fetch the list whenever it may be another, for ever."""
        while True:
            await self.refresh()
            with trio.move_on_after(_EVERY_S):
                await self._told.wait()
            self._told = trio.Event()

    async def refresh(self) -> None:
        """Take the list as the master has it; without a master keep what is known."""
        try:
            changed = await fetch(self._allowed, self._ask)
            if changed and self._keep is not None:
                await self._keep(self._allowed)
        except (DroppexError, OSError) as error:
            log.warning("who may connect is not known anew: %s", error)


async def fetch(allowed: AllowList, ask: Ask) -> bool:
    """Take a list page by page; return whether it was another. Raise what asking does."""
    records: list[MemberRecord] = []
    page = await ask(ListMembers(known=allowed.version))
    if page.version == allowed.version:
        return False
    version = page.version
    while True:
        records += page.members
        if not page.more or not page.members:
            break
        page = await ask(ListMembers(after=page.members[-1].public))
    allowed.learn(version, records)
    log.info("members known version=%d members=%d", version, len(records))
    return True


def page_of(allowed: AllowList, request: ListMembers) -> MembersListed:
    """Return a page of a list."""
    if request.known and request.known == allowed.version:
        return MembersListed(version=allowed.version, members=())
    behind = [record for record in allowed.records if record.public > request.after]
    return MembersListed(
        version=allowed.version,
        members=tuple(behind[:MEMBERS_PAGE]),
        more=len(behind) > MEMBERS_PAGE,
    )


def write_members(folder: Path, allowed: AllowList) -> None:
    """Remember a list in a data folder. Blocking. Raise OSError."""
    document = {
        "format": _FORMAT,
        "version": allowed.version,
        "members": [
            {
                "public": record.public.decode(),
                "role": record.role,
                "name": record.name,
                "joined_ms": record.joined_ms,
                "revoked_ms": record.revoked_ms,
            }
            for record in allowed.records
        ],
    }
    replace_file(folder / MEMBERS_FILE, (json.dumps(document, indent=1) + "\n").encode())


def read_members_into(folder: Path, allowed: AllowList) -> None:
    """Take the list that is remembered in a data folder, if any. Blocking.

    What the catalogue says takes its place as soon as that is heard. Raise ConfigError when it is damaged.
    """
    path = folder / MEMBERS_FILE
    try:
        text = read_small_file(path, _MOST_BYTES)
        if text is None:
            return
        document = json.loads(text)
        if document["format"] != _FORMAT:
            raise ValueError("not a format that this release reads")
        records = [
            MemberRecord(
                public=one["public"].encode(),
                role=str(one["role"]),
                name=str(one["name"]),
                joined_ms=int(one["joined_ms"]),
                revoked_ms=int(one["revoked_ms"]),
            )
            for one in document["members"]
        ]
        allowed.learn(int(document["version"]), records)
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError([f"{path} is damaged ({error}): remove it, and it is fetched again"]) from error
