"""SQLite databases that nobody serves, opened to be looked at: nothing beside them is changed."""

from pathlib import Path


def uri_of_stopped(path: Path) -> tuple[str, Path | None]:
    """Return the URI under which a database that nobody uses is read, with what lies in its log.

    And a file that SQLite makes for that beside it, if it must: the caller removes it in the end. Raise
    OSError when there is a log that cannot be looked at.
    """
    log, memory = Path(f"{path}-wal"), Path(f"{path}-shm")
    uri = path.resolve().as_uri()
    if not log.exists() or not log.stat().st_size:
        return f"{uri}?immutable=1", None
    if memory.exists():
        return f"{uri}?mode=ro&readonly_shm=1", None
    # To read a log that has no such file, SQLite makes one.
    return f"{uri}?mode=ro", memory
