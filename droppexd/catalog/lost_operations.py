"""What only a former master had written down: kept in a file that a person can read, before it goes.

Nothing of it was acknowledged under `catalog.sync`; without, it may have been.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from droppexd.catalog.keys import EXTENTS, NAMES, VERSIONS
from droppexd.catalog.records import unpack_extent, unpack_name, unpack_version
from droppexd.catalog.replica import LogRow, unpack_operations
from droppexd.errors import CatalogError, DroppexError
from droppexd.folders import replace_file
from droppexd.model import ExtentId, VersionId
from droppexd.runtime import RunBlocking

KeepLost = Callable[[int, Sequence[LogRow]], Awaitable[str]]
"""Keeps, for a term, rows of the log that go; returns where, for people. Raise CatalogError."""


class LostFiles:
    """Keeps them in a controller's folder."""

    def __init__(self, folder: Path, run_blocking: RunBlocking) -> None:
        self._folder = folder
        self._run_blocking = run_blocking

    async def __call__(self, term: int, rows: Sequence[LogRow]) -> str:
        """Write a file, durably; return its path."""
        return str(await self._run_blocking(_write, self._folder, term, rows))


def _write(folder: Path, term: int, rows: Sequence[LogRow]) -> Path:
    path = folder / f"lost-operations-term-{term}-revision-{rows[0].revision}.jsonl"
    lines = [json.dumps(told(row)) + "\n" for row in rows]
    try:
        replace_file(path, "".join(lines).encode())
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error.strerror}") from error
    return path


def told(row: LogRow) -> dict[str, Any]:
    """Return what a transaction did, for people: names and versions by name, the rest as it is stored."""
    operations: list[dict[str, Any]] = []
    for key, value in unpack_operations(row):
        operation: dict[str, Any] = {"do": "DELETE" if value is None else "PUT", "key": _told_key(key)}
        if value is not None:
            operation["value"] = value.hex()
            described = _told_value(key, value)
            if described:
                operation["is"] = described
        operations.append(operation)
    time = datetime.fromtimestamp(max(0, min(row.time_ms, 2**47)) / 1000, UTC)
    return {"revision": row.revision, "time": time.isoformat(timespec="seconds"), "operations": operations}


def _told_key(key: bytes) -> str:
    if key.startswith((VERSIONS, EXTENTS)):
        return key[:2].decode() + key[2:].hex()
    return key.decode(errors="backslashreplace")


def _told_value(key: bytes, value: bytes) -> str:
    try:
        if key.startswith(NAMES):
            return f"the name of version {unpack_name(value).version}"
        if key.startswith(VERSIONS):
            version = unpack_version(VersionId.from_bytes(key[2:]), value)
            return f"a version of {version.size} bytes"
        if key.startswith(EXTENTS):
            extent = unpack_extent(ExtentId.from_bytes(key[2:]), value).extent
            return f"an extent on the pools {', '.join(map(str, extent.pools))}"
    except (DroppexError, ValueError, TypeError, LookupError):
        return ""
    return ""
