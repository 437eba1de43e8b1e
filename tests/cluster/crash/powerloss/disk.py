"""What a file system may hold after the power went, as far as POSIX and Linux promise anything.

The promises that the model keeps, and nothing beyond them:

* What was written to a file (its bytes and its length) is safe once an fsync or fdatasync of that file has
  returned that began after the write had returned. POSIX, fsync and fdatasync: "synchronized I/O completion".
  sync_file_range, fallocate and O_CREAT promise nothing.
* A name (made, renamed, removed) is safe once an fsync of *its folder* has returned that began after the call.
  Linux, fsync(2): "Calling fsync() does not necessarily ensure that the entry in the directory containing the
  file has also reached disk." That holds for a folder in its parent as well.
* Everything else may be there or not, in any combination: file systems differ in what they keep in order
  (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, table 1). ext4 commits names in order and
  with its default data=ordered writes data before the length that covers it; XFS, btrfs and ext4 with
  data=writeback do less. So unflushed names are dropped and kept both in their order and in any order.
* A rename puts the new name in place at once, and never loses both. The old name may linger.
* Unflushed bytes reach the disk by sectors of 512 bytes, each whole: each holds what one of the writes left
  there, no older than the last flush. (The page cache has one newest content, so a later write never reaches a
  sector without the earlier ones.) The length is that of one of these moments. Where it covers a sector that
  was never written there are zeros, or what was on the disk before. Only a cut of the length is whole or not
  there at all, and nothing that came after it is there without it: journals record it as one change.
* A flush that returned an error promises nothing, not even the next one (Rebello et al., "Can Applications
  Recover from fsync Failures?", ATC 2020). Recordings have none: the stores stop at the first.
"""

import bisect
import itertools
from dataclasses import dataclass

import xxhash

SECTOR = 512
ROOT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Something asked of the disk, and when, in nanoseconds."""

    began: int
    ended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Operation):
    """Bytes into a file."""

    inode: int
    offset: int
    data: bytes

    def length_after(self, length):
        return max(length, self.offset + len(self.data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize(Operation):
    """Another length for a file; with `only_grow` (fallocate) never a smaller one."""

    inode: int
    length: int
    only_grow: bool = False

    def length_after(self, length):
        return max(length, self.length) if self.only_grow else self.length


@dataclass(frozen=True, slots=True)
class Change:
    """A name in a folder that stands for an inode from now on, or with None for nothing."""

    folder: int
    name: str
    inode: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming(Operation):
    """A name made or removed; or both, by a rename, the new name first."""

    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush(Operation):
    """An fsync or fdatasync that returned success, of a file or a folder."""

    inode: int


class Image:
    """A tree of folders and files: path to bytes, and the folders."""

    def __init__(self, folders, files):
        self.folders = folders
        self.files = files

    def below(self, name):
        """Return the part of the tree below a folder, as a tree of its own."""
        prefix = f"{name}/"
        return Image(
            {path.removeprefix(prefix) for path in self.folders if path.startswith(prefix)},
            {path.removeprefix(prefix): data for path, data in self.files.items() if path.startswith(prefix)},
        )

    def write(self, folder):
        """Make the tree real below a folder."""
        for path in sorted(self.folders):
            (folder / path).mkdir()
        for path, data in self.files.items():
            (folder / path).write_bytes(data)

    def digest(self):
        """Return what tells this tree from others."""
        state = xxhash.xxh3_128()
        for path in sorted(self.folders):
            state.update(f"{path}\0".encode())
        for path, data in sorted(self.files.items()):
            state.update(f"{path}\0{len(data)}\0".encode())
            state.update(data)
        return state.digest()


class _Flushes:
    """The flushes of one inode: when is safe what ended then?"""

    def __init__(self, flushes):
        flushes = sorted(flushes, key=lambda flush: flush.began)
        self._began = [flush.began for flush in flushes]
        ends = itertools.accumulate(reversed([flush.ended for flush in flushes]), min)
        self._ended = [*reversed(list(ends)), float("inf")]

    def safe_at(self, ended):
        return self._ended[bisect.bisect_left(self._began, ended)]


class _File:
    """The writes of one file in order, and its content after any number of them."""

    def __init__(self, operations, flushes):
        self.operations = sorted(operations, key=lambda operation: operation.began)
        self._began = [operation.began for operation in self.operations]
        safe = (flushes.safe_at(operation.ended) for operation in self.operations)
        self._safe = list(itertools.accumulate(safe, max))
        self.lengths = [0]
        for operation in self.operations:
            self.lengths.append(operation.length_after(self.lengths[-1]))
        self._contents = {0: b""}

    def safe(self, moment):
        """Return how many of the operations a crash at this moment cannot undo."""
        return bisect.bisect_right(self._safe, moment)

    def begun(self, moment):
        """Return how many of them may have reached the disk by then."""
        return bisect.bisect_right(self._began, moment)

    def content(self, count):
        """Return the bytes after so many operations."""
        if count not in self._contents:
            nearest = max(known for known in self._contents if known < count)
            content = bytearray(self._contents[nearest])
            for operation in self.operations[nearest:count]:
                apply(content, operation)
            while len(self._contents) > 4:  # Moments are asked for in their order, as a rule.
                del self._contents[min(known for known in self._contents if known)]
            self._contents[count] = bytes(content)
        return self._contents[count]


def apply(content, operation):
    """Do to the bytes of a file what an operation does."""
    length = operation.length_after(len(content))
    del content[length:]
    content.extend(bytes(length - len(content)))
    if isinstance(operation, Write):
        content[operation.offset : operation.offset + len(operation.data)] = operation.data


class Disk:
    """All that was asked of a file system; gives what may be left of it after a crash at any moment."""

    def __init__(self, operations, folders):
        """Take operations in any order, and which inodes are folders (ROOT is one, and always there)."""
        self._folders = folders
        self.namings = sorted(
            (operation for operation in operations if isinstance(operation, Naming)),
            key=lambda naming: naming.began,
        )
        flushes = {}
        writes = {}
        for operation in operations:
            if isinstance(operation, Flush):
                flushes.setdefault(operation.inode, []).append(operation)
            elif not isinstance(operation, Naming):
                writes.setdefault(operation.inode, []).append(operation)
        none = _Flushes([])
        flushes = {inode: _Flushes(some) for inode, some in flushes.items()}
        self._files = {inode: _File(some, flushes.get(inode, none)) for inode, some in writes.items()}
        self._empty = _File([], none)
        self._began = [naming.began for naming in self.namings]
        self._safe = [
            tuple(flushes.get(change.folder, none).safe_at(naming.ended) for change in naming.changes)
            for naming in self.namings
        ]

    def after_crash(self, moment, luck):
        """Return what is left when the power goes at `moment`; `luck` decides what was not flushed."""
        return self._walk(self._names(moment, luck), moment, luck)

    def _names(self, moment, luck):
        begun = bisect.bisect_right(self._began, moment)
        open_ones = [number for number in range(begun) if any(safe > moment for safe in self._safe[number])]
        kept = dict(zip(open_ones, luck.names([self.namings[number] for number in open_ones]), strict=True))
        tree = {}
        for number in range(begun):
            changes = self.namings[number].changes
            keep = [
                safe <= moment or chosen
                for safe, chosen in zip(
                    self._safe[number], kept.get(number, (True,) * len(changes)), strict=True
                )
            ]
            keep[0] = any(keep)  # A rename never loses both names.
            for change, is_kept in zip(changes, keep, strict=True):
                if is_kept:
                    tree.setdefault(change.folder, {})[change.name] = change.inode
        return tree

    def _walk(self, tree, moment, luck):
        folders, files = set(), {}
        contents = {}
        ahead = [("", ROOT)]
        while ahead:
            prefix, folder = ahead.pop()
            for name, inode in sorted(tree.get(folder, {}).items()):
                path = prefix + name
                if inode is None:
                    continue
                if inode in self._folders:
                    folders.add(path)
                    ahead.append((f"{path}/", inode))
                    continue
                if inode not in contents:
                    file = self._files.get(inode, self._empty)
                    contents[inode] = luck.content(file, file.safe(moment), file.begun(moment))
                files[path] = contents[inode]
        return Image(folders, files)


class AllDropped:
    """Nothing has reached the disk that was not flushed."""

    def names(self, namings):
        return [(False,) * len(naming.changes) for naming in namings]

    def content(self, file, safe, _begun):
        return file.content(safe)


class AllKept:
    """Everything has reached the disk: what a process finds that was killed alone."""

    def names(self, namings):
        return [(True,) * len(naming.changes) for naming in namings]

    def content(self, file, _safe, begun):
        return file.content(begun)


class Mixed:
    """Some of it has reached the disk, as a seeded `random.Random` has it."""

    def __init__(self, random):
        self._random = random

    def names(self, namings):
        if self._random.random() < 0.5:  # As a journal does it: in order, up to somewhere.
            count = self._random.randint(0, len(namings))
            return [(number < count,) * len(naming.changes) for number, naming in enumerate(namings)]
        likely = self._random.choice((0.1, 0.5, 0.9))
        return [tuple(self._random.random() < likely for _ in naming.changes) for naming in namings]

    def content(self, file, safe, begun):
        if safe == begun:
            return file.content(safe)
        manner = self._random.choice((self._whole, self._by_sectors, self._cut, None, None))
        if manner is None:
            return file.content(self._random.choice((safe, begun)))
        begun, shortened = self._until_a_cut(file, safe, begun)
        lengths = file.lengths[safe : begun + 1]
        blank = self._random.randbytes if self._random.random() < 0.5 else bytes
        content = bytearray(file.content(safe))
        content.extend(blank(max(lengths) - len(content)))
        stuck = set()
        for number, operation, sectors in manner(file.operations[safe:begun]):
            if isinstance(operation, Resize):
                shorter = safe + number < shortened and operation.length < len(content)
                if shorter and not operation.only_grow:
                    content[operation.length :] = blank(len(content) - operation.length)
                    stuck = {sector for sector in stuck if sector * SECTOR < operation.length}
                continue
            for kept, sector, start, end in sectors:
                if not kept:
                    stuck.add(sector)
                elif sector not in stuck:
                    data = operation.data[start - operation.offset : end - operation.offset]
                    content[start:end] = data
        lengths = file.lengths[shortened : begun + 1] if shortened else lengths
        length = lengths[-1] if self._random.random() < 0.5 else self._random.choice(lengths)
        return bytes(content[:length])

    def _until_a_cut(self, file, safe, begun):
        """Return how many operations may be there, and the number of the last that cut the file short.

        Nothing that came after a cut is there without it; the cut itself is whole or not at all.
        """
        cuts = [
            number for number in range(safe + 1, begun + 1) if file.lengths[number] < file.lengths[number - 1]
        ]
        kept = self._random.randint(0, len(cuts))
        return (
            cuts[kept] - 1 if kept < len(cuts) else begun,
            cuts[kept - 1] if kept else 0,
        )

    def _whole(self, pending):
        """Each write is there or not."""
        likely = self._random.choice((0.1, 0.5, 0.9))
        for number, operation in enumerate(pending):
            kept = self._random.random() < likely
            yield number, operation, [(kept, *part) for part in _sectors(operation)]

    def _by_sectors(self, pending):
        """Each sector of each write is there or not."""
        likely = self._random.choice((0.1, 0.5, 0.9))
        for number, operation in enumerate(pending):
            yield (
                number,
                operation,
                [(self._random.random() < likely, *part) for part in _sectors(operation)],
            )

    def _cut(self, pending):
        """The writes are there up to somewhere within one of them."""
        last = self._random.randrange(len(pending)) if pending else 0
        for number, operation in enumerate(pending):
            parts = list(_sectors(operation))
            kept = len(parts) if number < last else 0
            if number == last:
                kept = self._random.randint(0, len(parts))
            yield number, operation, [(part < kept, *where) for part, where in enumerate(parts)]


def _sectors(operation):
    """Yield the sectors that a write changes: (sector, from byte, to byte) each."""
    if isinstance(operation, Write):
        start, end = operation.offset, operation.offset + len(operation.data)
        while start < end:
            sector = start // SECTOR
            stop = min(end, (sector + 1) * SECTOR)
            yield sector, start, stop
            start = stop
