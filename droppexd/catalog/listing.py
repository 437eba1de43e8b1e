"""Pages of names: listings that seek past whole sub-folders, and globs that examine a bounded number."""

from bisect import bisect_left
from typing import NamedTuple

import trio

from droppexd.catalog.engine import Engine, Entry
from droppexd.catalog.glob import Glob
from droppexd.catalog.group import Ranges
from droppexd.catalog.keys import NAMES, end_of
from droppexd.catalog.records import file_entry
from droppexd.model import FileEntry

PAGE_NAME_BYTES = 512 * 1024
"""Bytes of names in one page: names of 1 KiB would not all fit into one message."""

FIND_NAMES = 2000
"""Names that one page of a glob examines."""

FIND_CHARACTERS = 100_000
"""Characters that one page of a glob examines, about; bounds the time of a page of very long names."""

_FIND_READ = 500
_FIRST_READ = 64
_MOST_READ = 1000
_SEEKING_READ = 1
"""Entries that are read behind a folder: next to it is another folder, more often than not."""

_SEEKS_PER_YIELD = 64


class Page(NamedTuple):
    """Entries in order; ask again after `next` unless it is empty."""

    entries: tuple[FileEntry, ...]
    next: str


def _key(entry: Entry) -> bytes:
    return entry.key


def _start_key(prefix: str, after: str, *, recursive: bool) -> bytes:
    """Return the first key that a page may begin with."""
    start = NAMES + prefix.encode()
    if not after:
        return start
    following = NAMES + after.encode() + b"\0"
    if not recursive and after.startswith(prefix):
        folder, slash, _ = after[len(prefix) :].partition("/")
        if slash:
            following = end_of(NAMES + (prefix + folder + slash).encode())
    return max(start, following)


async def list_names(engine: Ranges, prefix: str, after: str, limit: int, *, recursive: bool) -> Page:
    """Return a page of the names that start with `prefix`, after `after`.

    Without `recursive`, names with a slash behind the prefix are folded into one entry a folder, and the
    names within are not read.
    """
    position = _start_key(prefix, after, recursive=recursive)
    end = end_of(NAMES + prefix.encode())
    prefix_end = len(NAMES) + len(prefix.encode())
    entries: list[FileEntry] = []
    room = PAGE_NAME_BYTES
    read = min(limit, _FIRST_READ)
    seeks = 0
    while True:
        found = await engine.range(position, end, read)
        index = 0
        while index < len(found) and len(entries) < limit and room > 0:
            key, value, _ = found[index]
            slash = -1 if recursive else key.find(b"/", prefix_end)
            if slash < 0:
                entries.append(file_entry(key[2:].decode(), value))
                position = key + b"\0"
                index += 1
            else:
                folder = key[: slash + 1]
                entries.append(FileEntry(name=folder[2:].decode(), folder=True))
                position = end_of(folder)
                index = bisect_left(found, position, index + 1, key=_key)
                seeks += 1
            room -= len(key)
        if len(entries) == limit or room <= 0:
            more = index < len(found) or await engine.range(position, end, 1)
            return Page(tuple(entries), entries[-1].name if more else "")
        if len(found) < read:
            return Page(tuple(entries), "")
        grown = _SEEKING_READ if entries[-1].folder else min(read * 4, _MOST_READ)
        read = min(grown, limit - len(entries))
        if seeks >= _SEEKS_PER_YIELD:
            seeks = 0
            await trio.lowlevel.checkpoint()


async def find_names(engine: Engine, pattern: str, after: str, limit: int) -> Page:
    """Return the matches among the next names after `after`; a page may be empty and not the last."""
    glob = Glob(pattern)
    position = _start_key(glob.prefix, after, recursive=True)
    end = end_of(NAMES + glob.prefix.encode())
    entries: list[FileEntry] = []
    room = PAGE_NAME_BYTES
    names_left = FIND_NAMES
    characters_left = FIND_CHARACTERS
    name = after
    while names_left > 0 and characters_left > 0:
        read = min(_FIND_READ, names_left)
        found = await engine.range(position, end, read)
        for key, value, _ in found:
            name = key[2:].decode()
            if glob.matches(name):
                entries.append(file_entry(name, value))
                room -= len(key)
            names_left -= 1
            characters_left -= len(name)
            if len(entries) == limit or room <= 0 or characters_left <= 0:
                return Page(tuple(entries), name)
        if len(found) < read:
            return Page(tuple(entries), "")
        position = found[-1].key + b"\0"
        await trio.lowlevel.checkpoint()
    return Page(tuple(entries), name)
