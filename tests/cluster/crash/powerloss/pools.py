"""A pool's folder after a crash: opened by the real store, and everything in it read and verified."""

import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from droppexd.coding.chunks import piece_checksum
from droppexd.errors import DroppexError
from droppexd.store.disk import open_disk_store
from droppexd.store.files import Files

_PAGE = 1000
_SHARED_MEMORY = "-shm"


class Entropy:
    def __init__(self, seed):
        self._random = random.Random(seed)

    def token(self, size_bytes):
        return self._random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


class HastyFiles(Files):
    """The machine that runs the test keeps its power."""

    def fdatasync(self, fd):
        pass

    def fsync_folder(self, path):
        pass


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that was found whole."""

    generation: int
    checksums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """What a store says of a folder."""

    pool_id: str
    cluster_id: str
    boot_id_before: str
    shards: dict[tuple[str, int], Shard]
    broken: dict[tuple[str, int], str]
    """Why those are not whole that are held and not whole."""


class Scratch:
    """A folder that is made to look like one image after another; in memory where that can be."""

    def __init__(self):
        memory = Path("/dev/shm")
        self._kept = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self._folder = Path(self._kept.name) / "data"
        self._folder.mkdir()

    def fill(self, image):
        """Return the folder with exactly this image in it.

        What SQLite maps as shared memory is never flushed and never trusted: it holds anything.
        """
        missing = set(image.folders)
        for where, folders, files in os.walk(self._folder, topdown=False):
            here = Path(where)
            for name in files:
                (here / name).unlink()
            prefix = where[len(str(self._folder)) + 1 :]
            for name in folders:
                path = f"{prefix}/{name}" if prefix else name
                if path in missing:
                    missing.remove(path)
                else:
                    (here / name).rmdir()
        for path in sorted(missing):
            (self._folder / path).mkdir()
        noise = random.Random(len(image.files))
        for path, data in image.files.items():
            is_shared_memory = path.endswith(_SHARED_MEMORY)
            (self._folder / path).write_bytes(noise.randbytes(len(data)) if is_shared_memory else data)
        return self._folder

    def close(self):
        self._kept.cleanup()


def open_pool(folder):
    """Return what the store finds, or the error with which it refuses the folder."""
    try:
        store = open_disk_store(folder, entropy=Entropy(1), ballast_bytes=0, files=HastyFiles())
    except DroppexError as error:
        return error
    try:
        return _read(store)
    finally:
        store.close()


def _read(store):
    identity = store.identity
    shards, broken = {}, {}
    after = None
    while holdings := store.page(after, _PAGE):
        for holding in holdings:
            key = str(holding.extent), holding.shard
            try:
                shards[key] = Shard(holding.generation, _verified(store, holding))
            except (DroppexError, AssertionError) as error:
                broken[key] = str(error)
        after = holdings[-1].extent, holdings[-1].shard
    return Pool(
        identity.pool_id.hex(),
        identity.cluster_id.hex(),
        identity.previous_boot_id.hex(),
        shards,
        broken,
    )


def _verified(store, holding):
    stored = store.examine(holding.extent, holding.shard)
    assert stored.generation == holding.generation, f"listed as generation {holding.generation}"
    header = store.header(holding.extent, holding.shard)
    for chunk, expected in enumerate(header.checksums):
        piece, checksum = store.read(holding.extent, holding.shard, chunk)
        found = piece_checksum(holding.extent, header.layout, holding.shard, chunk, piece)
        assert found == checksum == expected, f"piece {chunk} is not what its checksum says"
    return tuple(checksum.hex() for checksum in header.checksums)
