"""`ls`, `find`, `stat`, `rm`, `mv`, `cp`, `status` and `pools`: names, and how the cluster is."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from droppexd.cli.client_arguments import folder_prefix, mv_target
from droppexd.cli.client_batch import Batch, run_batch
from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, UsageError, printable
from droppexd.cli.render import (
    Items,
    count_text,
    described_document,
    described_lines,
    entry_document,
    entry_line,
    problems,
    size_text,
    status_document,
    status_lines,
)
from droppexd.client import OnStale
from droppexd.errors import NotFound
from droppexd.model import DEFAULT_FOLDER, FileEntry, VersionId, normal_name
from droppexd.wire.messages import ABSENT, ANYTHING


class ListOptions(NamedTuple):
    """How listings look."""

    long: bool = False
    recursive: bool = False
    exact: bool = False
    stale_ok: bool = False


# -- listings --------------------------------------------------------------------------------------


async def list_names(session: Session, prefixes: Sequence[str], options: ListOptions) -> int:
    """Print the names below each prefix; one that nothing begins with is NotFound."""
    code = ExitCode.OK
    with Items(session.output) as items:
        for prefix in prefixes or [""]:
            count = await _print_entries(session, _entries(session, prefix, options), items, options)
            if count == 0 and prefix:
                session.output.error(NotFound(f"no name begins with {prefix!r}"))
                code = ExitCode.NOT_FOUND
    return code


async def _entries(session: Session, prefix: str, options: ListOptions) -> AsyncIterator[FileEntry]:
    """Yield what begins with `prefix`; a word without a slash may also be a name in the default folder."""
    found = False
    recursive, on_stale = options.recursive, _stale_note(session) if options.stale_ok else None
    async with aclosing(session.client.list(prefix, recursive=recursive, on_stale=on_stale)) as entries:
        async for entry in entries:
            found = True
            yield entry
    if prefix and not found and "/" not in prefix:
        async with aclosing(
            session.client.list(f"{DEFAULT_FOLDER}/{prefix}", recursive=recursive, on_stale=on_stale)
        ) as entries:
            async for entry in entries:
                yield entry


def _stale_note(session: Session) -> OnStale:
    """Return what tells, once for each controller, that an answer may be old."""
    told: set[str] = set()

    def note(controller: str, age_s: float | None) -> None:
        if controller not in told:
            told.add(controller)
            age = "of unknown age" if age_s is None else f"{age_s:.0f} s old"
            session.output.note(f"no master answers: this is what {printable(controller)} knows, {age}")

    return note


async def find_names(session: Session, pattern: str, options: ListOptions) -> int:
    """Print the names that match a glob."""
    with Items(session.output) as items:
        await _print_entries(session, session.client.find(pattern), items, options)
    return ExitCode.OK


async def _print_entries(
    session: Session, entries: AsyncIterator[FileEntry], items: Items, options: ListOptions
) -> int:
    output = session.output
    count = 0
    async for entry in entries:
        count += 1
        if output.as_json:
            items.add(entry_document(entry))
        else:
            output.line(entry_line(entry, output, long=options.long, exact=options.exact))
    return count


async def stat_names(session: Session, names: Sequence[str], *, exact: bool) -> int:
    """Print all that is known of each file: one JSON object for one name, a list for several."""
    output = session.output
    described = [await session.client.describe(name) for name in names]
    if output.as_json:
        documents = [described_document(one) for one in described]
        output.document(documents[0] if len(documents) == 1 else documents)
        return ExitCode.OK
    for place, one in enumerate(described):
        for line in ([""] if place else []) + described_lines(one, output, exact=exact):
            output.line(line)
    return ExitCode.OK


# -- changes of names ------------------------------------------------------------------------------


class Removal(NamedTuple):
    """One name to remove."""

    name: str
    size: int | None = 0
    version: VersionId | None = None
    """What the name had when it was listed."""

    @property
    def label(self) -> str:
        """What people are told it is."""
        return self.name


class Amount(NamedTuple):
    """How much lies below some folders."""

    files: int
    size: int

    def __str__(self) -> str:
        return f"{count_text(self.files, 'file')}, {size_text(self.size)}"


async def count_below(session: Session, folders: Sequence[str]) -> Amount:
    """Return how much `remove` with `recursive` would remove."""
    files = size = 0
    for folder in folders:
        prefix = _prefix_to_remove(folder)
        before = files
        async with aclosing(session.client.list(prefix, recursive=True)) as entries:
            async for entry in entries:
                files += 1
                size += entry.size
        if files == before:
            raise NotFound(f"{folder}: there is nothing below this folder")
    return Amount(files, size)


def _prefix_to_remove(folder: str) -> str:
    prefix = folder_prefix(folder)
    if not prefix:
        raise UsageError("rm -r needs a folder: it does not remove everything there is")
    return prefix


async def remove(session: Session, names: Sequence[str], *, recursive: bool) -> int:
    """Remove names, or everything below folders."""
    output = session.output
    with Items(output) as items:

        async def remove_one(removal: Removal) -> None:
            version = await session.client.remove(removal.name, known=removal.version)
            if output.as_json:
                items.add({"name": removal.name, "version": str(version)})

        removals = _below(session, names) if recursive else _named(names)
        batch: Batch = await run_batch(removals, remove_one, output)
    if recursive:
        output.say(f"removed {count_text(batch.done, 'file')}")
    return batch.exit_code


async def _named(names: Sequence[str]) -> AsyncIterator[Removal]:
    for name in names:
        yield Removal(normal_name(name))


async def _below(session: Session, folders: Sequence[str]) -> AsyncIterator[Removal]:
    for folder in folders:
        async with aclosing(session.client.list(_prefix_to_remove(folder), recursive=True)) as entries:
            async for entry in entries:
                yield Removal(entry.name, version=entry.version)


async def rename(session: Session, source: str, target: str, *, force: bool, keep: bool) -> int:
    """Give a file another name, or with `keep` one more."""
    output = session.output
    source = normal_name(source)
    target = mv_target(source, target)
    version = await session.client.rename(source, target, condition=ANYTHING if force else ABSENT, keep=keep)
    if output.as_json:
        output.document({"source": source, "name": target, "version": str(version)})
    output.say(f"{printable(source)} -> {printable(target)}")
    return ExitCode.OK


# -- the cluster -----------------------------------------------------------------------------------


async def show_status(session: Session, *, exact: bool, check: bool) -> int:
    """Print the cluster at a glance; with `check` fail when something needs a person."""
    output = session.output
    reply = await session.client.status()
    if output.as_json:
        output.document(status_document(reply))
    elif not output.quiet:
        for line in status_lines(reply, exact=exact):
            output.line(line)
    return ExitCode.FAILURE if check and problems(reply.status) else ExitCode.OK
