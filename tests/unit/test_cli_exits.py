"""Errors become exit codes and one clear line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd import errors
from droppexd.cli.exits import (
    ExitCode,
    ReaderGone,
    UsageError,
    error_text,
    exit_code,
    expected_error,
    leaves,
    printable,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), 3),
        (errors.Conflict("x"), 4),
        (FileExistsError(17, "File exists", "x"), 4),
        (errors.NotEnoughShards("x"), 5),
        (errors.PeerError("x"), 6),
        (errors.PeerTimeout("x"), 6),
        (errors.PeerBusy("x"), 6),
        (errors.NotMaster("x"), 6),
        (errors.NotAuthorised("x"), 1),
        (errors.IntegrityError("x"), 1),
        (errors.StoreFull("x"), 1),
        (errors.StaleRead("x"), 1),
        (OSError(28, "No space left on device"), 1),
        (FileNotFoundError(2, "No such file or directory", "x"), 1),
        (UsageError("x"), 2),
        (errors.InvalidName("x"), 2),
        (errors.InvalidRequest("x"), 2),
        (errors.ConfigError(["x"]), 2),
        (KeyboardInterrupt(), 130),
        (ReaderGone(), 141),
        (KeyError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error, code):
    assert exit_code(error) == code


def test_every_error_of_droppex_fails_the_command():
    waiting = [errors.DroppexError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        assert exit_code(kind.__new__(kind)) != ExitCode.OK


def test_the_line_names_the_subject_once():
    assert error_text(errors.IntegrityError("docs/a is wrong"), "docs/a").startswith("docs/a is wrong")
    assert error_text(errors.IntegrityError("wrong"), "docs/a").startswith("docs/a: wrong")
    assert (
        error_text(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    )
    assert error_text(OSError(28, "No space left on device"), "y") == "y: No space left on device"


def test_missing_shards_are_named():
    text = error_text(errors.NotEnoughShards("too few", ["shard 1 of 7-1 on pool-2", "shard\n2"]), "docs/a")
    assert text.splitlines()[0].startswith("docs/a: too few")
    assert text.splitlines()[1:] == ["  missing: shard 1 of 7-1 on pool-2", "  missing: shard\\n2"]


def test_a_bug_is_called_one():
    assert "a bug in droppex: KeyError" in error_text(KeyError("x"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_an_error_is_one_line_whatever_the_names_hold(text, subject):
    line = error_text(errors.StoreError(text), subject)
    assert len(line.splitlines()) <= 1
    assert "\x1b" not in line


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_printable_text_moves_no_cursor(text):
    shown = printable(text)
    assert shown.replace("\u200d", "").isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_emoji_stay_whole():
    family = "👩\u200d👩\u200d👧 café"
    assert printable(family) == family
    assert printable("a\x1b[31mb\n\u202e") == "a\\x1b[31mb\\n\\u202e"


def test_groups_are_taken_apart():
    first, second = errors.NotFound("x"), OSError(5, "y")
    group = BaseExceptionGroup("", [ExceptionGroup("", [first]), second])
    assert leaves(group) == [first, second]
    assert expected_error(group) is first
    assert expected_error(first) is first
    assert expected_error(BaseExceptionGroup("", [first, KeyboardInterrupt()])) is None
    assert expected_error(KeyError("x")) is None
