"""Folders whose names survive a power cut."""

import errno
import os

import pytest

from droppexd import folders
from droppexd.folders import make_folder


@pytest.fixture
def flushed(monkeypatch):
    """Note each flush of a folder, and what was in it by then."""
    seen = []

    def flush(folder):
        seen.append((folder, sorted(entry.name for entry in folder.iterdir())))

    monkeypatch.setattr(folders, "flush_folder", flush)
    return seen


def test_each_new_folder_is_flushed_before_one_is_made_in_it(tmp_path, flushed):
    make_folder(tmp_path / "a" / "b" / "c")
    a = tmp_path / "a"
    assert flushed[-3:] == [(tmp_path, ["a"]), (a, ["b"]), (a / "b", ["c"])]


def test_the_name_of_a_folder_that_is_there_is_flushed_again(tmp_path, flushed):
    (tmp_path / "a").mkdir()
    make_folder(tmp_path / "a")
    assert flushed == [(tmp_path, ["a"])]


def test_a_parent_that_may_not_be_read_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(folders, "flush_folder", failing(errno.EACCES))
    make_folder(tmp_path / "a")


def test_a_flush_that_fails_is_told(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(folders, "flush_folder", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        make_folder(tmp_path / "a")


def test_a_new_folder_whose_name_cannot_be_flushed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "flush_folder", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        make_folder(tmp_path / "a")


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a")


def failing(code):
    def flush(_folder):
        raise OSError(code, os.strerror(code))

    return flush
