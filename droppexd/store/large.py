"""Large shards: one file each, `large/FF/EXTENT-INDEX`, below 256 folders chosen by a hash of the extent.

The name carries the identity, so the folder explains itself and the index can be derived from it. Order
and counting are the index's business (`droppexd.store.index`): names in hashed folders have none, and a
fan-out that keeps order would put all of one upload into one folder.

A file is opened and its header parsed once while it stays among the last OPEN_FILES read.
"""

import errno
import os
import string
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import xxhash

from droppexd.errors import IntegrityError, NoSuchShard, StoreError
from droppexd.model import ExtentId
from droppexd.store.files import Files
from droppexd.store.header_file import BLOCK_BYTES, decode_block

OPEN_FILES = 128

_FAN_OUT = 256
_EXTENT_HEX = 24
_KEY_HEX = 26
_LOWER_HEX = frozenset(string.hexdigits.lower())


class OpenShard:
    """An open shard file. Its descriptor is closed when the last reader lets go of the object.

    So dropping a shard never closes a descriptor under a reader, and reading takes no lock for it.
    """

    __slots__ = ("_fd", "_ranges", "generation", "header")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            block = os.pread(fd, BLOCK_BYTES, 0)
        except OSError as error:
            raise IntegrityError(f"cannot read the shard's header: {error}") from error
        self.header, self.generation = decode_block(block)
        self._ranges = tuple(self.header.piece_range(chunk) for chunk in range(len(self.header.checksums)))

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, chunk: int) -> tuple[bytes, bytes]:
        """Return piece and checksum of a chunk."""
        if not 0 <= chunk < len(self._ranges):
            raise NoSuchShard(f"the shard has {len(self._ranges)} chunks, no chunk {chunk}")
        offset, length = self._ranges[chunk]
        try:
            piece = os.pread(self._fd, length, BLOCK_BYTES + offset)
        except OSError as error:
            raise IntegrityError(f"cannot read piece {chunk}: {error}") from error
        if len(piece) != length:
            raise IntegrityError(f"the shard's file ends within piece {chunk}")
        return piece, self.header.checksums[chunk]


class Remains:
    """A descriptor of a file that has lost its name, to be closed outside of locks.

    The system frees the blocks with the last descriptor, which takes up to 17 ms for 64 MiB on a disk.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # Missing, or no descriptor to be had: then unlinking frees the blocks at once.

    def close(self) -> None:
        """Let the blocks go. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LargeShards:
    """The files of large shards. Thread-safe; that no two add the same identity is the index's care."""

    def __init__(self, folder: Path, *, files: Files) -> None:
        self._root = str(folder / "large")
        self._incoming = str(folder / "incoming")
        self._files = files
        self._open: OrderedDict[bytes, OpenShard] = OrderedDict()
        self._open_lock = threading.Lock()
        self._removals = 0
        self._begun = 0

    def prepare(self) -> None:
        """Create the folders that are missing, and forget what was never finished. Raise OSError.

        Their names are flushed at each start: an earlier one may have been killed between making a folder
        and flushing it.
        """
        root, incoming = Path(self._root), Path(self._incoming)
        root.mkdir(exist_ok=True)
        incoming.mkdir(exist_ok=True)
        self._files.fsync_folder(str(root.parent))
        present = {entry.name for entry in root.iterdir()}
        for name in (f"{number:02x}" for number in range(_FAN_OUT)):
            if name not in present:
                (root / name).mkdir()
        self._files.fsync_folder(self._root)
        for entry in incoming.iterdir():
            self._files.unlink(str(entry))

    def keys(self) -> Iterator[bytes]:
        """Yield the key of every file, folder by folder. Other names are left alone."""
        for number in range(_FAN_OUT):
            with os.scandir(f"{self._root}/{number:02x}") as entries:
                for entry in entries:
                    extent, dash, index = entry.name.partition("-")
                    text = extent + index
                    if (
                        dash
                        and len(extent) == _EXTENT_HEX
                        and len(text) == _KEY_HEX
                        and set(text) <= _LOWER_HEX
                    ):
                        yield bytes.fromhex(text)

    def incoming_path(self) -> str:
        """Return a new name for a shard on its way in."""
        with self._open_lock:
            self._begun += 1
            return f"{self._incoming}/{self._begun}"

    def folder_of(self, key: bytes) -> str:
        """Return the folder that a shard's file is in."""
        return f"{self._root}/{xxhash.xxh32_intdigest(key[:-1]) % _FAN_OUT:02x}"

    def _path(self, key: bytes) -> str:
        return f"{self.folder_of(key)}/{key[:-1].hex()}-{key[-1]:02x}"

    def place(self, key: bytes, incoming: str) -> None:
        """Give a finished file its name; the caller flushes the folder. Raise OSError.

        Raise StoreError rather than replace a file: one that the index does not know is never ours to lose.
        """
        path = self._path(key)
        if os.path.lexists(path):
            raise StoreError(f"{path} is in the way, and the index does not know it: restart the pool")
        self._files.rename(incoming, path)

    def replace(self, key: bytes, incoming: str) -> None:
        """Put a finished file in the place of the one that is there; the caller flushes the folder.

        Raise OSError.
        """
        self._files.rename(incoming, self._path(key))
        with self._open_lock:
            self._removals += 1
            self._open.pop(key, None)

    def withdraw(self, key: bytes) -> None:
        """Take a file back that was placed and then not committed."""
        with suppress(OSError), self.remove(key):
            pass

    def remove(self, key: bytes) -> "Remains":
        """Remove a file; the caller flushes the folder and closes what is left of it. Raise OSError."""
        path = self._path(key)
        remains = Remains(path)
        try:
            self._files.unlink(path)
        except OSError:
            remains.close()
            raise
        finally:
            with self._open_lock:
                self._removals += 1
                self._open.pop(key, None)
        return remains

    def opened(self, key: bytes) -> OpenShard | None:
        """Return the shard if its file is open already."""
        with self._open_lock:
            shard = self._open.get(key)
            if shard is not None:
                self._open.move_to_end(key)
        return shard

    def open(self, key: bytes) -> OpenShard:
        """Open a shard's file and keep it open for the next reads.

        Raise NoSuchShard, IntegrityError when the header is damaged, StoreError.
        """
        removals = self._removals
        shard = self.examine(key)
        evicted = None
        with self._open_lock:
            # A removal since then may have been this shard's: what was opened may be gone.
            if self._removals == removals:
                self._open[key] = shard
                if len(self._open) > OPEN_FILES:
                    evicted = self._open.popitem(last=False)
        del evicted  # Closed outside the lock.
        return shard

    def examine(self, key: bytes) -> OpenShard:
        """Open a shard's file apart from those kept open; raise as `open` does."""
        shard = self._open_file(key)
        header = shard.header
        if header.extent.to_bytes() != key[:-1] or header.index != key[-1]:
            raise IntegrityError(f"{self._path(key)} holds shard {header.index} of extent {header.extent}")
        return shard

    def generation(self, key: bytes) -> int | None:
        """Return the generation that a file says it has; None when its header is damaged."""
        try:
            return self._open_file(key).generation
        except (IntegrityError, NoSuchShard):
            return None

    def close(self) -> None:
        """Close the files that no one is reading."""
        with self._open_lock:
            self._removals += 1
            self._open.clear()

    def discard(self, incoming: str) -> None:
        """Remove a shard that was not finished. What cannot be removed goes at the next start."""
        with suppress(OSError):
            self._files.unlink(incoming)

    def _open_file(self, key: bytes) -> OpenShard:
        path = self._path(key)
        try:
            return OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise NoSuchShard(f"no shard {key[-1]} of extent {ExtentId.from_bytes(key[:-1])}") from None
        except OSError as error:
            if error.errno == errno.EIO:
                raise IntegrityError(f"{path} cannot be read from the disk: {error.strerror}") from error
            raise StoreError(f"cannot open {path}: {error}") from error
