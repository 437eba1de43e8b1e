"""The model of a disk drops what may be lost, keeps what is safe, and tears what is neither."""

import itertools
import random

from powerloss.disk import (
    ROOT,
    SECTOR,
    AllDropped,
    AllKept,
    Change,
    Disk,
    Flush,
    Mixed,
    Naming,
    Resize,
    Write,
)

FOLDER, OTHER, FILE, NEW_FILE = 1, 2, 3, 4
END = 10**9


class Story:
    """Operations one after another: each begins when the one before has ended."""

    def __init__(self):
        self.operations = []
        self._clock = itertools.count(1)

    def _time(self):
        return {"began": next(self._clock), "ended": next(self._clock)}

    def _did(self, operation):
        self.operations.append(operation)
        return operation.ended

    def made(self, inode, name, folder=ROOT):
        return self._did(Naming(**self._time(), changes=(Change(folder, name, inode),)))

    def renamed(self, inode, old, new, folder=ROOT, to=ROOT):
        changes = Change(to, new, inode), Change(folder, old, None)
        return self._did(Naming(**self._time(), changes=changes))

    def removed(self, name, folder=ROOT):
        return self._did(Naming(**self._time(), changes=(Change(folder, name, None),)))

    def wrote(self, inode, offset, data):
        return self._did(Write(**self._time(), inode=inode, offset=offset, data=data))

    def cut(self, inode, length):
        return self._did(Resize(**self._time(), inode=inode, length=length))

    def reserved(self, inode, length):
        return self._did(Resize(**self._time(), inode=inode, length=length, only_grow=True))

    def flushed(self, inode):
        return self._did(Flush(**self._time(), inode=inode))

    def after(self, moment, luck):
        return Disk(self.operations, {ROOT, FOLDER, OTHER}).after_crash(moment, luck)

    def dropped(self, moment=END):
        return self.after(moment, AllDropped())

    def kept(self, moment=END):
        return self.after(moment, AllKept())

    def mixed(self, moment=END, seeds=300):
        return [self.after(moment, Mixed(random.Random(seed))) for seed in range(seeds)]


def safe_file(story, data):
    story.made(FILE, "a")
    story.wrote(FILE, 0, data)
    story.flushed(FILE)
    story.flushed(ROOT)


def contents(images, name="a"):
    return {image.files.get(name) for image in images}


def test_flushed_content_under_a_flushed_name_is_safe():
    story = Story()
    safe_file(story, b"safe")
    assert contents([story.dropped(), story.kept(), *story.mixed()]) == {b"safe"}


def test_a_flushed_file_without_a_flushed_name_may_vanish():
    story = Story()
    story.made(FILE, "a")
    story.wrote(FILE, 0, b"safe")
    story.flushed(FILE)
    assert story.dropped().files == {}
    assert contents(story.mixed()) == {None, b"safe"}


def test_a_file_in_a_folder_whose_own_name_is_not_flushed_may_vanish():
    story = Story()
    story.made(FOLDER, "folder")
    story.made(FILE, "a", FOLDER)
    story.flushed(FOLDER)
    assert story.dropped().folders == set()
    assert story.kept().files == {"folder/a": b""}
    story.flushed(ROOT)
    assert story.dropped().files == {"folder/a": b""}


def test_what_a_flush_makes_safe_ended_before_it_began_and_is_safe_when_it_has_ended():
    story = Story()
    safe_file(story, b"old")
    during = Write(began=100, ended=110, inode=FILE, offset=0, data=b"new")
    story.operations += [during, Flush(began=105, ended=120, inode=FILE)]
    assert story.dropped(1000).files == {"a": b"old"}
    story.operations.append(Flush(began=110, ended=130, inode=FILE))
    assert story.dropped(129).files == {"a": b"old"}
    assert story.dropped(130).files == {"a": b"new"}


def test_a_write_may_be_there_as_soon_as_it_has_begun():
    story = Story()
    safe_file(story, b"old")
    story.operations.append(Write(began=100, ended=110, inode=FILE, offset=0, data=b"new"))
    assert story.kept(99).files == {"a": b"old"}
    assert story.kept(100).files == {"a": b"new"}


def test_an_unflushed_write_is_torn_between_sectors_and_never_within_one():
    story = Story()
    safe_file(story, b"o" * 4 * SECTOR)
    story.wrote(FILE, 0, b"n" * 4 * SECTOR)
    found = contents(story.mixed())
    assert len(found) > 10
    for data in found:
        sectors = {data[start : start + SECTOR] for start in range(0, len(data), SECTOR)}
        assert sectors <= {b"o" * SECTOR, b"n" * SECTOR}


def test_a_sector_never_has_a_later_write_without_an_earlier_one():
    story = Story()
    safe_file(story, b"....")
    story.wrote(FILE, 0, b"1")
    story.wrote(FILE, 1, b"2")
    assert contents(story.mixed()) == {b"....", b"1...", b"12.."}


def test_the_length_may_be_there_without_the_bytes_and_shows_zeros_or_anything():
    story = Story()
    safe_file(story, b"")
    story.wrote(FILE, 0, b"n" * SECTOR)
    found = contents(story.mixed())
    assert {b"", b"n" * SECTOR, bytes(SECTOR)} <= found
    assert len(found) > 3


def test_reserved_blocks_are_zeros_once_they_are_flushed():
    story = Story()
    story.made(FILE, "a")
    story.reserved(FILE, 8)
    story.wrote(FILE, 2, b"x")
    story.flushed(FILE)
    story.flushed(ROOT)
    assert contents([story.dropped(), *story.mixed()]) == {b"\0\0x\0\0\0\0\0"}


def test_a_cut_is_whole_or_not_at_all_and_nothing_after_it_is_there_without_it():
    story = Story()
    safe_file(story, b"o" * 2 * SECTOR)
    story.cut(FILE, 0)
    story.wrote(FILE, 0, b"n" * SECTOR)
    found = contents(story.mixed())
    assert {b"o" * 2 * SECTOR, b"", b"n" * SECTOR} <= found
    assert all(data == b"o" * 2 * SECTOR or len(data) <= SECTOR for data in found)
    assert b"o" * SECTOR not in found


def test_a_rename_replaces_at_once_and_never_loses_both_names():
    story = Story()
    safe_file(story, b"old")
    story.made(NEW_FILE, "b")
    story.wrote(NEW_FILE, 0, b"new")
    story.flushed(NEW_FILE)
    story.renamed(NEW_FILE, "b", "a")
    assert contents(story.mixed()) == {b"old", b"new"}
    story.flushed(ROOT)
    assert story.dropped().files == {"a": b"new"}


def test_after_a_rename_into_a_flushed_folder_the_old_name_may_linger():
    story = Story()
    story.made(FOLDER, "from")
    story.made(OTHER, "to")
    story.flushed(ROOT)
    story.made(FILE, "a", FOLDER)
    story.flushed(FOLDER)
    story.renamed(FILE, "a", "b", FOLDER, OTHER)
    assert {frozenset(image.files) for image in story.mixed()} == {
        frozenset(names) for names in (["from/a"], ["to/b"], ["from/a", "to/b"])
    }
    story.flushed(OTHER)
    assert {frozenset(image.files) for image in story.mixed()} == {
        frozenset(names) for names in (["to/b"], ["from/a", "to/b"])
    }


def test_unflushed_names_are_lost_in_any_combination():
    story = Story()
    story.made(FILE, "a")
    story.made(NEW_FILE, "b")
    found = {frozenset(image.files) for image in story.mixed()}
    assert found == {frozenset(), frozenset("a"), frozenset("b"), frozenset("ab")}


def test_a_removed_file_may_be_back_until_its_folder_is_flushed():
    story = Story()
    safe_file(story, b"back")
    story.removed("a")
    assert story.dropped().files == {"a": b"back"}
    assert story.kept().files == {}
    story.flushed(ROOT)
    assert story.dropped().files == {}


def test_one_seed_gives_one_crash():
    story = Story()
    safe_file(story, b"o" * 8 * SECTOR)
    story.wrote(FILE, 0, b"n" * 8 * SECTOR)
    story.made(NEW_FILE, "b")
    assert [image.digest() for image in story.mixed()] == [image.digest() for image in story.mixed()]
