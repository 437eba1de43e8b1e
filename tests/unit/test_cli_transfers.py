"""A put is told and metered; a get follows a name that is replaced meanwhile."""

import io
import os
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
from blake3 import blake3
from trio.testing import MockClock

from droppexd.cli.client_arguments import WHOLE, ByteRange, Upload
from droppexd.cli.client_session import Session
from droppexd.cli.client_transfers import GetOptions, PutOptions, get, put
from droppexd.cli.render import Output
from droppexd.errors import (
    Conflict,
    IntegrityError,
    NotAuthorised,
    NotEnoughShards,
    PeerError,
    StaleRead,
)
from droppexd.model import Receipt, VersionId

CONTENT = b"content" * 1000


def receipt_of(name, data):
    return Receipt(
        name=name,
        version=VersionId(1, 1),
        size=len(data),
        blake3=blake3(data).digest(),
        layout="1+2",
        survives_pools=2,
        survives_machines=0,
    )


class FakeClient:
    """A cluster of one dictionary that fails as it is told."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.files = {}
        self.attempts = 0
        self.progress = 0

    async def put_file(
        self, name, source, *, size, condition, layout, metadata, progress, on_again, origin, on_resume
    ):
        self.attempts += 1
        await trio.lowlevel.checkpoint()
        data = source.read(10_000_000)
        assert size == len(data)
        progress(len(data))
        failure = self.failures.pop(0) if self.failures else None
        if condition.absent and name in self.files:
            raise Conflict(f"{name} exists")
        if failure is not None:
            raise failure
        self.files[name] = data
        return receipt_of(name, data)

    async def describe(self, name):
        await trio.lowlevel.checkpoint()
        return SimpleNamespace(size=len(self.files[name]), version=VersionId(1, 1))

    @asynccontextmanager
    async def open_read(self, name, *, start=0, length=None, version=None):
        await trio.lowlevel.checkpoint()
        data = self.files[name][start:]
        data = data if length is None else data[:length]
        client = self

        class Read:
            info = SimpleNamespace(
                version=VersionId(1, 1), blake3=blake3(data).digest(), metadata=(("mtime", "7"),)
            )
            rebuilt_parts = 3
            length = len(data)

            async def write_to(self, target, progress):
                target.write(data)
                progress(len(data))
                await trio.lowlevel.checkpoint()
                if client.failures:
                    raise client.failures.pop(0)

        yield Read()


def run(function, client, *args):
    stdout, stderr = io.StringIO(), io.StringIO()
    session = Session(client, Output(quiet=False, as_json=False, stdout=stdout, stderr=stderr))

    async def main():
        return await function(session, *args)

    return trio.run(main, clock=MockClock(autojump_threshold=0)), stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "local"
    path.write_bytes(CONTENT)
    return str(path)


def put_it(client, path, **options):
    return run(put, client, [Upload(path, "docs/a")], PutOptions(**options))


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (NotAuthorised("no"), 1),
        (IntegrityError("changed"), 1),
        (Conflict("exists"), 4),
        (PeerError("lost"), 6),
    ],
)
def test_a_put_that_failed_ends_with_the_code_of_its_error(local, failure, code):
    client = FakeClient(failure)
    assert put_it(client, local)[0] == code
    assert client.attempts == 1


def test_a_put_that_begins_anew_is_metered_from_its_beginning(local):
    class Restarted(FakeClient):
        async def put_file(self, name, source, *, progress, on_again, **options):
            progress(100)
            on_again()
            return await super().put_file(name, source, progress=progress, on_again=on_again, **options)

    client = Restarted()
    code, stdout, _ = put_it(client, local)
    assert (code, client.files) == (0, {"docs/a": CONTENT})
    assert "stored docs/a" in stdout


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    client = FakeClient(PeerError("lost"))

    async def put_file(name, source, *, size, progress, **options):
        client.attempts += 1
        raise PeerError("lost")

    client.put_file = put_file
    writer = os.open(path, os.O_RDWR)
    try:
        assert put_it(client, str(path))[0] == 6
    finally:
        os.close(writer)
    assert client.attempts == 1


def test_a_name_that_is_replaced_while_it_is_read_is_read_again(tmp_path):
    client = FakeClient(StaleRead("gone"))
    client.files["docs/a"] = CONTENT
    target = tmp_path / "out"
    code, stdout, _ = run(get, client, "docs/a", str(target), GetOptions())
    assert code == 0
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mtime == 7
    assert "3 chunks rebuilt" in stdout


@pytest.mark.parametrize("failure", [IntegrityError("wrong"), NotEnoughShards("few"), PeerError("lost")])
def test_a_get_that_fails_leaves_nothing(tmp_path, failure):
    client = FakeClient(failure)
    client.files["docs/a"] = CONTENT
    with pytest.raises(type(failure)):
        run(get, client, "docs/a", str(tmp_path / "out"), GetOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (WHOLE, CONTENT),
        (ByteRange(3, 4), CONTENT[3:7]),
        (ByteRange(6990, None), CONTENT[6990:]),
        (ByteRange(0, 5, from_end=True), CONTENT[-5:]),
        (ByteRange(0, 10**9, from_end=True), CONTENT),
    ],
)
def test_parts_of_a_file(tmp_path, part, wanted):
    client = FakeClient()
    client.files["docs/a"] = CONTENT
    run(get, client, "docs/a", str(tmp_path / "out"), GetOptions(part=part))
    assert (tmp_path / "out").read_bytes() == wanted


def test_a_put_says_where_its_bytes_come_from_and_what_is_stored_already(local):
    class Interrupted(FakeClient):
        async def put_file(self, name, source, *, origin, on_resume, **options):
            self.origins = [*getattr(self, "origins", ()), origin]
            on_resume(5)
            return await super().put_file(name, source, origin=origin, on_resume=on_resume, **options)

    client = Interrupted()
    assert "going on with an earlier put: 5 B are stored already" in put_it(client, local)[2]
    put_it(client, local, force=True)
    assert client.origins[0] == client.origins[1] != b""
