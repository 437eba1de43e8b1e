"""Who answers at an address, how fast, with which release, and what time it is there.

Both sides: what each role says of itself, and asking many at once. An app does that for `droppex doctor`,
`droppexd doctor` for itself.
"""

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import trio

from droppexd import __version__
from droppexd.errors import DroppexError
from droppexd.model import MAX_TROUBLE, Role
from droppexd.runtime import Clock
from droppexd.wire.group_messages import PeerReport
from droppexd.wire.messages import Ping, Pong
from droppexd.wire.rpc import Connections

ASK_S = 3.0
"""For so long a peer may let its connection, and then each answer, wait."""

_QUESTIONS = 3
"""The first answer finds cold caches; the quickest of a few tells most of a clock."""

_AT_ONCE = 64
"""Peers asked at the same time: each takes a socket."""

ANOTHER = "identity"
"""The code of a peer that is not what it is taken for, as that of IdentityError."""


def pong(role: Role, name: str, boot_id: bytes, clock: Clock, term: int = 0) -> Pong:
    """Return what a role says of itself."""
    return Pong(
        role=role.value,
        name=name,
        boot_id=boot_id,
        term=term,
        release=__version__,
        python=platform.python_version(),
        wall_ms=clock.wall_ms(),
    )


class Acquaintance(NamedTuple):
    """A peer as it is known before it was asked."""

    role: Role
    name: str
    address: str


async def examine_peers(
    connections: Connections, clock: Clock, peers: Sequence[Acquaintance]
) -> list[PeerReport]:
    """Ask these peers who they are, all at once; return a report of each, in the same order.

    A peer that is silent has its connection closed: hand in connections on which nothing else waits.
    """
    reports: list[PeerReport | None] = [None] * len(peers)
    turns = trio.CapacityLimiter(_AT_ONCE)

    async def examine(index: int) -> None:
        async with turns:
            reports[index] = await _examine(connections, clock, peers[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(peers)):
            nursery.start_soon(examine, index)
    return [report for report in reports if report is not None]


async def _examine(connections: Connections, clock: Clock, peer: Acquaintance) -> PeerReport:
    unknown = PeerReport(role=peer.role.value, name=peer.name, address=peer.address)
    try:
        await connections.connect(peer.address, timeout_s=ASK_S)
        answers = [await _ask(connections, clock, peer.address) for _ in range(_QUESTIONS)]
    except DroppexError as error:
        return replace(unknown, code=error.code, failure=str(error)[:MAX_TROUBLE])
    answer = min(answers, key=lambda one: one.round_trip_s)
    said = answer.pong
    if said.role != peer.role:
        return replace(
            unknown, code=ANOTHER, failure=f"{peer.address} is the {said.role} {said.name}"[:MAX_TROUBLE]
        )
    return replace(
        unknown,
        name=said.name,
        round_trip_us=round(answer.round_trip_s * 1_000_000),
        ahead_ms=answer.ahead_ms,
        release=said.release,
        python=said.python,
    )


class _Answer(NamedTuple):
    pong: Pong
    round_trip_s: float
    asked_ms: int

    @property
    def ahead_ms(self) -> int | None:
        """How far the clock there is ahead, if it was read halfway between question and answer."""
        if not self.pong.wall_ms:
            return None
        return self.pong.wall_ms - self.asked_ms - round(self.round_trip_s * 500)


async def _ask(connections: Connections, clock: Clock, address: str) -> _Answer:
    asked, asked_ms = clock.now(), clock.wall_ms()
    said, _ = await connections.call(address, Ping(), timeout_s=ASK_S)
    return _Answer(said, clock.now() - asked, asked_ms)
