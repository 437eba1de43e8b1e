"""`put`, `get` and `cat`: files between this machine and the cluster."""

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from typing import BinaryIO, NamedTuple

import trio
from blake3 import blake3

from droppexd.cli.client_arguments import (
    STREAM,
    WHOLE,
    ByteRange,
    Upload,
    folder_prefix,
    get_folder_path,
    get_path,
    join_path,
    relative_parts,
)
from droppexd.cli.client_batch import Batch, run_batch
from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, expected_error, printable
from droppexd.cli.local_files import (
    NewFile,
    Source,
    StandardOutput,
    WholeFile,
    current_umask,
    is_folder,
    is_stream,
    make_folder,
    metadata_mode,
    metadata_mtime_ns,
    new_file,
    open_source,
    opened_folder,
    opened_subfolder,
    refuse_folder,
    refuse_taken,
    regular_size,
    standard_input,
    walk_files,
)
from droppexd.cli.progress import Meter, progress_meter
from droppexd.cli.render import (
    Items,
    count_text,
    layout_text,
    rate_text,
    receipt_document,
    receipt_line,
    size_text,
)
from droppexd.client import Client
from droppexd.errors import (
    ClusterFull,
    Conflict,
    DroppexError,
    NotAuthorised,
    NotEnoughShards,
    NotFound,
    PeerError,
    SessionClosed,
    StaleRead,
)
from droppexd.model import FileEntry, Layout, Metadata, Receipt, VersionId, normal_name
from droppexd.wire.messages import ABSENT, ANYTHING, Described

RETRY_PAUSE_S = 1.0
"""Between the two attempts at a put: time for the app to notice which pools are gone."""

_HASH_STEP = 1024 * 1024


# -- put -------------------------------------------------------------------------------------------


class PutOptions(NamedTuple):
    """How files are stored."""

    recursive: bool = False
    force: bool = False
    layout: Layout | None = None


class PutItem(NamedTuple):
    """One file to store."""

    path: str
    name: str
    size: int | None

    @property
    def label(self) -> str:
        """What people are told it is."""
        return "standard input" if self.path == STREAM else self.path


def reads_streams(uploads: Sequence[Upload]) -> bool:
    """Return whether any of the sources may keep us waiting for somebody."""
    return any(upload.path == STREAM or is_stream(upload.path) for upload in uploads)


async def put(session: Session, uploads: Sequence[Upload], options: PutOptions) -> int:
    """Store files and trees; print their receipts."""
    output = session.output
    with Items(output) as items, progress_meter(output, "put") as meter:

        async def put_item(item: PutItem) -> None:
            transfer = _Transfer(meter)
            transfer.expect(item.size)
            try:
                receipt = await _Put(session, item, options, transfer).run()
            finally:
                transfer.finish()
            if output.as_json:
                items.add(receipt_document(receipt))
            output.say(receipt_line(receipt))

        batch = await run_batch(_put_items(session, uploads, options), put_item, output)
    _summarise(session, batch, "stored")
    return batch.exit_code


async def _put_items(
    session: Session, uploads: Sequence[Upload], options: PutOptions
) -> AsyncIterator[PutItem]:
    def skipped(path: str, why: str) -> None:
        session.output.note(f"{path} was left out: {why}")

    for upload in uploads:
        if upload.path == STREAM or not (options.recursive and is_folder(upload.path)):
            yield PutItem(
                upload.path, upload.name, None if upload.path == STREAM else regular_size(upload.path)
            )
            continue
        folder = upload.name.rstrip("/")
        for found in walk_files(upload.path, skipped):
            yield PutItem(found.path, f"{folder}/{found.relative}", found.size)


class _Put:
    """One file on its way in, with a second attempt if the first broke off."""

    def __init__(self, session: Session, item: PutItem, options: PutOptions, transfer: "_Transfer") -> None:
        self._client = session.client
        self._output = session.output
        self._item = item
        self._options = options
        self._transfer = transfer

    async def run(self) -> Receipt:
        """Store the file and return its receipt."""
        name = normal_name(self._item.name)
        source = await self._open()
        with source.stream as stream:
            try:
                return await self._attempt(name, source)
            except (DroppexError, BaseExceptionGroup) as error:
                single = expected_error(error)
                if source.size is None or not _may_work_again(single):
                    raise
                self._output.note(f"{self._item.label}: {single}; trying once more")
            self._transfer.restart()
            await trio.sleep(RETRY_PAUSE_S)
            stream.seek(0)
            try:
                return await self._attempt(name, source)
            except Conflict:
                receipt = await self._first_attempt(name, stream)
                if receipt is None:
                    raise
                return receipt

    async def _open(self) -> Source:
        if self._item.path == STREAM:
            return Source(standard_input(), None, ())
        refuse_folder(self._item.path)
        if self._item.size is None:  # Opening a named pipe waits for who writes to it.
            return await trio.to_thread.run_sync(open_source, self._item.path, abandon_on_cancel=True)
        return open_source(self._item.path)

    async def _attempt(self, name: str, source: Source) -> Receipt:
        return await self._client.put_file(
            name,
            source.stream,
            size=source.size,
            condition=ANYTHING if self._options.force else ABSENT,
            layout=self._options.layout,
            metadata=source.metadata,
            progress=self._transfer.advance,
        )

    async def _first_attempt(self, name: str, stream: BinaryIO) -> Receipt | None:
        """Return the receipt of the first attempt if that was committed after all, its answer lost."""
        try:
            described = await self._client.describe(name)
        except NotFound:
            return None
        digest = await trio.to_thread.run_sync(_digest_of, stream)
        return _receipt_of(described) if described.blake3 == digest else None


def _may_work_again(error: DroppexError | OSError | None) -> bool:
    if isinstance(error, NotAuthorised | ClusterFull):
        return False
    return isinstance(error, PeerError | NotEnoughShards | SessionClosed)


def _digest_of(stream: BinaryIO) -> bytes:
    hasher = blake3()
    stream.seek(0)
    while block := stream.read(_HASH_STEP):
        hasher.update(block)
    return hasher.digest()


def _receipt_of(described: Described) -> Receipt:
    return Receipt(
        name=described.name,
        version=described.version,
        size=described.size,
        blake3=described.blake3,
        layout=layout_text(described),
        survives_pools=described.survives_pools,
        survives_machines=described.survives_machines,
        note="stored by the first attempt, whose answer was lost",
    )


# -- get -------------------------------------------------------------------------------------------


class GetOptions(NamedTuple):
    """How files are fetched."""

    force: bool = False
    part: ByteRange = WHOLE


class GetItem(NamedTuple):
    """One file to fetch: its name, and below which opened folder it goes under which path."""

    name: str
    path: str
    folders: tuple[str, ...]
    base: str


class Got(NamedTuple):
    """One file that was fetched."""

    name: str
    version: str
    size: int
    blake3: str | None
    path: str
    rebuilt_chunks: int
    seconds: float


async def get(session: Session, name: str, local: str | None, options: GetOptions) -> int:
    """Fetch one file to a local path, or to standard output."""
    name = normal_name(name)
    if local == STREAM:
        await _to_stdout(session, name, options.part)
        return ExitCode.OK
    path = get_path(name, local)
    folder, _, base = path.rpartition("/")
    item = GetItem(name, path, (), base)
    with (
        opened_folder(folder or ("/" if path.startswith("/") else ".")) as root,
        progress_meter(session.output, "get") as meter,
    ):
        got = await _Gets(session, root, options, meter).run(item)
    if session.output.as_json:
        session.output.document(got._asdict())
    session.output.say(_got_line(got))
    return ExitCode.OK


async def get_tree(session: Session, name: str, local: str | None, options: GetOptions) -> int:
    """Fetch everything below a remote folder into a local one."""
    prefix = folder_prefix(name)
    folder = get_folder_path(prefix, local)
    async with aclosing(session.client.list(prefix, recursive=True)) as names:
        first = await anext(names, None)
        if first is None:
            raise NotFound(f"{name}: there is nothing below this folder")
        make_folder(folder)
        batch = await _get_all(session, _Tree(prefix, folder), _listed(first, names), options)
    _summarise(session, batch, "fetched")
    return batch.exit_code


async def _listed(first: FileEntry, rest: AsyncIterator[FileEntry]) -> AsyncIterator["_Listed"]:
    yield _Listed(first.name, first.size)
    async for entry in rest:
        yield _Listed(entry.name, entry.size)


async def _get_all(
    session: Session, tree: "_Tree", entries: AsyncIterator["_Listed"], options: GetOptions
) -> Batch:
    output = session.output
    with ExitStack() as stack:
        root = stack.enter_context(opened_folder(tree.folder))
        items = stack.enter_context(Items(output))
        meter = stack.enter_context(progress_meter(output, "get"))
        gets = _Gets(session, root, options, meter)

        async def get_entry(entry: _Listed) -> None:
            parts = relative_parts(entry.name, tree.prefix)
            path = join_path(tree.folder, *parts)
            got = await gets.run(GetItem(entry.name, path, parts[:-1], parts[-1]))
            if output.as_json:
                items.add(got._asdict())
            output.say(_got_line(got))

        return await run_batch(entries, get_entry, output)


class _Tree(NamedTuple):
    """A remote folder and the local one that it goes to."""

    prefix: str
    folder: str


class _Listed(NamedTuple):
    """A listed name that is to be fetched."""

    name: str
    size: int | None

    @property
    def label(self) -> str:
        """What people are told it is."""
        return self.name


def _got_line(got: Got) -> str:
    checked = "BLAKE3 verified" if got.blake3 else "a part"
    rebuilt = f", {count_text(got.rebuilt_chunks, 'chunk')} rebuilt" if got.rebuilt_chunks else ""
    return (
        f"{printable(got.name)} -> {printable(got.path)}: {size_text(got.size)}, {checked}{rebuilt}, "
        f"{rate_text(got.size, got.seconds)}"
    )


class _Gets:
    """The files of one command on their way out, below one opened local folder."""

    def __init__(self, session: Session, root: int, options: GetOptions, meter: Meter) -> None:
        self._client = session.client
        self._root = root
        self._options = options
        self._meter = meter
        self._umask = current_umask()
        self._made: set[tuple[int, int]] = set()

    async def run(self, item: GetItem) -> Got:
        """Fetch one file; it appears whole, or not at all."""
        began = trio.current_time()
        with opened_subfolder(self._root, item.folders, item.path) as folder:
            self._refuse(folder, item)
            with new_file(folder, item.base, item.path) as target:
                read = await self._fetch(item, target)
                self._commit(folder, item, target, read)
        whole = self._options.part == WHOLE
        return Got(
            name=item.name,
            version=str(read.version),
            size=read.size,
            blake3=read.blake3.hex() if whole else None,
            path=item.path,
            rebuilt_chunks=read.rebuilt,
            seconds=round(trio.current_time() - began, 6),
        )

    def _refuse(self, folder: int, item: GetItem) -> None:
        there = refuse_taken(folder, item.base, item.path, force=self._options.force)
        if there is not None and (there.st_dev, there.st_ino) in self._made:
            raise Conflict(f"{item.path}: this file system takes another name of this get for the same")

    def _commit(self, folder: int, item: GetItem, target: NewFile, read: "_Read") -> None:
        self._refuse(folder, item)
        whole = self._options.part == WHOLE
        metadata = read.metadata if whole else ()
        mode = metadata_mode(metadata)
        self._made.add(
            target.commit(
                force=self._options.force,
                mode=(0o666 if mode is None else mode) & ~self._umask,
                mtime_ns=metadata_mtime_ns(metadata),
            )
        )

    async def _fetch(self, item: GetItem, target: NewFile) -> "_Read":
        transfer = _Transfer(self._meter)
        try:
            try:
                return await _copy_out(self._client, item.name, target.stream, self._options.part, transfer)
            except StaleRead:  # Replaced while it was read: the new version is wanted.
                target.restart()
                transfer.restart()
                return await _copy_out(self._client, item.name, target.stream, self._options.part, transfer)
        finally:
            transfer.finish()


async def cat(session: Session, names: Sequence[str]) -> int:
    """Write files to standard output, one after another."""
    for name in names:
        await _to_stdout(session, normal_name(name), WHOLE)
    return ExitCode.OK


async def _to_stdout(session: Session, name: str, part: ByteRange) -> None:
    with progress_meter(session.output, "get") as meter, StandardOutput() as stdout:
        await _copy_out(session.client, name, stdout, part, _Transfer(meter))


class _Read(NamedTuple):
    """What was read of a version."""

    version: VersionId
    size: int
    blake3: bytes
    metadata: Metadata
    rebuilt: int


async def _copy_out(
    client: Client, name: str, target: WholeFile, part: ByteRange, transfer: "_Transfer"
) -> _Read:
    """Write a name, or a part of it, to an opened file. A whole read is verified against its BLAKE3."""
    start, length, version = part.start, part.length, None
    if part.from_end:
        described = await client.describe(name)
        start = max(0, described.size - (length or 0))
        version = described.version
    async with client.open_read(name, start=start, length=length, version=version) as download:
        transfer.expect(download.length)
        await download.write_to(target, transfer.advance)
    info = download.info
    return _Read(info.version, download.length, info.blake3, info.metadata, download.rebuilt_parts)


class _Transfer:
    """How far one file is, so that a failed attempt can be taken back from the meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._expected = False
        self._through = 0

    def expect(self, size: int | None) -> None:
        """Tell the meter what is to come, once."""
        if not self._expected:
            self._expected = True
            self._meter.expect(size)

    def advance(self, size: int) -> None:
        """Note that `size` more bytes are through."""
        self._through += size
        self._meter.advance(size)

    def restart(self) -> None:
        """Forget the failed attempt."""
        self._meter.advance(-self._through)
        self._through = 0

    def finish(self) -> None:
        """Note that the file is done, well or not."""
        if self._expected:
            self._meter.finish_file()


def _summarise(session: Session, batch: Batch, did: str) -> None:
    """Say how a command with several files went."""
    if batch.failed and batch.done + batch.failed > 1:
        session.output.note(f"{did} {count_text(batch.done, 'file')}; {batch.failed} failed")
