"""Putting a prepared catalogue in the place of another, so that a crash at any point leaves one of the two.

What is prepared lies beside the catalogue, whole and flushed, and gets its second name by one rename: from
that moment on it is the catalogue. What is left to do is done under the lock, if need be by whoever comes
next, a controller that starts or another restore: the former catalogue is moved aside, its log *first*,
for SQLite would play a log into any database of that name; then the prepared one gets the catalogue's
name.
"""

from pathlib import Path

from droppexd.folders import flush_folder

_LOG, _MEMORY = "-wal", "-shm"


def pending(path: Path) -> Path:
    """Return the name under which a prepared catalogue waits to take the place of the one at `path`."""
    return path.with_name(f"{path.name}.restored")


def commit_replacement(prepared: Path, path: Path) -> None:
    """Decide that a prepared catalogue is the catalogue from now on. Raise OSError."""
    flush_folder(path.parent)
    prepared.replace(pending(path))
    flush_folder(path.parent)


def finish_replacement(path: Path) -> Path | None:
    """Do what is left of a replacement that was decided; return where the former catalogue is kept, if any.

    Only under the catalogue's lock. Raise OSError.
    """
    prepared = pending(path)
    if not prepared.exists():
        return None
    kept = _free_name(path)
    for suffix in (_LOG, ""):
        former = path.with_name(path.name + suffix)
        if former.exists():
            former.rename(kept.with_name(kept.name + suffix))
            flush_folder(path.parent)
    path.with_name(path.name + _MEMORY).unlink(missing_ok=True)
    prepared.rename(path)
    flush_folder(path.parent)
    return kept if kept.exists() else None


def former_catalogues(path: Path) -> list[Path]:
    """Return the catalogues that were moved aside, in no order."""
    found = path.parent.glob(f"{path.name}.before-*")
    return [file for file in found if file.name.rpartition("-")[2].isdigit()]


def _free_name(path: Path) -> Path:
    """Return the first name that no former catalogue has: the same one until the file itself has moved."""
    number = 1
    while (kept := path.with_name(f"{path.name}.before-{number}")).exists():
        number += 1
    return kept
