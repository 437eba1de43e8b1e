"""`ls`, `find`, `stat`, `rm`, `mv`, `cp`, `status` and `pools`, as a user types them."""

import os
import re
import signal
import subprocess

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def filled(droppex, folder):
    """Three files in a folder with a sub-folder."""
    for name in ("a.txt", "b.jpg", "sub/c.txt"):
        droppex("put", "-", f"{folder}/{name}", stdin=b"x" * 1536)
    return folder


def on_terminal(droppex, *arguments, answer=b"", number=None, stdout=False):
    """Run a command with a terminal; return its exit code and what was shown there.

    A question is answered with `answer` or with a signal.
    """
    ours, theirs = os.openpty()
    streams = {"stdin": theirs, "stderr": theirs, "stdout": theirs if stdout else subprocess.PIPE}
    with droppex.start(*arguments, **streams) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux's way to say that nobody has the other end open.
                break
            if not data:
                break
            shown += data
            if b"?" in shown:
                os.write(ours, answer)
                answer = b""
                if number is not None:
                    process.send_signal(number)
    os.close(ours)
    return process.returncode, shown.decode()


def test_ls_lists_folders_prefixes_and_everything(droppex, filled):
    assert f"{filled}/" in droppex.lines("ls")
    assert droppex.lines("ls", f"{filled}/") == [f"{filled}/a.txt", f"{filled}/b.jpg", f"{filled}/sub/"]
    assert droppex.lines("ls", f"{filled}/a") == [f"{filled}/a.txt"]
    assert droppex.lines("ls", "-r", f"{filled}/") == [
        f"{filled}/{name}" for name in ("a.txt", "b.jpg", "sub/c.txt")
    ]
    assert f"{filled}/" in droppex.lines("ls", filled)
    droppex("ls", "there-is-no-such-thing", code=3)


def test_ls_finds_a_bare_name_in_the_default_folder(droppex):
    droppex("put", "--force", "-", "bare-name", stdin=b"x")
    assert droppex.lines("ls", "bare-name") == ["files/bare-name"]


def test_ls_l_is_plain_and_aligned_without_a_terminal(droppex, filled):
    lines = droppex.lines("ls", "-l", f"{filled}/")
    assert re.fullmatch(rf" +1\.5 KiB  \d{{4}}-\d\d-\d\d \d\d:\d\d  {filled}/a\.txt", lines[0])
    assert len({line.index(filled) for line in lines}) == 1
    assert droppex.lines("ls", "-l", "--bytes", f"{filled}/a")[0].split()[0] == "1536"
    assert not any("\x1b" in line for line in lines)


def test_ls_for_programs(droppex, filled):
    entries = droppex.json("ls", f"{filled}/")
    assert entries[2] == {"name": f"{filled}/sub/", "folder": True}
    assert set(entries[0]) == {"name", "folder", "size", "created", "version"}
    assert entries[0]["size"] == 1536
    assert droppex.json("ls", "there-is-no-such-thing", code=3) == []


def test_control_characters_are_escaped_on_a_terminal_only(droppex, folder):
    name = f"{folder}/red\x1b[31m\nnext"
    droppex("put", "-", name, stdin=b"x")
    assert droppex("ls", f"{folder}/").stdout == f"{name}\n".encode()
    code, shown = on_terminal(droppex, "ls", f"{folder}/", stdout=True)
    assert code == 0
    assert f"{folder}/red\\x1b[31m\\nnext" in shown
    assert "\x1b" not in shown


def test_ls_to_a_reader_that_has_enough(droppex, filled):
    reader, writer = os.pipe()
    os.close(reader)
    with droppex.start("ls", "-r", stdout=writer) as process:
        os.close(writer)
        told = process.stderr.read()
    assert process.returncode == 141
    assert told == b""


def test_find_takes_globs(droppex, filled):
    assert droppex.lines("find", f"{filled}/**/*.txt")[-1] == f"{filled}/sub/c.txt"
    assert [one["name"] for one in droppex.json("find", f"{filled}/?.jpg")] == [f"{filled}/b.jpg"]
    assert droppex.json("find", f"{filled}/*.png") == []


def test_stat_says_where_each_shard_is(droppex, folder, cluster):
    droppex("put", "-", f"{folder}/a", "--layout", "2+1", stdin=b"x" * 5_000_000)
    document = droppex.json("stat", f"{folder}/a")
    assert document["size"] == 5_000_000
    assert document["layout"] == "2+1"
    assert document["survives_pools"] == 1
    (extent,) = document["extents"]
    assert [shard["index"] for shard in extent["shards"]] == [0, 1, 2]
    pools = {pool["name"] for pool in cluster.of_role("pool")}
    for shard in extent["shards"]:
        assert set(shard) == {"index", "pool", "name", "machine", "state"}
        assert shard["name"] in pools
        assert shard["state"] == "up"
    text = droppex("stat", f"{folder}/a").stdout.decode()
    assert document["blake3"] in text
    assert "parity" in text
    assert len(droppex.json("stat", f"{folder}/a", f"{folder}/a")) == 2
    droppex("stat", f"{folder}/gone", code=3)


def test_mv_and_cp_change_names_only(droppex, folder):
    droppex("put", "-", f"{folder}/a", stdin=b"content")
    version = droppex.json("stat", f"{folder}/a")["version"]
    moved = droppex.json("mv", f"{folder}/a", f"{folder}/sub/")
    assert moved == {"source": f"{folder}/a", "name": f"{folder}/sub/a", "version": version}
    droppex("stat", f"{folder}/a", code=3)
    droppex("cp", f"{folder}/sub/a", f"{folder}/b")
    assert droppex.json("stat", f"{folder}/b")["names"] == 2
    droppex("rm", f"{folder}/sub/a")
    assert droppex("cat", f"{folder}/b").stdout == b"content"
    droppex("put", "-", f"{folder}/c", stdin=b"other")
    for command in ("mv", "cp"):
        droppex(command, f"{folder}/c", f"{folder}/b", code=4)
        droppex(command, f"{folder}/gone", f"{folder}/d", code=3)
    droppex("mv", "--force", f"{folder}/c", f"{folder}/b")
    assert droppex("cat", f"{folder}/b").stdout == b"other"


def test_rm_removes_names(droppex, filled):
    assert droppex("rm", f"{filled}/a.txt").stdout == b""
    droppex("rm", f"{filled}/a.txt", code=3)
    (removed,) = droppex.json("rm", f"{filled}/b.jpg")
    assert set(removed) == {"name", "version"}
    result = droppex("rm", f"{filled}/gone", f"{filled}/sub/c.txt", code=1)
    assert len(result.stderr.splitlines()) == 1
    droppex("ls", f"{filled}/", code=3)


def test_rm_r_asks_a_person_and_refuses_a_program(droppex, filled):
    assert "--yes" in droppex("rm", "-r", filled, code=2).stderr.decode()
    code, shown = on_terminal(droppex, "rm", "-r", filled, answer=b"n\n")
    assert code == 1
    assert "3 files" in shown
    assert len(droppex.lines("ls", "-r", f"{filled}/")) == 3
    code, _ = on_terminal(droppex, "rm", "-r", filled, answer=b"y\n")
    assert code == 0
    droppex("ls", f"{filled}/", code=3)


def test_rm_r_with_yes(droppex, filled):
    droppex("put", "-", f"{filled}-neighbour/a", stdin=b"x")
    assert "3 files" in droppex("rm", "-r", "--yes", filled).stdout.decode()
    assert droppex.lines("ls", f"{filled}-neighbour/") == [f"{filled}-neighbour/a"]
    droppex("rm", "-r", "--yes", "", code=2)
    droppex("rm", "-r", "--yes", "/", code=2)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"answer": b"\x04"}, 1), ({"answer": b"\n"}, 1), ({"number": signal.SIGINT}, 130)],
)
def test_who_does_not_say_yes_removes_nothing(droppex, filled, options, wanted):
    code, shown = on_terminal(droppex, "rm", "-r", filled, **options)
    assert code == wanted
    assert "Traceback" not in shown
    assert len(droppex.lines("ls", "-r", f"{filled}/")) == 3


def test_status_and_pools(droppex, filled):
    document = droppex.json("status")
    assert document["files"] >= 3
    assert {pool["state"] for pool in document["pools"]} == {"up"}
    counted = sum(count["files"] for count in document["survival"])
    assert counted + document["empty_files"] == document["files"]
    assert droppex.json("pools") == document["pools"] or len(droppex.json("pools")) == 6
    assert len(droppex.lines("pools")) == 7
    assert any("6" in line for line in droppex.lines("status"))
    needed = bool(document["problems"])
    droppex("status", "--check", code=1 if needed else 0)


def test_global_options_stand_in_front(droppex, cluster, filled):
    assert droppex.lines("--app", cluster.app, "ls", f"{filled}/a") == [f"{filled}/a.txt"]
    assert b'"name"' in droppex("--json", "ls", f"{filled}/a").stdout
    assert droppex("--quiet", "put", "--force", "-", f"{filled}/a.txt", stdin=b"y").stdout == b""


def test_progress_goes_to_the_terminal_and_the_receipt_to_its_stream(droppex, folder):
    (droppex.folder / "in").write_bytes(os.urandom(20_000_000))
    ours, theirs = os.openpty()
    with droppex.start("put", "in", f"{folder}/a", stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        receipt = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"put" in shown
    assert receipt.startswith(f"stored {folder}/a".encode())
    assert b"\x1b" not in receipt
