"""The page for after a power cut quotes what pools and controllers really say when they refuse to start."""

import os
from pathlib import Path

import pytest
import trio

from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.model import ExtentId, Layout, ShardHeader, VersionId
from droppexd.store.disk import open_disk_store

PAGE = (Path(__file__).parents[2] / "docs" / "operations" / "after-a-power-cut.md").read_text()


class Entropy:
    def token(self, size_bytes):
        return os.urandom(size_bytes)

    def uniform(self, low, high):
        return (low + high) / 2


@pytest.fixture
def pool(tmp_path):
    """A pool folder with a small shard."""
    store = open_disk_store(tmp_path, entropy=Entropy(), ballast_bytes=0)
    header = ShardHeader(
        incarnation=bytes(16),
        extent=ExtentId(1, 1),
        index=0,
        layout=Layout(1, 1),
        size=1,
        chunk_size=1,
        checksums=(bytes(16),),
        version=VersionId(1, 1),
        name="",
    )
    store.put_small([(header, b"x")])
    store.close()
    return tmp_path


def remove(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b"no longer what it was" * 300)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("pool.json", remove),
        ("pool.json", overwrite),
        ("boot.json", remove),
        ("boot.json", overwrite),
        ("index.db", remove),
        ("index.db", overwrite),
    ],
)
def test_what_a_pool_says_stands_there(pool, name, harm):
    harm(pool / name)
    with pytest.raises(DroppexError) as caught:
        open_disk_store(pool, entropy=Entropy(), ballast_bytes=0)
    assert f"`{caught.value}`".replace(str(pool), "/srv/droppex/pool") in PAGE


def test_what_a_controller_says_stands_there(tmp_path):
    path = tmp_path / "catalogue.sqlite"

    async def open_it():
        async with open_sqlite_engine(path, system_runtime()):
            pass

    trio.run(open_it)
    overwrite(path)
    with pytest.raises(DroppexError) as caught:
        trio.run(open_it)
    before, after = str(caught.value).split("file is not a database.")
    assert f"`{before}…{after}`".replace(str(tmp_path), "/srv/droppex/controller") in PAGE
