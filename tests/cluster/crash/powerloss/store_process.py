"""A process with a store that dies where it is told to, to be traced.

    python store_process.py FOLDER NOTES HOW

HOW is `writes-and-dies`: after a small shard was written, before it is flushed; `dies-among-new-folders`:
after they were made, before they are flushed; `stores`: a small shard and a large one, noted and then no more;
`replaces`: the same, and then each is damaged and replaced by a whole large one.
"""

import json
import os
import random
import sys
from pathlib import Path

from droppexd.coding.chunks import piece_checksum
from droppexd.model import ExtentId, Layout, ShardHeader, VersionId
from droppexd.store.disk import open_disk_store
from droppexd.store.files import Files

LAYOUT = Layout(1, 1)
CHUNK_SIZE = 256 * 1024


class Entropy:
    def token(self, size_bytes):
        return os.urandom(size_bytes)

    def uniform(self, low, high):
        return (low + high) / 2


class DiesAmongNewFolders(Files):
    def fsync_folder(self, path):
        if path.endswith("/large"):
            os._exit(0)
        super().fsync_folder(path)


def shard(counter, size):
    extent = ExtentId(1, counter)
    piece = random.Random(counter).randbytes(size)
    checksum = piece_checksum(extent, LAYOUT, 0, 0, piece)
    header = ShardHeader(
        incarnation=bytes(16),
        extent=extent,
        index=0,
        layout=LAYOUT,
        size=size,
        chunk_size=CHUNK_SIZE,
        checksums=(checksum,),
        version=VersionId(1, 1),
        name="",
    )
    return header, piece


def main(folder, notes, how):
    files = DiesAmongNewFolders() if how == "dies-among-new-folders" else Files()
    store = open_disk_store(folder, entropy=Entropy(), ballast_bytes=0, files=files)
    small, large = shard(1, 5000), shard(2, 150_000)
    if how == "writes-and-dies":
        store._index._writer.execute("PRAGMA synchronous = OFF")
        store.put_small([small])
        os._exit(0)
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(header, generation):
        fields = {
            "extent": str(header.extent),
            "index": header.index,
            "chunk": 0,
            "checksum": header.checksums[0].hex(),
            "generation": generation,
        }
        os.write(descriptor, (json.dumps(["WritePiece", fields]) + "\n").encode())

    note(small[0], *store.put_small([small]))
    note(large[0], put_large(store, large))
    if how == "replaces":
        damage_large(folder)
        store._index._writer.execute("UPDATE small SET piece = zeroblob(5000)")
        for one in (small, large):
            (held,) = store.find([one[0].extent])
            note(one[0], put_large(store, one, replacing=held.generation))
    os._exit(0)


def put_large(store, shard, replacing=0):
    header, piece = shard
    writer = store.begin(0)
    writer.write(0, piece)
    return writer.finish(header, replacing=replacing)


def damage_large(folder):
    (path,) = folder.glob("large/*/*")
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, bytes(1000), 8192)
    os.fsync(descriptor)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
