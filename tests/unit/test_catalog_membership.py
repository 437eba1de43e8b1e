"""What a controller remembers of the cluster that it joined."""

import json

import pytest

from droppexd.catalog.membership import MEMBERSHIP_FILE, Membership, read_membership, write_membership
from droppexd.errors import CatalogError

JOINED = Membership(
    cluster_id=bytes(range(16)),
    engine="etcd",
    endpoints=("https://10.0.0.1:2379", "https://10.0.0.2:2379"),
    prefix="droppex/",
    controllers=("tcp://10.0.0.1:7700",),
)


def test_what_is_written_is_read(tmp_path):
    assert read_membership(tmp_path) is None
    write_membership(tmp_path, JOINED)
    assert read_membership(tmp_path) == JOINED
    write_membership(tmp_path, JOINED._replace(controllers=()))
    assert read_membership(tmp_path).controllers == ()
    assert [file.name for file in tmp_path.iterdir()] == [MEMBERSHIP_FILE]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"cluster_id": "00"},
        {"cluster_id": 7},
        {"endpoints": [3]},
        {"endpoints": ["x"] * 1000},
        {"engine": None},
        {"prefix": "x" * 300},
    ],
)
def test_a_damaged_file_is_refused_and_says_what_to_do(tmp_path, change):
    write_membership(tmp_path, JOINED)
    file = tmp_path / MEMBERSHIP_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CatalogError, match="--master"):
        read_membership(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"{}" + b" " * 70_000])
def test_what_is_no_such_file_is_refused(tmp_path, text):
    (tmp_path / MEMBERSHIP_FILE).write_bytes(text)
    with pytest.raises(CatalogError):
        read_membership(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(CatalogError, match="cannot be written"):
        write_membership(tmp_path / "gone", JOINED)
