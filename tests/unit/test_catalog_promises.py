"""What a controller has promised: kept over a restart, and never read from a file that is no promise."""

import errno

import pytest
import trio

from droppexd.catalog.promises import PROMISE_FILE, FilePromises, Promise
from droppexd.errors import CatalogError, CatalogFull

PROMISE = Promise(7, "south", "tcp://10.0.0.2:7700", (3, 6), ("north",))


def run(main, *args):
    return trio.run(main, *args)


@pytest.fixture
def promises(tmp_path):
    return FilePromises(tmp_path, trio.to_thread.run_sync)


def test_a_promise_is_there_after_it_was_written(promises, tmp_path):
    assert run(promises.read) == Promise()
    run(promises.write, PROMISE)
    assert run(promises.read) == PROMISE
    run(promises.write, PROMISE._replace(term=8))
    assert run(promises.read).term == 8
    assert [file.name for file in tmp_path.iterdir()] == [PROMISE_FILE]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 2, "term": 1, "name": "", "address": "", "led": [], "names": []}',
        b'{"format": 1, "term": -1, "name": "", "address": "", "led": [], "names": []}',
        b'{"format": 1, "term": "1", "name": "", "address": "", "led": [], "names": []}',
        b'{"format": 1, "term": 1, "name": 5, "address": "", "led": [], "names": []}',
        b'{"format": 1, "term": 1, "name": "", "address": "", "led": [null], "names": []}',
        b'{"format": 1, "term": 1, "name": "", "address": "", "led": []}',
        b'{"format": 1, "term": 1, "name": "", "address": "", "led": [], "names": []}' + b" " * 70_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_promise_is_named_and_not_taken_for_none(promises, tmp_path, text):
    (tmp_path / PROMISE_FILE).write_bytes(text)
    with pytest.raises(CatalogError, match="damaged"):
        run(promises.read)
    assert (tmp_path / PROMISE_FILE).read_bytes() == text


def test_a_folder_that_takes_no_file_is_named(promises, tmp_path):
    tmp_path.rmdir()
    with pytest.raises(CatalogError, match="cannot be written"):
        run(promises.write, PROMISE)


def test_a_disk_without_room_is_told_apart_from_one_that_fails(promises, monkeypatch):
    for code, full in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)):

        def refuse(*_, code=code):
            raise OSError(code, "planted")

        monkeypatch.setattr("droppexd.catalog.promises.replace_file", refuse)
        with pytest.raises(CatalogError, match="planted") as caught:
            run(promises.write, PROMISE)
        assert isinstance(caught.value, CatalogFull) is full
