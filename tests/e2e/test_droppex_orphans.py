"""`orphans`, as a user types it, where there are none; with some it is tested on a cluster of real processes."""

import pytest

pytestmark = pytest.mark.slow


def test_without_orphans_there_is_nothing_to_do(droppex):
    for command in (("orphans",), ("orphans", "list")):
        assert droppex.lines(*command) == ["there are no orphans"]
        assert droppex.json(*command) == []
    assert droppex.lines("orphans", "adopt", "--all") == ["there is nothing to adopt"]
    assert droppex.lines("orphans", "drop", "--all", "--yes") == ["there is nothing to drop"]
    assert droppex.json("orphans", "adopt", "--all") == []


def test_a_version_that_is_no_orphan_is_not_found(droppex, folder):
    droppex("put", "-", f"{folder}/a", stdin=b"x" * 1000)
    version = droppex.json("stat", f"{folder}/a")["version"]
    for name in (version, "5f1e92c04a7b-a3"):
        assert b"no pool holds a part" in droppex("orphans", "adopt", name, code=3).stderr
        assert name.encode() in droppex("orphans", "drop", name, "--yes", code=3).stderr
    assert droppex("cat", f"{folder}/a").stdout == b"x" * 1000


def test_wrong_usage(droppex):
    for arguments in (("adopt",), ("adopt", "docs/a"), ("drop", "--all"), ("nonsense",)):
        droppex("orphans", *arguments, code=2)
