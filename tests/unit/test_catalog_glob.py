"""What globs match."""

import pytest

from droppexd.catalog.glob import Glob


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.jpg", "files/a.jpg", True),
        ("*.jpg", "photos/2024/a.jpg", True),
        ("*.jpg", "photos/a.jpg/b", False),
        ("a.jpg", "photos/deep/a.jpg", True),
        ("photos/*.jpg", "photos/a.jpg", True),
        ("photos/*.jpg", "photos/2024/a.jpg", False),
        ("photos/**.jpg", "photos/2024/a.jpg", True),
        ("photos/**/*.jpg", "photos/a.jpg", True),
        ("photos/**/*.jpg", "photos/x/y/a.jpg", True),
        ("photos/**/**/*.jpg", "photos/a.jpg", True),
        ("photos/**/y/*.jpg", "photos/x/y/a.jpg", True),
        ("photos/**/y/*.jpg", "photos/xy/a.jpg", False),
        ("photos/**", "photos/x/y", True),
        ("photos/**", "photosx/y", False),
        ("p?otos/a", "photos/a", True),
        ("photos?a", "photos/a", False),
        ("x/[abc]", "x/b", True),
        ("x/[a-c]", "x/d", False),
        ("x/[!a-c]", "x/d", True),
        ("x[!a]y", "x/y", False),
        ("x/[]]", "x/]", True),
        ("x/[!]]", "x/]", False),
        ("x/[a-]", "x/-", True),
        ("x/[*]", "x/*", True),
        ("x/[*]", "x/a", False),
        ("x/[", "x/[", True),
        ("x/[]", "x/[]", True),
        ("x/a*", "x/a", True),
        ("x/*a*b*", "x/zzazzbzz", True),
        ("x/***", "x/a/b", True),
        ("**/b", "x/a/b", True),
        ("ö*/?", "öff/😀", True),
        ("x/a\nb", "x/a\nb", True),
        ("x/*", "x/a\nb", True),
        ("", "x/a", False),
    ],
)
def test_matches(pattern, name, matches):
    assert Glob(pattern).matches(name) is matches


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("a/b*c", "a/b"),
        ("*", ""),
        ("abc", ""),
        ("a/b", "a/b"),
        ("a/[bc]", "a/"),
        ("a/[b", "a/[b"),
        ("a/?", "a/"),
    ],
)
def test_a_literal_prefix_bounds_the_scan(pattern, prefix):
    assert Glob(pattern).prefix == prefix


def test_a_pattern_that_would_make_a_regular_expression_hang_is_answered():
    glob = Glob("x/" + "*a" * 300 + "*b")
    assert not glob.matches("x/" + "a" * 1000)
    assert glob.matches("x/" + "a" * 1000 + "b")


def test_states_are_bounded():
    glob = Glob("x/" + "*a?" * 40)
    for i in range(300):
        glob.matches("x/" + f"{i * 7919:b}".replace("1", "a").replace("0", "b") * 8)
    assert len(glob._states) <= 2001
