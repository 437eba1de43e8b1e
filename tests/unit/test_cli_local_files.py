"""Local files: trees that are walked, targets that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.cli.exits import ReaderGone, UsageError
from droppexd.cli.local_files import (
    TEMPORARY_PREFIX,
    TEMPORARY_SUFFIX,
    StandardOutput,
    WholeFile,
    current_umask,
    file_metadata,
    is_stream,
    make_folder,
    metadata_mode,
    metadata_mtime_ns,
    new_file,
    open_source,
    opened_folder,
    opened_subfolder,
    refuse_folder,
    refuse_taken,
    regular_size,
    walk_files,
)
from droppexd.errors import Conflict


@pytest.fixture
def folder(tmp_path):
    with opened_folder(str(tmp_path)) as descriptor:
        yield descriptor


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def _write(folder, name, data, *, force=False, mode=0o644, mtime_ns=None):
    with new_file(folder, name, name) as target:
        target.stream.write(data)
        return target.commit(force=force, mode=mode, mtime_ns=mtime_ns)


def test_a_file_appears_whole_with_mode_and_time(tmp_path, folder):
    _write(folder, "a", b"content", mode=0o640, mtime_ns=1_600_000_000_123_456_789)
    status = (tmp_path / "a").stat()
    assert (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert status.st_mtime_ns == 1_600_000_000_123_456_789
    assert status.st_nlink == 1
    assert names_in(tmp_path) == ["a"]


def test_before_the_commit_there_is_only_a_recognisable_temporary_name(tmp_path, folder):
    with new_file(folder, "a", "a") as target:
        target.stream.write(b"half")
        (name,) = names_in(tmp_path)
        assert name.startswith(TEMPORARY_PREFIX)
        assert name.endswith(TEMPORARY_SUFFIX)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert names_in(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path, folder):
    def interrupted():
        with new_file(folder, "a", "a") as target:
            target.stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == []


def test_a_restart_forgets_what_was_written(tmp_path, folder):
    with new_file(folder, "a", "a") as target:
        target.stream.write(b"a long first attempt")
        target.restart()
        target.stream.write(b"second")
        target.commit(force=False, mode=0o600, mtime_ns=None)
    assert (tmp_path / "a").read_bytes() == b"second"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path, folder):
    with new_file(folder, "a", "a") as target:
        (tmp_path / "a").write_bytes(b"theirs")
        with pytest.raises(Conflict, match="--force"):
            target.commit(force=False, mode=0o600, mtime_ns=None)
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names_in(tmp_path) == ["a"]


def test_force_replaces_a_file_and_a_link_but_not_what_the_link_names(tmp_path, folder):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "link").symlink_to("other")
    _write(folder, "link", b"new", force=True)
    _write(folder, "other", b"newer", force=True)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"newer"


def test_force_replaces_neither_folders_nor_devices(tmp_path, folder):
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("sub", "pipe"):
        with pytest.raises(Conflict, match="no regular file"):
            _write(folder, name, b"new", force=True)
    assert names_in(tmp_path) == ["pipe", "sub"]


def test_a_dangling_link_is_in_the_way(tmp_path, folder):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(Conflict):
        refuse_taken(folder, "a", "a", force=False)
    with pytest.raises(Conflict):
        _write(folder, "a", b"new")


def test_without_hard_links_the_name_is_given_by_a_rename(tmp_path, folder, monkeypatch):
    def no_links(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    _write(folder, "a", b"content")
    with pytest.raises(Conflict):
        _write(folder, "a", b"other")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert names_in(tmp_path) == ["a"]


def test_a_time_that_does_not_fit_costs_no_bytes(tmp_path, folder):
    _write(folder, "a", b"content", mtime_ns=2**80)
    assert (tmp_path / "a").read_bytes() == b"content"


def test_sub_folders_are_made_below_the_target(tmp_path, folder):
    for _ in range(2):
        with opened_subfolder(folder, ("x", "y z"), "x/y z/a") as below:
            _write(below, "a", b"content", force=True)
    assert (tmp_path / "x" / "y z" / "a").read_bytes() == b"content"


@pytest.mark.parametrize("parts", [("link",), ("x", "link"), ("link", "deeper")])
def test_a_link_in_the_target_is_not_followed(tmp_path, parts):
    outside = tmp_path / "outside"
    target = tmp_path / "target"
    outside.mkdir()
    (target / "x").mkdir(parents=True)
    for place in (target, target / "x"):
        (place / "link").symlink_to(outside)
    with (
        opened_folder(str(target)) as root,
        pytest.raises(Conflict, match="link"),
        opened_subfolder(root, parts, "shown"),
    ):
        pass
    assert names_in(outside) == []


def test_a_file_in_the_way_of_a_folder_is_a_conflict(tmp_path, folder):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(Conflict), opened_subfolder(folder, ("x", "y"), "x/y/a"):
        pass


def test_descriptors_are_closed(tmp_path, folder):
    (tmp_path / "link").symlink_to("/")
    before = len(names_in(Path("/proc/self/fd")))
    for parts in ((), ("a", "b"), ("link",), ("a", "link")):
        try:
            with opened_subfolder(folder, parts, "shown") as below:
                _write(below, "f", b"", force=True)
        except Conflict:
            pass
    assert len(names_in(Path("/proc/self/fd"))) == before


_parts = st.lists(
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
    ).filter(lambda part: part not in (".", "..") and len(part.encode()) < 250),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(_parts, st.binary(max_size=20))
def test_whatever_a_name_is_its_file_lies_below_the_target(tmp_path_factory, parts, data):
    root = tmp_path_factory.mktemp("target")
    with opened_folder(str(root)) as top, opened_subfolder(top, parts[:-1], "shown") as below:
        _write(below, parts[-1], data)
    found = [path for path in root.rglob("*") if path.is_file()]
    assert found == [root.joinpath(*parts)]
    assert found[0].read_bytes() == data


def test_a_walk_finds_regular_files_in_order_and_tells_what_it_leaves_out(tmp_path):
    (tmp_path / "b" / "empty").mkdir(parents=True)
    (tmp_path / "b" / "with space").write_bytes(b"12")
    (tmp_path / "b" / "new\nline").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"123")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    skipped = []
    found = list(walk_files(str(tmp_path), lambda path, why: skipped.append((Path(path).name, why))))
    assert [(one.relative, one.size) for one in found] == [
        ("a", 1),
        ("c", 3),
        ("b/new\nline", 0),
        ("b/with space", 2),
    ]
    assert skipped == [
        ("link", "a symbolic link"),
        ("loop", "a symbolic link"),
        ("pipe", "not a regular file"),
    ]


def test_a_walk_tells_of_folders_that_cannot_be_read(tmp_path):
    skipped = []
    assert list(walk_files(str(tmp_path / "gone"), lambda path, why: skipped.append(why))) == []
    assert skipped == ["No such file or directory"]


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**18), 10**19), st.integers(0, 0o7777))
def test_time_and_mode_come_back_from_the_metadata(mtime_ns, mode):
    class Status:
        st_mtime_ns = mtime_ns
        st_mode = stat.S_IFREG | mode

    metadata = file_metadata(Status)
    assert metadata_mtime_ns(metadata) == mtime_ns
    assert metadata_mode(metadata) == mode & 0o777


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=25))
def test_strange_metadata_is_ignored(text):
    metadata = (("mtime", text), ("mode", text))
    moment, mode = metadata_mtime_ns(metadata), metadata_mode(metadata)
    assert moment is None or abs(moment) < 10**20
    assert mode is None or 0 <= mode <= 0o777


@pytest.mark.parametrize("text", ["", "x", "1.x", "1.1234567890", "123456789012", "--1", "1e5", "²"])
def test_a_time_that_is_none_is_ignored(text):
    assert metadata_mtime_ns((("mtime", text),)) is None


def test_a_source_tells_its_size_and_metadata(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    path.chmod(0o640)
    source = open_source(str(path))
    with source.stream:
        assert source.size == 7
        assert metadata_mode(source.metadata) == 0o640
        assert metadata_mtime_ns(source.metadata) == path.stat().st_mtime_ns


def test_a_device_is_a_source_of_unknown_size():
    source = open_source("/dev/null")
    with source.stream:
        assert source == (source.stream, None, ())


def test_what_kind_of_path_it_is(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    os.mkfifo(tmp_path / "pipe")
    assert [is_stream(str(tmp_path / name)) for name in ("a", "pipe", "gone", "")] == [
        False,
        True,
        False,
        False,
    ]
    assert [regular_size(str(tmp_path / name)) for name in ("a", "pipe", "gone", "")] == [2, None, None, None]
    refuse_folder(str(tmp_path / "a"))
    with pytest.raises(UsageError, match="-r"):
        refuse_folder(str(tmp_path))
    with pytest.raises(Conflict):
        make_folder(str(tmp_path / "a"))


def test_reads_and_writes_on_a_pipe_are_whole():
    reader, writer = os.pipe()
    with WholeFile(reader, "rb") as source:
        for part in (b"one", b"two", b"three"):
            os.write(writer, part)
        os.close(writer)
        assert source.read(7) == b"onetwot"
        assert source.read(100) == b"hree"
        assert source.read(100) == b""


def test_a_closed_reader_is_no_error_of_the_file(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    try:
        os.dup2(writer, 1)
        with pytest.raises(ReaderGone):
            StandardOutput().write(b"x")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writer)


def test_the_umask_is_left_as_it_was():
    before = os.umask(0o027)
    try:
        assert current_umask() == 0o027
        assert current_umask() == 0o027
    finally:
        os.umask(before)
