"""Uploads that can be gone on with: versions without a name, until they are committed or given up."""

from dataclasses import replace
from unittest import mock

import pytest
import trio

from droppexd.catalog import uploads
from droppexd.catalog.checking import check_catalogue
from droppexd.catalog.copies import open_stopped_catalogue
from droppexd.catalog.sqlite import open_sqlite_engine
from droppexd.errors import Conflict, InvalidRequest, NotFound
from droppexd.model import Extent, ExtentId, Layout, UploadRecord, Version, VersionId
from tests.unit.test_catalog_catalogue import ABSENT, ANYTHING, RUNTIME, App, open_app, story

CHUNK = 4096
FULL = CHUNK * 64


class Upload:
    """One upload of an app."""

    def __init__(self, app, name="f/big", size=3 * FULL + 10):
        self.app = app
        self.record = UploadRecord(
            version=VersionId(app.session, app.next()),
            name=name,
            source=b"here",
            size=size,
            chunk_size=CHUNK,
            holder=app.operation(),
        )
        self.extents = []

    def extent(self, size=FULL, pools=(1, 2, 3), **fields):
        return Extent(
            id=ExtentId(self.app.session, self.app.next()),
            layout=Layout(2, 1),
            size=size,
            chunk_size=CHUNK,
            pools=pools,
            **fields,
        )

    async def extend(self, extent=None, operation=None, **fields):
        extent = extent or self.extent()
        upload = replace(self.record, **fields)
        digest = bytes([upload.extents]) * 32
        await self.app.catalogue.extend_upload(operation or self.app.operation(), upload, extent, digest)
        self.record = replace(self.record, extents=self.record.extents + 1)
        self.extents.append(extent)

    async def commit(self, rest, expected=ABSENT, operation=None, holder=None, **fields):
        extents = [*self.extents, *rest]
        version = Version(
            id=self.record.version,
            size=sum(extent.size for extent in extents),
            blake3=b"b" * 32,
            extents=tuple(extent.id for extent in extents),
            metadata=(("k", "v"),),
        )
        return await self.app.catalogue.commit_upload(
            operation or self.app.operation(),
            self.record.name,
            expected,
            replace(version, **fields),
            rest,
            "",
            holder or self.record.holder,
        )


@story
async def test_an_upload_grows_and_becomes_a_file(app):
    upload = Upload(app)
    await upload.extend()
    operation, extent = app.operation(), upload.extent(pools=(4, 5, 6))
    await app.catalogue.extend_upload(operation, upload.record, extent, b"\1" * 32)
    await upload.extend(extent, operation)  # Asked again, it is the same answer.
    assert await app.catalogue.upload_digests(upload.record.version) == (bytes(32), b"\1" * 32)
    (listed,) = app.catalogue.uploads.values()
    assert (listed.extents, listed.name, listed.touched_ms) == (2, "f/big", 1_700_000_000_000)
    assert app.catalogue.totals[:3] == (0, 2 * FULL, 2)
    with pytest.raises(NotFound):
        await app.catalogue.lookup("f/big")
    rest = [upload.extent(), upload.extent(size=10)]
    operation = app.operation()
    receipts = [await upload.commit(rest, operation=operation) for _ in range(2)]
    assert receipts[0] == receipts[1]
    assert (receipts[0].size, receipts[0].survives_pools) == (3 * FULL + 10, 1)
    found = await app.catalogue.lookup("f/big")
    assert found.extents == (*upload.extents, *rest)
    assert (found.version.names, found.version.metadata) == (1, (("k", "v"),))
    assert app.catalogue.uploads == {}
    assert await app.catalogue.upload_digests(upload.record.version) == ()
    assert app.catalogue.totals[:3] == (1, 3 * FULL + 10, 4)
    (count,) = await app.catalogue.survival(())
    assert (count.files, count.extents) == (1, 4)
    await app.catalogue.remove(app.operation(), "f/big", ANYTHING)
    assert app.catalogue.totals[:4] == (0, 0, 0, 4)


@story
async def test_a_file_of_one_noted_extent_counts_as_one(app):
    upload = Upload(app)
    await upload.extend()
    await upload.commit([])
    (count,) = await app.catalogue.survival(())
    assert (count.files, count.extents) == (1, 1)
    await app.catalogue.remove(app.operation(), "f/big", ANYTHING)
    assert not any(one.files or one.extents for one in await app.catalogue.survival(()))


@story
async def test_who_takes_an_upload_over_keeps_its_first_extents_and_shuts_the_other_out(app):
    upload = Upload(app)
    for _ in range(3):
        await upload.extend()
    version = upload.record.version
    later = App(app.catalogue, await app.catalogue.open_session("tcp://127.0.0.1:2", bytes(16)))
    operation = later.operation()
    for _ in range(2):
        found = await app.catalogue.take_upload(operation, version, 2)
    assert found.extents == tuple(upload.extents[:2])
    assert await app.catalogue.upload_digests(version) == (bytes(32), b"\1" * 32)
    assert app.catalogue.totals.garbage == 1
    with pytest.raises(Conflict, match="taken this upload over"):
        await upload.extend()
    with pytest.raises(Conflict, match="taken this upload over"):
        await upload.commit([upload.extent()])
    upload.app, upload.extents = later, upload.extents[:2]
    upload.record = replace(upload.record, holder=operation, extents=2)
    await upload.extend()
    await upload.commit([upload.extent(size=5)])
    assert len((await app.catalogue.lookup("f/big")).extents) == 4


@story
async def test_extents_that_do_not_belong_there_are_refused(app):
    upload = Upload(app)
    with pytest.raises(InvalidRequest, match="not full"):
        await upload.extend(upload.extent(size=FULL - 1))
    with pytest.raises(InvalidRequest, match="not made in session"):
        await upload.extend(version=VersionId(app.session + 1, 3))
    with pytest.raises(Conflict, match="was given up"):
        await upload.extend(extents=1)
    await upload.extend()
    with pytest.raises(InvalidRequest, match="used before"):
        await upload.extend(upload.extents[0])
    with pytest.raises(InvalidRequest, match="was used before"):
        await upload.extend(extents=0)
    with pytest.raises(Conflict, match="has 1 extents by now"):
        await upload.extend(extents=2)
    with pytest.raises(InvalidRequest, match="made in session"):
        await upload.commit([replace(upload.extent(size=5), id=ExtentId(app.session + 1, 9))])
    with pytest.raises(Conflict, match="other extents"):
        await upload.commit([upload.extent()], extents=(upload.extents[0].id,))
    with pytest.raises(InvalidRequest, match="bytes and its extents"):
        await upload.commit([upload.extent(size=5)], size=7)
    with pytest.raises(InvalidRequest, match="has 1 extents, not 2"):
        await app.catalogue.take_upload(app.operation(), upload.record.version, 2)
    with pytest.raises(NotFound):
        await app.catalogue.take_upload(app.operation(), VersionId(7, 7), 1)
    await app.put("f/big")
    with pytest.raises(Conflict, match="exists already"):
        await upload.commit([])
    assert (await upload.commit([], ANYTHING)).replaced


@story
async def test_uploads_are_given_up_when_nothing_came_since(app):
    upload = Upload(app)
    for _ in range(2):
        await upload.extend()
    version = upload.record.version
    assert not await app.catalogue.drop_upload(version, 1_700_000_000_000)
    assert await app.catalogue.drop_upload(version, 1_700_000_000_001)
    assert app.catalogue.uploads == {}
    assert app.catalogue.totals[:4] == (0, 0, 0, 2)
    with pytest.raises(NotFound):
        await app.catalogue.drop_upload(version)
    with pytest.raises(Conflict, match="given up"):
        await upload.extend()


@story
async def test_there_are_not_more_uploads_than_the_master_remembers(app):
    with mock.patch.object(uploads, "MAX_UPLOADS", 1):
        await Upload(app).extend()
        with pytest.raises(Conflict, match="droppex uploads"):
            await Upload(app, "f/other").extend()


def test_a_catalogue_with_uploads_is_sound_and_opens_again(tmp_path):
    path = tmp_path / "catalogue.sqlite"
    runtime = replace(RUNTIME, run_blocking=trio.to_thread.run_sync)

    async def write():
        async with open_sqlite_engine(path, runtime) as engine, open_app(engine) as app:
            upload = Upload(app)
            await upload.extend()
            await upload.extend()
            await app.put("f/a")

    async def read():
        async with open_sqlite_engine(path, runtime) as engine, open_app(engine) as app:
            (upload,) = app.catalogue.uploads.values()
            assert (upload.extents, upload.source) == (2, b"here")

    for story_of in (write, read):
        trio.run(story_of)
    with open_stopped_catalogue(path) as connection:
        report = check_catalogue(connection, lambda _done, _total: None)
    assert report.problems == []
    assert report.records["uploads"] == 1
