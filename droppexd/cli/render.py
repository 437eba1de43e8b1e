"""What `droppex` prints: lines for people, one JSON document for programs."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol, Self, TextIO

from droppexd.cli.exits import ReaderGone, error_text, printable
from droppexd.client.orphans import OrphanVersion
from droppexd.client.putting import layout_text
from droppexd.model import (
    ClusterStatus,
    ExtentPlaces,
    FileEntry,
    Membership,
    PoolInfo,
    PoolState,
    Receipt,
    SurvivalCount,
)
from droppexd.placement import choose_layout, usable_space
from droppexd.wire.messages import Described, Status

Document = Any
"""What `json.dumps` takes."""

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(size: int, *, exact: bool = False) -> str:
    """Return a size for people, in binary units, or the plain number of bytes."""
    if exact:
        return str(size)
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in _UNITS:
        value /= 1024
        if value < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{value:.1f} {unit}"


def time_text(moment_ms: int) -> str:
    """Return a moment for people, in local time."""
    return datetime.fromtimestamp(moment_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def time_document(moment_ms: int) -> str:
    """Return a moment for programs: ISO 8601, UTC."""
    text = datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def duration_text(seconds: float) -> str:
    """Return a length of time for people, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((at for at, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"


def count_text(count: int, one: str, several: str = "") -> str:
    """Return `1 file` or `3 files`."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def rate_text(size: int, seconds: float) -> str:
    """Return a speed for people."""
    return f"{size_text(round(size / seconds))}/s" if seconds > 0 else "-"


def table(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the rows as lines with aligned columns; the columns in `right` are aligned to the right."""
    kept = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)] if kept else []
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in kept
    ]


# -- where it goes ---------------------------------------------------------------------------------


class LinePrinter(Protocol):
    """Prints a line above a moving progress bar."""

    def __call__(self, text: str) -> None:
        """Print one line."""
        ...


class Output:
    """The standard streams of one command, and what its user wants to see on them."""

    def __init__(
        self, *, quiet: bool, as_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self.on_terminal = self._stdout.isatty()
        self.progress_wanted = not quiet and self._stderr.isatty()
        self._above_bar: LinePrinter | None = None

    def text(self, name: str) -> str:
        """Return a name as it is, or on a terminal without what could move the cursor."""
        return printable(name) if self.on_terminal else name

    def line(self, text: str) -> None:
        """Print a line that is the result of the command, and no JSON."""
        if self._above_bar is not None and self.on_terminal:
            self._above_bar(text)
        else:
            self.write(f"{text}\n")

    def say(self, text: str) -> None:
        """Print a line that says what was done; not when nobody wants it."""
        if not (self.quiet or self.as_json):
            self.line(text)

    def note(self, text: str) -> None:
        """Tell something that is no error beside the output, on standard error."""
        if not self.quiet:
            self._complain(f"droppex: {printable(text)}")

    def error(self, error: BaseException, subject: str = "") -> None:
        """Tell an error, on standard error."""
        self._complain(f"droppex: {error_text(error, subject)}")

    def document(self, document: Document) -> None:
        """Print the one JSON document of the command."""
        self.write(json.dumps(document, indent=2) + "\n")

    def write(self, text: str) -> None:
        """Write to standard output. Raise ReaderGone when nobody reads it."""
        try:
            self._stdout.write(text)
        except BrokenPipeError:
            raise ReaderGone from None

    def flush(self) -> None:
        """Write out what is buffered. Raise ReaderGone when nobody reads it."""
        try:
            self._stdout.flush()
        except BrokenPipeError:
            raise ReaderGone from None

    @contextmanager
    def lines_above_bar(self, printer: LinePrinter) -> Iterator[None]:
        """Send lines for the terminal through `printer` while a progress bar moves there."""
        self._above_bar = printer
        try:
            yield
        finally:
            self._above_bar = None

    def _complain(self, text: str) -> None:
        if self._above_bar is not None:
            self._above_bar(text)
        else:
            try:
                self._stderr.write(f"{text}\n")
            except BrokenPipeError:
                raise ReaderGone from None


class Items:
    """Results that come one after another: lines for people, or the items of one JSON list.

    Use it as a context manager. An error closes the list as well, so that the document can be read.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._count = 0

    def __enter__(self) -> Self:
        if self._output.as_json:
            self._output.write("[")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._output.as_json and kind is not ReaderGone:
            self._output.write("\n]\n" if self._count else "]\n")

    def add(self, document: Document) -> None:
        """Add an item to the JSON list."""
        self._output.write((",\n  " if self._count else "\n  ") + json.dumps(document))
        self._count += 1


def discard_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


# -- files -----------------------------------------------------------------------------------------


def losses_text(pools: int | None, machines: int | None) -> str:
    """Return what may be lost, in words."""
    if pools is None or machines is None:
        return "kept in the catalogue alone"
    if pools < 0:
        return "cannot be read now: too many shards are missing"
    if pools == 0:
        return "survives no loss of a pool"
    whole = f"or {count_text(machines, 'machine')}" if machines > 0 else "but of no machine"
    return f"survives the loss of {count_text(pools, 'pool')} {whole}"


def receipt_line(receipt: Receipt) -> str:
    """Return the receipt of a put as a line."""
    note = f"; {printable(receipt.note)}" if receipt.note else ""
    did = "replaced" if receipt.replaced else "stored"
    losses = losses_text(receipt.survives_pools, receipt.survives_machines)
    where = f"{receipt.layout}, {losses}" if receipt.layout else losses
    return (
        f"{did} {printable(receipt.name)}: {size_text(receipt.size)}, {where}, "
        f"version {receipt.version}, blake3 {receipt.blake3.hex()}{note}"
    )


def receipt_document(receipt: Receipt) -> Document:
    """Return the receipt of a put for programs."""
    return {
        "name": receipt.name,
        "version": str(receipt.version),
        "size": receipt.size,
        "blake3": receipt.blake3.hex(),
        "layout": receipt.layout or None,
        "survives_pools": receipt.survives_pools,
        "survives_machines": receipt.survives_machines,
        "replaced": receipt.replaced,
        "note": receipt.note,
    }


def entry_line(entry: FileEntry, output: Output, *, long: bool, exact: bool) -> str:
    """Return a line of a listing: the name, with `long` behind its size and time."""
    name = output.text(entry.name)
    if not long:
        return name
    if entry.folder:
        return f"{'-':>12}  {'-':16}  {name}"
    return f"{size_text(entry.size, exact=exact):>12}  {time_text(entry.created_ms)}  {name}"


def entry_document(entry: FileEntry) -> Document:
    """Return a line of a listing for programs."""
    if entry.folder:
        return {"name": entry.name, "folder": True}
    return {
        "name": entry.name,
        "folder": False,
        "size": entry.size,
        "created": time_document(entry.created_ms),
        "version": None if entry.version is None else str(entry.version),
    }


def described_document(described: Described) -> Document:
    """Return all that is known of a file, for programs."""
    return {
        "name": described.name,
        "version": str(described.version),
        "size": described.size,
        "blake3": described.blake3.hex(),
        "created": time_document(described.created_ms),
        "names": described.names,
        "metadata": {pair[0]: pair[1] for pair in described.metadata},
        "layout": layout_text(described) or None,
        "survives_pools": described.survives_pools,
        "survives_machines": described.survives_machines,
        "extents": [_extent_document(extent) for extent in described.extents],
    }


def _extent_document(extent: ExtentPlaces) -> Document:
    return {
        "id": str(extent.id),
        "layout": str(extent.layout),
        "size": extent.size,
        "shards": [
            {
                "index": shard.index,
                "pool": shard.pool,
                "name": shard.name,
                "machine": shard.machine,
                "state": shard.state,
            }
            for shard in extent.shards
        ],
    }


def described_lines(described: Described, output: Output, *, exact: bool) -> list[str]:
    """Return all that is known of a file, for people."""
    size = str(described.size) if exact else f"{size_text(described.size)} ({described.size} bytes)"
    lines = [
        f"name      {output.text(described.name)}",
        f"version   {described.version}",
        f"size      {size}",
        f"blake3    {described.blake3.hex()}",
        f"stored    {time_text(described.created_ms)}",
        f"names     {described.names}",
        f"layout    {layout_text(described) or '-'}",
        f"losses    {losses_text(described.survives_pools, described.survives_machines)}",
    ]
    lines += [f"metadata  {printable(key)} = {printable(value)}" for key, value in described.metadata]
    for extent in described.extents:
        lines.append(f"extent    {extent.id}: {size_text(extent.size, exact=exact)}, {extent.layout}")
        rows = (
            (
                f"  {shard.index}",
                "data" if shard.index < extent.layout.k else "parity",
                printable(shard.name) or (f"pool {shard.pool}" if shard.pool else "-"),
                printable(shard.machine) or "-",
                shard.state,
            )
            for shard in extent.shards
        )
        lines += table(rows, right=(0,))
    return lines


# -- orphans ---------------------------------------------------------------------------------------

_ORPHAN_WIDTHS = (-25, 10, 7, 9, -10)
"""Of the columns but the last, below 0 to the left: they are printed line by line, however many there are."""


def orphan_line(cells: Sequence[str]) -> str:
    """Return a line of the list of orphans: version, size, extents, shards, state, name."""
    *front, last = cells
    aligned = [
        cell.rjust(width) if width > 0 else cell.ljust(-width)
        for cell, width in zip(front, _ORPHAN_WIDTHS, strict=True)
    ]
    return "  ".join([*aligned, last])


def orphan_document(orphan: OrphanVersion) -> Document:
    """Return a version that no record names, for programs."""
    header = next((extent.header for extent in orphan.extents if extent.header), None)
    return {
        "version": None if orphan.version is None else str(orphan.version),
        "state": orphan.state.value,
        "name": orphan.name or None,
        "size": orphan.size,
        "shards": orphan.shards,
        "session": f"{orphan.extents[0].id.session:x}",
        "incarnation": header.incarnation.hex() if header else None,
        "extents": [
            {
                "id": str(extent.id),
                "layout": str(extent.header.layout) if extent.header else None,
                "size": extent.header.size if extent.header else None,
                "shards": [
                    {"index": place.shard, "pool": place.pool, "agrees": place.agrees}
                    for place in extent.places
                ],
            }
            for extent in orphan.extents
        ],
    }


# -- cluster ---------------------------------------------------------------------------------------


def problems(status: ClusterStatus) -> list[str]:
    """Return what needs a person, a line each; nothing when all is well."""
    found = list(status.warnings)
    found += [
        f"pool {pool.name or pool.number} on {pool.machine or '?'} is {pool.state}"
        for pool in status.pools
        if pool.membership != Membership.REMOVED
        and pool.state != PoolState.UP
        and not any(warning.startswith(f"pool {pool.name} (") for warning in status.warnings)
    ]
    for count in status.survival:
        if count.files and count.survives < 0:
            found.append(f"{count_text(count.files, 'file')} cannot be read now")
        elif count.files and count.survives == 0:
            found.append(f"{count_text(count.files, 'file')} would not survive the loss of one more pool")
    return found


def pool_document(pool: PoolInfo) -> Document:
    """Return a pool for programs."""
    return {
        "number": pool.number,
        "id": pool.pool_id.hex(),
        "name": pool.name,
        "machine": pool.machine,
        "zone": pool.zone,
        "address": pool.address,
        "state": pool.state,
        "membership": pool.membership,
        "capacity": pool.capacity,
        "free": pool.free,
        "shards": pool.shards,
        "scrub": {
            "ended": time_document(pool.scrub.ended_ms) if pool.scrub.ended_ms else None,
            "percent": pool.scrub.percent,
            "lost": pool.scrub.lost,
        },
        "trouble": pool.trouble or None,
    }


def pool_lines(pools: Sequence[PoolInfo], *, exact: bool) -> list[str]:
    """Return the pools as a table for people."""
    if not pools:
        return ["no pool has announced itself yet"]
    headings = "POOL NAME MACHINE ZONE STATE MEMBER FREE OF SHARDS SCRUBBED ADDRESS"
    rows = [tuple(headings.split())]
    rows += [
        (
            str(pool.number),
            printable(pool.name) or "-",
            printable(pool.machine) or "-",
            printable(pool.zone) or "-",
            pool.state,
            pool.membership,
            size_text(pool.free, exact=exact),
            size_text(pool.capacity, exact=exact),
            str(pool.shards),
            time_text(pool.scrub.ended_ms).partition(" ")[0] if pool.scrub.ended_ms else "-",
            printable(pool.address),
        )
        for pool in pools
    ]
    return table(rows, right=(0, 6, 7, 8))


def trouble_lines(pools: Sequence[PoolInfo]) -> list[str]:
    """Return why pools take no writes, a line each."""
    return [
        f"{printable(pool.name) or pool.number} takes no writes: {printable(pool.trouble)}"
        for pool in pools
        if pool.trouble
    ]


def status_document(reply: Status) -> Document:
    """Return the cluster at a glance, for programs."""
    status = reply.status
    return {
        "cluster_id": status.cluster_id.hex(),
        "term": status.term,
        "controllers": list(status.controllers),
        "apps": list(reply.apps),
        "sessions": status.sessions,
        "files": status.files,
        "empty_files": status.empty_files,
        "size": status.size,
        "extents": status.extents,
        "garbage": status.garbage,
        "quarantined": status.quarantined,
        "survival": _survival_document(status.survival),
        "machine_survival": _survival_document(status.machine_survival),
        "room": {
            "layout": str(layout := choose_layout(status.pools, None)),
            "size": usable_space(status.pools, layout),
        },
        "repair": {
            "done": status.repair.done,
            "left": status.repair.left,
            "running": status.repair.running,
            "stuck": status.repair.stuck,
            "moving": status.repair.moving,
            "moving_stuck": status.repair.moving_stuck,
            "balancing": status.repair.balancing,
            "balanced": status.repair.balanced,
            "bytes_per_s": status.repair.bytes_per_s,
            "eta_s": status.repair.eta_s,
        },
        "pools": [pool_document(pool) for pool in status.pools],
        "warnings": list(status.warnings),
        "problems": problems(status),
    }


def status_lines(reply: Status, *, exact: bool) -> list[str]:
    """Return the cluster at a glance, for people."""
    status = reply.status
    size = size_text(status.size, exact=exact)
    apps = ", ".join(map(printable, reply.apps)) or "-"
    lines = [
        f"cluster      {status.cluster_id.hex()}, term {status.term}",
        f"controllers  {', '.join(map(printable, status.controllers)) or '-'}",
        f"apps         {apps} ({count_text(status.sessions, 'session')})",
        f"files        {count_text(status.files, 'file')}, {size}, {count_text(status.extents, 'extent')}",
    ]
    lines += [f"losses       {_survival_text(count, 'pool')}" for count in status.survival]
    lines += [f"             {_survival_text(count, 'machine')}" for count in status.machine_survival]
    if status.empty_files:
        lines.append(
            f"             {count_text(status.empty_files, 'empty file')} kept in the catalogue alone"
        )
    lines += [f"room         {_room_text(status, exact=exact)}"]
    work = _work_texts(status)
    lines += [f"work         {work[0]}", *(f"             {text}" for text in work[1:])]
    lines += ["", *pool_lines(status.pools, exact=exact), ""]
    found = problems(status)
    lines += [f"needs a person: {printable(problem)}" for problem in found] or ["all is well"]
    return lines


def _room_text(status: ClusterStatus, *, exact: bool) -> str:
    """Return how much more can be stored, and what that is of all that is free."""
    layout = choose_layout(status.pools, None)
    room = usable_space(status.pools, layout)
    free = sum(pool.free for pool in status.pools if pool.writable)
    text = f"for {size_text(room, exact=exact)} of files in {layout}"
    return f"{text}, of {size_text(free, exact=exact)} free"


def _survival_document(survival: Sequence[SurvivalCount]) -> list[Document]:
    return [
        {"survives": count.survives, "files": count.files, "extents": count.extents} for count in survival
    ]


def _survival_text(count: SurvivalCount, what: str) -> str:
    counted = f"{count_text(count.files, 'file')} ({count_text(count.extents, 'extent')})"
    if count.survives < 0:
        return f"{counted} cannot be read now"
    losses = count_text(count.survives, f"more {what}", f"more {what}s")
    return f"{counted} would survive the loss of {losses}"


def _work_texts(status: ClusterStatus) -> list[str]:
    """Return what the cluster is busy with."""
    texts = []
    repair = status.repair
    if repair.left:
        text = f"rebuilding: {count_text(repair.left, 'shard')} missing, {repair.done} done"
        if repair.bytes_per_s:
            text += f", {size_text(repair.bytes_per_s)}/s"
        if repair.eta_s is not None:
            text += f", about {duration_text(repair.eta_s)} left"
        texts.append(text)
    if repair.moving:
        text = f"moving {count_text(repair.moving, 'shard')} away from pools that are to be emptied"
        if repair.moving_stuck:
            text += f"; {repair.moving_stuck} have nowhere to go"
        texts.append(text)
    if repair.balancing:
        texts.append(f"balancing: {count_text(repair.balancing, 'shard')} to move to other pools")
    if status.garbage:
        texts.append(f"{count_text(status.garbage, 'removed extent')} to be cleared away")
    return texts or ["none"]
