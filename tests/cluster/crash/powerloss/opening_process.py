"""A process that opens a pool's folder and a catalogue after a crash, and closes both, to be traced.

python opening_process.py POOL-FOLDER CATALOGUE-FILE
"""

import os
import sys
from pathlib import Path

import trio

from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.daemon import system_runtime
from droppexd.store.disk import open_disk_store


class Entropy:
    def token(self, size_bytes):
        return os.urandom(size_bytes)

    def uniform(self, low, high):
        return (low + high) / 2


async def main(pool, catalogue):
    open_disk_store(pool, entropy=Entropy(), ballast_bytes=0).close()
    async with open_sqlite_engine(catalogue, system_runtime()):
        pass


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
