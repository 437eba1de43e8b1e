"""Operations that go are kept for people: what was written, under which name."""

import json

import pytest
import trio

from droppexd.catalog.engine import Operation
from droppexd.catalog.keys import name_key, version_key
from droppexd.catalog.lost_operations import LostFiles, told
from droppexd.catalog.records import Name, pack_name
from droppexd.catalog.replica import LogRow, pack_operations
from droppexd.errors import CatalogError
from droppexd.model import VersionId

VERSION = VersionId(5, 7)
ROWS = [
    LogRow(
        12,
        1_700_000_000_000,
        pack_operations([Operation(name_key("docs/ä"), pack_name(Name(VERSION, 3, 1)))]),
    ),
    LogRow(
        13, 0, pack_operations([Operation(name_key("docs/ä"), None), Operation(version_key(VERSION), b"?")])
    ),
]


def test_a_file_has_a_line_for_each_transaction(tmp_path):
    where = trio.run(LostFiles(tmp_path, trio.to_thread.run_sync), 4, ROWS)
    (file,) = tmp_path.iterdir()
    assert where == str(file)
    assert file.name == "lost-operations-term-4-revision-12.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["revision"], first["time"]) == (12, "2023-11-14T22:13:20+00:00")
    (put,) = first["operations"]
    assert (put["do"], put["key"]) == ("PUT", "n/docs/ä")
    assert str(VERSION) in put["is"]
    delete, damaged = second["operations"]
    assert (delete["do"], "value" in delete) == ("DELETE", False)
    assert (damaged["value"], "is" in damaged) == (b"?".hex(), False)


def test_keys_that_are_no_text_are_told_all_the_same():
    (operation,) = told(LogRow(1, 0, pack_operations([Operation(b"w/\xff\x00", b"")])))["operations"]
    assert operation["key"].startswith("w/\\xff")


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(CatalogError, match="cannot be written"):
        trio.run(LostFiles(tmp_path / "gone", trio.to_thread.run_sync), 4, ROWS)
