"""`droppex relayout`: stored files get the layout that new ones have."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import NamedTuple

from droppexd.cli.client_arguments import folder_prefix
from droppexd.cli.client_batch import Batch, run_batch
from droppexd.cli.client_session import Session
from droppexd.cli.exits import printable
from droppexd.cli.progress import progress_meter
from droppexd.cli.render import Items, count_text, size_text
from droppexd.errors import NotFound
from droppexd.model import Layout, normal_name
from droppexd.wire.relayout_messages import RelayoutTold


class _File(NamedTuple):
    """One file to give another layout."""

    name: str
    size: int | None

    @property
    def label(self) -> str:
        """What people are told it is."""
        return self.name


class _Sums:
    """What it all came to."""

    def __init__(self) -> None:
        self.changed = 0
        self.kept = 0
        self.size = 0
        self.saved = 0

    def add(self, told: RelayoutTold) -> None:
        """Count one file."""
        self.changed += told.changed > 0
        self.kept += told.kept > 0
        self.size += told.changed
        self.saved += told.before - told.after


async def relayout_files(session: Session, name: str | None, layout: Layout | None, *, exact: bool) -> int:
    """Give a file, all below a folder, or all files a layout; print what changed."""
    output = session.output
    sums = _Sums()
    one = name is not None and not name.endswith("/")
    with Items(output) as items, progress_meter(output, "relayout") as meter:

        async def relayout(file: _File) -> None:
            meter.expect(file.size)
            try:
                told = await session.client.relayout(file.name, layout=layout, progress=meter.advance)
            except NotFound:
                if one:
                    raise
                return  # It was removed since it was listed.
            finally:
                meter.finish_file()
            sums.add(told)
            if output.as_json:
                items.add(_document(file.name, told))
            elif told.changed:
                output.say(
                    f"{printable(file.name)}: {told.layout}, {size_text(told.before, exact=exact)} on disks "
                    f"became {size_text(told.after, exact=exact)}"
                )

        batch: Batch = await run_batch(_files(session, name), relayout, output)
    if name is not None and name.endswith("/") and not batch.done and not batch.failed:
        raise NotFound(f"{name}: there is nothing below this folder")
    output.say(_summary(sums, batch, exact=exact))
    return batch.exit_code


async def _files(session: Session, name: str | None) -> AsyncIterator[_File]:
    if name is not None and not name.endswith("/"):
        described = await session.client.describe(normal_name(name))
        yield _File(described.name, described.size)
        return
    prefix = "" if name is None else folder_prefix(name)
    async with aclosing(session.client.list(prefix, recursive=True)) as entries:
        async for entry in entries:
            yield _File(entry.name, entry.size)


def _document(name: str, told: RelayoutTold) -> dict[str, object]:
    return {
        "name": name,
        "layout": told.layout,
        "size": told.size,
        "changed": told.changed,
        "kept": told.kept,
        "before": told.before,
        "after": told.after,
    }


def _summary(sums: _Sums, batch: Batch, *, exact: bool) -> str:
    if not sums.changed:
        text = "nothing to do: all of it has its layout" if batch.done else "nothing was changed"
    else:
        saved = size_text(abs(sums.saved), exact=exact)
        text = (
            f"{count_text(sums.changed, 'file')} coded anew, {size_text(sums.size, exact=exact)}: "
            + (f"{saved} of disk will be free" if sums.saved >= 0 else f"{saved} of disk more")
            + " once the old shards are cleared away"
        )
    if sums.kept:
        text += (
            f"; {count_text(sums.kept, 'file')} of a layout that survives more losses kept it "
            "(--layout changes these too)"
        )
    if batch.failed:
        text += f"; {count_text(batch.failed, 'file')} could not be done: run it again later"
    return text
