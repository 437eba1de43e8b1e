"""What the words on a `droppex` command line mean."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.cli.client_arguments import (
    ByteRange,
    Upload,
    folder_prefix,
    get_folder_path,
    get_path,
    local_base_name,
    mv_target,
    parse_layout,
    parse_range,
    plan_put,
    refuse_get,
    refuse_unasked,
    relative_parts,
)
from droppexd.cli.exits import UsageError
from droppexd.errors import InvalidName
from droppexd.model import Layout, normal_name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0-0", ByteRange(0, 1)),
        ("5-9", ByteRange(5, 5)),
        ("7-", ByteRange(7, None)),
        ("-3", ByteRange(0, 3, from_end=True)),
    ],
)
def test_a_range_is_read_as_in_http(text, wanted):
    assert parse_range(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "-", "5", "9-5", "-0", "a-b", "1-2-3", "--5", "+1-2", "²-3", "1 -2", "0x1-"]
)
def test_a_wrong_range_is_a_usage_error(text):
    with pytest.raises(UsageError):
        parse_range(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**50), st.integers(0, 2**50))
def test_a_range_holds_both_its_ends(first, more):
    assert parse_range(f"{first}-{first + more}") == ByteRange(first, more + 1)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=8))
def test_any_range_text_is_understood_or_refused(text):
    try:
        part = parse_range(text)
    except UsageError:
        return
    assert part.start >= 0
    assert part.length is None or part.length > 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["a.txt"], [Upload("a.txt", "a.txt")]),
        (["x/a.txt"], [Upload("x/a.txt", "a.txt")]),
        (["a.txt", "docs/"], [Upload("a.txt", "docs/a.txt")]),
        (["a.txt", "docs/b.txt"], [Upload("a.txt", "docs/b.txt")]),
        (["a", "x/b", "docs/"], [Upload("a", "docs/a"), Upload("x/b", "docs/b")]),
        (["-", "docs/b"], [Upload("-", "docs/b")]),
        (["photos"], [Upload("photos", "photos")]),
        (["photos/", "backup"], [Upload("photos/", "backup")]),
        (["photos/", "backup/"], [Upload("photos/", "backup/photos")]),
        (["-a", "b/"], [Upload("-a", "b/-a")]),
    ],
)
def test_the_last_of_several_arguments_is_the_destination(arguments, wanted):
    assert plan_put(arguments) == wanted


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "c"], ["-"], ["-", "docs/"], ["a", ""], ["/"], ["a", "-", "docs/"]],
)
def test_a_put_that_means_nothing_is_a_usage_error(arguments):
    with pytest.raises(UsageError):
        plan_put(arguments)


def test_a_dot_is_called_what_its_folder_is_called(tmp_path, monkeypatch):
    (tmp_path / "holiday").mkdir()
    monkeypatch.chdir(tmp_path / "holiday")
    assert local_base_name(".") == "holiday"
    assert local_base_name("./") == "holiday"
    assert local_base_name("..") == tmp_path.name


def test_mv_into_a_folder_keeps_the_last_part():
    assert mv_target("docs/a", "old/") == "old/a"
    assert mv_target("docs/a", "old/b") == "old/b"
    assert mv_target("docs/a", "b") == "files/b"


def test_a_file_goes_to_its_own_name_or_into_a_folder(tmp_path):
    assert get_path("docs/a", None) == "a"
    assert get_path("docs/a", "b") == "b"
    assert get_path("docs/a", "x/") == "x/a"
    assert get_path("docs/a", str(tmp_path)) == f"{tmp_path}/a"
    assert get_path("docs/a", "/") == "/a"
    with pytest.raises(UsageError):
        get_path("docs/a", "")


@pytest.mark.parametrize(
    ("prefix", "local", "wanted"),
    [
        ("docs/", None, "docs"),
        ("docs/sub/", None, "sub"),
        ("docs/", "out", "out"),
        ("docs/", "out/", "out/docs"),
        ("docs/", ".", "./docs"),
        ("docs/", "x/..", "x/../docs"),
        ("", "out", "out"),
    ],
)
def test_a_tree_goes_to_its_own_name_or_to_local(prefix, local, wanted):
    assert get_folder_path(prefix, local) == wanted


@pytest.mark.parametrize(("prefix", "local"), [("", None), ("docs/", "")])
def test_a_tree_without_a_place_is_a_usage_error(prefix, local):
    with pytest.raises(UsageError):
        get_folder_path(prefix, local)


def test_a_folder_may_be_written_with_and_without_its_slash():
    assert folder_prefix("docs") == folder_prefix("docs/") == "docs/"
    assert folder_prefix("") == folder_prefix("/") == ""
    with pytest.raises(InvalidName):
        folder_prefix("docs/../x")


_names = st.text(min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(_names, st.text(alphabet="ab./", max_size=6))
def test_no_name_leads_out_of_the_target_folder(name, prefix):
    try:
        parts = relative_parts(name, prefix)
    except InvalidName:
        return
    assert name == prefix + "/".join(parts)
    assert parts
    target = os.path.normpath("/".join(("/target", *parts)))
    assert target.startswith("/target/")
    assert target.split("/")[2:] == list(parts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4).map("/".join))
def test_every_valid_name_becomes_a_path(name):
    try:
        name = normal_name(name)
    except InvalidName:
        return
    folder, _, rest = name.partition("/")
    assert relative_parts(name, f"{folder}/") == tuple(rest.split("/"))


@pytest.mark.parametrize("name", ["d/../x", "d/./x", "d//x", "d/", "d/a\0b", "other/x", "d", "/etc/passwd"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(InvalidName):
        relative_parts(name, "d/")


def test_layouts():
    assert parse_layout("4+2") == Layout(4, 2)
    assert parse_layout(None) is None
    assert parse_layout("auto") is None
    with pytest.raises(UsageError, match=r"4\+2"):
        parse_layout("four")


@pytest.mark.parametrize(
    ("local", "options"),
    [
        ("x", {"recursive": True, "part": "0-1", "as_json": False}),
        ("-", {"recursive": True, "part": None, "as_json": False}),
        ("-", {"recursive": False, "part": None, "as_json": True}),
    ],
)
def test_options_of_get_that_exclude_each_other(local, options):
    with pytest.raises(UsageError):
        refuse_get(local, **options)


def test_rm_does_not_ask_where_nobody_answers():
    refuse_unasked("rm -r", on_terminal=True)
    with pytest.raises(UsageError, match="--yes"):
        refuse_unasked("rm -r", on_terminal=False)
