"""`droppex uploads`: puts of large files that were interrupted, and can be gone on with."""

from collections.abc import Sequence
from datetime import UTC, datetime

from droppexd.cli.client_orphans import choose
from droppexd.cli.client_session import Session
from droppexd.cli.exits import ExitCode, printable
from droppexd.cli.render import Document, count_text, size_text, table
from droppexd.errors import NotFound
from droppexd.model import EXTENT_CHUNKS, UploadRecord


async def list_uploads(session: Session, *, exact: bool) -> int:
    """Print the uploads that have not become files."""
    output = session.output
    uploads = [upload async for upload in session.client.uploads()]
    if output.as_json:
        output.document([_document(upload) for upload in uploads])
        return ExitCode.OK
    if not uploads:
        output.say("there are no uploads: every put has come to its end")
        return ExitCode.OK
    rows = [("UPLOAD", "STORED", "SIZE", "LAST", "NAME")]
    rows += [
        (
            str(upload.version),
            size_text(stored_size(upload), exact=exact),
            size_text(upload.size, exact=exact),
            _when(upload.touched_ms),
            printable(upload.name),
        )
        for upload in uploads
    ]
    for line in table(rows, right=(1, 2)):
        output.line(line)
    output.say("the same `droppex put` on the same machine goes on with its upload")
    return ExitCode.OK


async def drop_uploads(session: Session, texts: Sequence[str], *, everything: bool) -> int:
    """Give uploads up."""
    output = session.output
    choice = choose(texts, everything=everything)
    found = {upload.version: upload async for upload in session.client.uploads()}
    wanted = sorted(found if everything else choice.versions)
    for version in wanted:
        if version not in found:
            raise NotFound(f"there is no upload {version}: `droppex uploads` lists them")
    for version in wanted:
        try:
            await session.client.drop_upload(version)
        except NotFound:  # It has become a file just now, or somebody else gave it up.
            output.note(f"upload {version} is gone already")
    if output.as_json:
        output.document([_document(found[version]) for version in wanted])
    output.say(
        f"gave up {count_text(len(wanted), 'upload')}; the pools clear them away after the grace"
        if wanted
        else "there is nothing to drop"
    )
    return ExitCode.OK


def stored_size(upload: UploadRecord) -> int:
    """Return how many bytes of the file are stored already."""
    return upload.extents * EXTENT_CHUNKS * upload.chunk_size


def _document(upload: UploadRecord) -> Document:
    return {
        "upload": str(upload.version),
        "name": upload.name,
        "size": upload.size,
        "stored": stored_size(upload),
        "created_ms": upload.created_ms,
        "touched_ms": upload.touched_ms,
    }


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
