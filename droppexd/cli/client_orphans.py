"""`droppex orphans`: versions that pools hold and the catalogue never knew."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from droppexd.cli.client_batch import Batch, run_batch
from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, UsageError, printable
from droppexd.cli.render import (
    Items,
    Output,
    count_text,
    orphan_document,
    orphan_line,
    receipt_document,
    size_text,
)
from droppexd.client.orphans import (
    OrphanListing,
    OrphanState,
    OrphanVersion,
    is_readable,
    sound_shards,
)
from droppexd.errors import Conflict, InvalidRequest, NotEnoughShards, NotFound
from droppexd.model import ExtentId, VersionId
from droppexd.wire.messages import PAGE_LIMIT, OrphanExtent

_VERSION = re.compile("([0-9a-f]{1,12})-([0-9a-f]{1,12})", re.ASCII)
"""Session and counter, each below 2^48."""

_ADOPTABLE = (OrphanState.WHOLE, OrphanState.OPEN)


@dataclass(slots=True)
class Choice:
    """Which versions a command is about; none named: all."""

    versions: frozenset[VersionId]
    seen: set[VersionId] = field(default_factory=set)

    @property
    def everything(self) -> bool:
        """Whether all are meant."""
        return not self.versions

    def missing(self) -> list[VersionId]:
        """Return those that were named and not found."""
        return sorted(self.versions - self.seen)


class OrphanAmount(NamedTuple):
    """How much some orphans are."""

    versions: int
    size: int
    shards: int

    def __str__(self) -> str:
        return (
            f"{count_text(self.shards, 'shard')} of {count_text(self.versions, 'version')}, "
            f"{size_text(self.size)}"
        )


def choose(texts: Sequence[str], *, everything: bool) -> Choice:
    """Return which versions the command line means: some, or with --all all."""
    if bool(texts) == everything:
        raise UsageError("name versions as `droppex orphans` lists them, or say --all")
    return Choice(frozenset(map(_parse_version, texts)))


def _parse_version(text: str) -> VersionId:
    parts = _VERSION.fullmatch(text)
    if parts is None:
        raise UsageError(f"{text!r} is no version: `droppex orphans` lists them, as in 5f1e92c04a7b-a3")
    return VersionId(int(parts[1], 16), int(parts[2], 16))


async def _chosen(
    session: Session, choice: Choice
) -> AsyncGenerator[tuple[OrphanVersion, OrphanListing], None]:
    """Yield what is chosen, with the listing that it came from, until all of it was found."""
    listing = session.client.orphans()
    async for orphan in listing:
        if choice.everything or orphan.version in choice.versions:
            if orphan.version is not None:
                choice.seen.add(orphan.version)
            yield orphan, listing
        if not choice.everything and not choice.missing():
            return
    if choice.everything:
        _tell_away(session.output, listing)
    elif choice.missing():
        _refuse_missing(choice, listing)


def _tell_away(output: Output, listing: OrphanListing) -> None:
    if listing.away:
        output.note(f"these pools could not be asked and may hold more: {', '.join(listing.away)}")


def _refuse_missing(choice: Choice, listing: OrphanListing) -> None:
    missing = ", ".join(map(str, choice.missing()))
    if listing.away:
        raise NotEnoughShards(
            f"no pool that could be asked holds a part of {missing} that is an orphan",
            [f"pool {name}" for name in listing.away],
        )
    raise NotFound(f"no pool holds a part of {missing} that is an orphan: `droppex orphans` lists them")


async def list_versions(session: Session, *, exact: bool) -> int:
    """Print all orphans, in the order of their sessions."""
    output = session.output
    listing = session.client.orphans()
    found = 0
    with Items(output) as items:
        async for orphan in listing:
            if output.as_json:
                items.add(orphan_document(orphan))
            else:
                if not found:
                    output.line(orphan_line(("VERSION", "SIZE", "EXTENTS", "SHARDS", "STATE", "NAME")))
                output.line(_line(orphan, output, exact=exact))
            found += 1
    if not found:
        output.say("there are no orphans")
    _tell_away(output, listing)
    return ExitCode.OK


def _line(orphan: OrphanVersion, output: Output, *, exact: bool) -> str:
    version = f"extent {orphan.extents[0].id}" if orphan.version is None else str(orphan.version)
    return orphan_line(
        (
            version,
            size_text(orphan.size, exact=exact),
            str(len(orphan.extents)),
            f"{orphan.sound}/{orphan.wanted}" if orphan.wanted else str(orphan.shards),
            orphan.state.value,
            output.text(orphan.name) or "-",
        )
    )


# -- adopt -----------------------------------------------------------------------------------------


class _Adoption(NamedTuple):
    """One version to adopt."""

    orphan: OrphanVersion
    listing: OrphanListing

    @property
    def label(self) -> str:
        """What people are told it is."""
        return f"version {self.orphan.version}"

    @property
    def size(self) -> int:
        """Bytes of the version."""
        return self.orphan.size


async def adopt_versions(session: Session, choice: Choice, folder: str, *, force: bool) -> int:
    """Adopt the versions that were chosen; with all, those that can be read."""
    output = session.output
    left = 0

    async def adoptions() -> AsyncIterator[_Adoption]:
        nonlocal left
        async with aclosing(_chosen(session, choice)) as chosen:
            async for orphan, listing in chosen:
                if choice.everything and orphan.state not in _ADOPTABLE:
                    left += 1
                else:
                    yield _Adoption(orphan, listing)

    with Items(output) as items:

        async def adopt(adoption: _Adoption) -> None:
            orphan = adoption.orphan
            if adoption.listing.away and not force:
                raise NotEnoughShards(
                    "pools are away that may hold more of it: bring them back, or say --force",
                    [f"pool {name}" for name in adoption.listing.away],
                )
            if orphan.state not in _ADOPTABLE:
                raise _unreadable(orphan)
            receipt = await session.client.adopt_orphan(orphan, folder=folder)
            if output.as_json:
                items.add(receipt_document(receipt))
            output.say(
                f"adopted {receipt.version} as {printable(receipt.name)}: {size_text(receipt.size)}, "
                f"{receipt.layout}, blake3 {receipt.blake3.hex()}"
                + ("; perhaps cut at its end" if orphan.state == OrphanState.OPEN else "")
            )

        batch: Batch = await run_batch(adoptions(), adopt, output)
    if left:
        output.note(f"{count_text(left, 'version')} cannot be read with what is there; left alone")
    if choice.everything and not batch.done and not batch.failed:
        output.say("there is nothing to adopt")
    return batch.exit_code


def _unreadable(orphan: OrphanVersion) -> NotEnoughShards | InvalidRequest:
    missing = [
        f"extent {extent.id}: {sound_shards(extent)} of the {extent.header.layout.k} that it is read from"
        for extent in orphan.extents
        if extent.header is not None and not is_readable(extent)
    ]
    if missing:
        return NotEnoughShards("too few of its shards are there to read it", missing)
    return InvalidRequest("a part before its last one is not full: some of it is lost")


# -- drop ------------------------------------------------------------------------------------------


async def count_versions(session: Session, choice: Choice) -> OrphanAmount:
    """Return how much `drop_versions` would drop; raise NotFound for what is not there."""
    versions = size = shards = 0
    async with aclosing(_chosen(session, choice)) as chosen:
        async for orphan, _ in chosen:
            versions += 1
            size += orphan.size
            shards += orphan.shards
    return OrphanAmount(versions, size, shards)


async def drop_versions(session: Session, choice: Choice) -> int:
    """Drop the versions that were chosen, some extents at a time."""
    output = session.output
    choice = Choice(choice.versions)
    waiting: list[OrphanExtent] = []
    refused: list[ExtentId] = []
    dropped = 0
    with Items(output) as items:
        async with aclosing(_chosen(session, choice)) as chosen:
            async for orphan, _ in chosen:
                dropped += 1
                waiting += orphan.extents
                if output.as_json:
                    items.add(orphan_document(orphan))
                if len(waiting) >= PAGE_LIMIT:
                    refused += await session.client.drop_orphans(waiting)
                    waiting = []
        if waiting:
            refused += await session.client.drop_orphans(waiting)
    if refused:
        raise Conflict(
            f"{count_text(len(refused), 'extent')} were left alone: the catalogue knows them by now: "
            + ", ".join(map(str, refused[:10]))
        )
    output.say(
        f"dropped {count_text(dropped, 'version')}; the pools clear them away after the grace"
        if dropped
        else "there is nothing to drop"
    )
    return ExitCode.OK
