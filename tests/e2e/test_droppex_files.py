"""`put`, `get` and `cat`, as a user types them."""

import os
import random
import signal
import stat
import subprocess
import time

import pytest
from blake3 import blake3

pytestmark = pytest.mark.slow

MIB = 1024**2
LARGE = random.Random(7).randbytes(9 * MIB + 13)
"""Three chunks, the last one odd."""


def waits_for(condition):
    """Look until something is so, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 128 * 1024, 128 * 1024 + 1, len(LARGE)])
def test_a_file_comes_back_byte_for_byte(droppex, folder, size):
    data = LARGE[:size]
    (droppex.folder / "in").write_bytes(data)
    receipt = droppex("put", "in", f"{folder}/").stdout.decode()
    assert receipt.startswith(f"stored {folder}/in: ")
    assert blake3(data).hexdigest() in receipt
    assert len(receipt.splitlines()) == 1
    line = droppex("get", f"{folder}/in", "out").stdout.decode()
    assert "BLAKE3 verified" in line
    assert (droppex.folder / "out").read_bytes() == data
    assert droppex("cat", f"{folder}/in").stdout == data
    assert names_in(droppex.folder) == ["in", "out"]


def test_put_and_get_tell_programs_what_they_did(droppex, folder):
    (droppex.folder / "in").write_bytes(LARGE)
    (receipt,) = droppex.json("put", "in", f"{folder}/a")
    assert set(receipt) == {
        "name",
        "version",
        "size",
        "blake3",
        "layout",
        "survives_pools",
        "survives_machines",
        "replaced",
        "note",
    }
    assert receipt["name"] == f"{folder}/a"
    assert receipt["size"] == len(LARGE)
    assert receipt["blake3"] == blake3(LARGE).hexdigest()
    assert receipt["layout"] == "4+2"
    assert receipt["survives_pools"] == 2
    assert receipt["replaced"] is False
    got = droppex.json("get", f"{folder}/a")
    assert set(got) == {"name", "version", "size", "blake3", "path", "rebuilt_chunks", "seconds"}
    assert got["path"] == "a"
    assert got["version"] == receipt["version"]
    assert got["blake3"] == receipt["blake3"]
    assert got["rebuilt_chunks"] == 0
    assert (droppex.folder / "a").read_bytes() == LARGE


def test_what_put_calls_a_file(droppex):
    for name in ("one", "two"):
        (droppex.folder / name).write_bytes(name.encode())
    assert droppex.json("put", "one")[0]["name"] == "files/one"
    assert sorted(one["name"] for one in droppex.json("put", "one", "two", "naming/")) == [
        "naming/one",
        "naming/two",
    ]
    assert "slash" in droppex("put", "one", "two", "naming", code=2).stderr.decode()
    assert droppex("cat", "one").stdout == b"one"
    assert droppex("cat", "files/one", "naming/two").stdout == b"onetwo"


def test_standard_input_and_output(droppex, folder):
    for name, data in (("small", b"from a pipe"), ("large", LARGE), ("empty", b"")):
        droppex("put", "-", f"{folder}/{name}", stdin=data)
        assert droppex("get", f"{folder}/{name}", "-").stdout == data
    assert "REMOTE" in droppex("put", "-", code=2).stderr.decode()
    droppex("get", f"{folder}/small", "-", "--json", code=2)


def test_an_empty_file_is_kept_in_the_catalogue_alone(droppex, folder):
    (droppex.folder / "empty").touch()
    (receipt,) = droppex.json("put", "empty", f"{folder}/")
    for told in (receipt, droppex.json("stat", f"{folder}/empty")):
        assert (told["layout"], told["survives_pools"], told["survives_machines"]) == (None, None, None)
    assert droppex.json("status")["empty_files"] >= 1
    assert "kept in the catalogue alone" in "".join(droppex.lines("stat", f"{folder}/empty"))


def test_a_named_pipe_is_read_to_its_end(droppex, folder):
    os.mkfifo(droppex.folder / "pipe")
    with droppex.start("put", "pipe", f"{folder}/a") as process:
        with (droppex.folder / "pipe").open("wb") as pipe:
            pipe.write(LARGE)
        process.communicate()
    assert process.returncode == 0
    assert droppex("cat", f"{folder}/a").stdout == LARGE


def test_put_refuses_to_overwrite_unless_forced(droppex, folder):
    droppex("put", "-", f"{folder}/a", stdin=b"old")
    assert "droppex: " in droppex("put", "-", f"{folder}/a", stdin=b"new", code=4).stderr.decode()
    (droppex.folder / "a").write_bytes(LARGE)
    droppex("put", "a", f"{folder}/a", code=4)
    assert droppex("cat", f"{folder}/a").stdout == b"old"
    (receipt,) = droppex.json("put", "--force", "a", f"{folder}/a")
    assert receipt["replaced"] is True
    assert droppex("cat", f"{folder}/a").stdout == LARGE


def test_get_refuses_to_overwrite_unless_forced(droppex, folder):
    droppex("put", "-", f"{folder}/a", stdin=b"remote")
    (droppex.folder / "a").write_bytes(b"mine")
    assert "--force" in droppex("get", f"{folder}/a", code=4).stderr.decode()
    assert (droppex.folder / "a").read_bytes() == b"mine"
    droppex("get", f"{folder}/a", "--force")
    assert (droppex.folder / "a").read_bytes() == b"remote"
    assert names_in(droppex.folder) == ["a"]


def test_ranges(droppex, folder):
    droppex("put", "-", f"{folder}/small", stdin=b"0123456789")
    droppex("put", "-", f"{folder}/large", stdin=LARGE)
    for text, part in (
        ("0-0", slice(0, 1)),
        ("2-4", slice(2, 5)),
        ("7-", slice(7, None)),
        ("-3", slice(-3, None)),
        ("8-100", slice(8, None)),
        ("-100", slice(None)),
    ):
        assert droppex("get", f"{folder}/small", "-", "--range", text).stdout == b"0123456789"[part]
    edge = 4 * MIB
    got = droppex.json("get", f"{folder}/large", "part", "--range", f"{edge - 5}-{edge + 4}")
    assert got["size"] == 10
    assert got["blake3"] is None
    assert (droppex.folder / "part").read_bytes() == LARGE[edge - 5 : edge + 5]
    assert droppex("get", f"{folder}/large", "-", "--range", "-77").stdout == LARGE[-77:]
    droppex("get", f"{folder}/small", "-", "--range", "4-2", code=2)
    assert "range" in droppex("get", f"{folder}/small", "x", "--range", "11-", code=2).stderr.decode()
    assert names_in(droppex.folder) == ["part"]


def test_any_name_works(droppex, folder):
    names = [
        "--help",
        "-dash",
        "a" * 200,
        "back\\slash",
        "new\nline",
        "smile 🙂 é",
        "tab\tq'\"$*?[x]",
        "with space",
    ]
    for name in names:
        (droppex.folder / name).write_bytes(name.encode())
    droppex("put", "--", *names, f"{folder}/")
    assert [one["name"] for one in droppex.json("ls", f"{folder}/")] == [f"{folder}/{name}" for name in names]
    for name in names:
        (droppex.folder / name).unlink()
    for name in ("--help", "new\nline", "smile 🙂 é"):
        droppex("get", "--", f"{folder}/{name}")
        assert (droppex.folder / name).read_bytes() == name.encode()
    droppex("get", "-r", folder, "out")
    assert read_tree(droppex.folder / "out") == {name: name.encode() for name in names}
    droppex("rm", "--", *[f"{folder}/{name}" for name in names])
    assert droppex.json("ls", f"{folder}/", code=3) == []


def test_a_leading_dash_without_a_folder(droppex):
    (droppex.folder / "-n").write_bytes(b"dash")
    droppex("put", "--force", "--", "-n")
    assert droppex("cat", "--", "-n").stdout == b"dash"
    droppex("rm", "--", "-n")


@pytest.mark.parametrize("name", ["", "/absolute", "a/../b", "x" * 1100])
def test_a_name_that_breaks_the_rules_is_2(droppex, name):
    assert len(droppex("put", "-", name, code=2).stderr.splitlines()) == 1
    assert names_in(droppex.folder) == []


def test_what_is_not_there(droppex, folder):
    assert "No such file" in droppex("put", "gone", f"{folder}/a", code=1).stderr.decode()
    assert "gone" in droppex("get", f"{folder}/gone", code=3).stderr.decode()
    droppex("cat", f"{folder}/gone", code=3)
    droppex("get", "-r", folder, "out", code=3)
    droppex("put", "-", f"{folder}/a", stdin=b"x")
    assert "No such file" in droppex("get", f"{folder}/a", "nowhere/a", code=1).stderr.decode()
    (droppex.folder / "sub").mkdir()
    assert "-r" in droppex("put", "sub", f"{folder}/b", code=2).stderr.decode()
    droppex("put", "-", f"{folder}/b", "--layout", "lots", code=2)


def test_time_and_mode_travel_with_a_file(droppex, folder):
    path = droppex.folder / "in"
    path.write_bytes(b"x")
    path.chmod(0o750)
    os.utime(path, ns=(1, 1_500_000_000_000_000_001))
    droppex("put", "in", f"{folder}/a")
    droppex("get", f"{folder}/a", "out")
    status = (droppex.folder / "out").stat()
    assert status.st_mtime_ns == 1_500_000_000_000_000_001
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(status.st_mode) == 0o750 & ~umask


def make_tree(root):
    files = {
        "empty": b"",
        "with space/a b.txt": b"spaces",
        "deep/er/and/deeper": b"deep",
        "large": LARGE,
        "new\nline/🙂": b"emoji",
        **{f"many/{number:03}": str(number).encode() for number in range(40)},
    }
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def read_tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_tree_comes_back_as_it_was(droppex, folder):
    files = make_tree(droppex.folder / "tree")
    (droppex.folder / "tree" / "link").symlink_to("/etc/hostname")
    result = droppex("put", "-r", "tree", f"{folder}/")
    assert len(result.stdout.splitlines()) == len(files)
    assert "link was left out" in result.stderr.decode()
    got = droppex.json("get", "-r", f"{folder}/tree", "out")
    assert sorted(one["name"] for one in got) == sorted(f"{folder}/tree/{name}" for name in files)
    assert read_tree(droppex.folder / "out") == files
    assert droppex("get", "-r", f"{folder}/tree", "into/", "--quiet").stdout == b""
    assert read_tree(droppex.folder / "into" / "tree") == files


def test_a_tree_goes_on_when_some_files_fail(droppex, folder):
    files = make_tree(droppex.folder / "tree")
    droppex("put", "-", f"{folder}/tree/empty", stdin=b"in the way")
    not_utf8 = droppex.folder / "tree" / os.fsdecode(b"\xff")
    not_utf8.mkdir()
    (not_utf8 / "bad").write_bytes(b"")
    result = droppex("put", "-r", "tree", f"{folder}/tree", code=1)
    told = result.stderr.decode().splitlines()
    assert len(told) == 3
    assert all(line.startswith("droppex: ") for line in told)
    assert f"{len(files) - 1} files; 2 failed" in told[-1]
    (droppex.folder / "out" / "large").mkdir(parents=True)
    result = droppex("get", "-r", f"{folder}/tree", "out", code=1)
    files["empty"] = b"in the way"
    del files["large"]
    assert read_tree(droppex.folder / "out") == files


def test_get_r_writes_nothing_outside_its_folder(droppex, folder):
    for name in ("link/a", "file", "sub/link/b", "ok"):
        droppex("put", "-", f"{folder}/{name}", stdin=b"remote")
    outside = droppex.folder / "outside"
    target = droppex.folder / "out"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (target / "sub").mkdir(parents=True)
    for link, place in (("link", outside), ("sub/link", ".."), ("file", outside / "kept")):
        (target / link).symlink_to(place)
    result = droppex("get", "-r", folder, "out", "--force", code=1)
    assert len(result.stderr.decode().splitlines()) == 3
    assert read_tree(outside) == {"kept": b"kept"}
    assert (target / "ok").read_bytes() == b"remote"
    assert not (target / "file").is_symlink()
    assert names_in(target) == ["file", "link", "ok", "sub"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_get_leaves_no_half_file(droppex, folder, number, code):
    droppex("put", "-", f"{folder}/a", stdin=LARGE * 16)
    with droppex.start("get", f"{folder}/a", "out", stdout=subprocess.DEVNULL) as process:
        waits_for(lambda: names_in(droppex.folder))
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in told
    left = names_in(droppex.folder)
    if number == signal.SIGKILL:
        (stale,) = left
        assert stale.startswith(".droppex-get-")
        assert stale.endswith(".part")
    else:
        assert left == []
    (droppex.folder / "out").unlink(missing_ok=True)
    droppex("get", f"{folder}/a", "out")
    assert (droppex.folder / "out").stat().st_size == 16 * len(LARGE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_put_stores_nothing(droppex, folder, number):
    with droppex.start("put", "-", f"{folder}/a") as process:
        process.stdin.write(LARGE)
        process.stdin.flush()
        process.send_signal(number)
        process.wait(timeout=60)
        told = process.stderr.read()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert b"Traceback" not in told
    droppex("stat", f"{folder}/a", code=3)


def test_a_reader_that_has_enough_is_no_error(droppex, folder):
    droppex("put", "-", f"{folder}/a", stdin=LARGE)
    with droppex.start("cat", f"{folder}/a") as process:
        assert process.stdout.read(10) == LARGE[:10]
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141
    assert told == b""


def test_lost_pools_are_made_up_for_and_too_many_are_named(start_cluster, new_droppex):
    with start_cluster("--pools", "4", "--layout", "2+2") as cluster:
        droppex = new_droppex(cluster)
        (droppex.folder / "in").write_bytes(LARGE)
        droppex("put", "in", "docs/a")
        (extent,) = droppex.json("stat", "docs/a")["extents"]
        by_index = {shard["index"]: shard["name"] for shard in extent["shards"]}
        cluster.kill_pools([by_index[0], by_index[1]])
        got = droppex.json("get", "docs/a", "out")
        assert got["rebuilt_chunks"] == 3
        assert (droppex.folder / "out").read_bytes() == LARGE
        cluster.kill_pools([by_index[2]])
        told = droppex("get", "docs/a", "gone", code=5).stderr.decode()
        assert "missing" in told
        assert names_in(droppex.folder) == ["in", "out"]
        assert droppex("put", "in", "docs/b", code=5).stdout == b""
        droppex("stat", "docs/b", code=3)
