"""`verify` and `droppexd pool check`, as a user types them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LARGE = 9_000_000
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def breakable(start_cluster):
    """A cluster of three pools, whose shards are flipped and whose last pool is killed in the end."""
    with start_cluster("--pools", "3") as running:
        yield running


@pytest.fixture
def verifying(breakable, new_droppex):
    return new_droppex(breakable)


@pytest.fixture(scope="module")
def pool_check():
    def run(*arguments, code):
        command = [sys.executable, "-W", "error", "-m", "droppexd", "pool", "check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (done.stdout, done.stderr)
        return done

    return run


def flip(file, offset):
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_everything_and_one_file_are_sound(verifying):
    verifying("put", "-", "docs/large", stdin=os.urandom(LARGE))
    verifying("put", "-", "docs/small", stdin=b"small")
    verifying("put", "-", "docs/empty")
    report = verifying.json("verify")
    assert report["sound"]
    assert (report["shards"], report["lost"], report["unreadable"], report["unasked"]) == (5, 0, 0, 0)
    assert len(report["pools"]) == 3
    *pools, summary = verifying.lines("verify")
    assert len(pools) == 4
    assert "verified 5 shards" in summary
    assert summary.endswith("all is sound")
    (line,) = verifying.lines("verify", "docs/large")
    assert line.startswith("docs/large: 3 shards of 1 extent: 3 sound; verified 12.9 MiB")
    (line,) = verifying.lines("verify", "docs/empty")
    assert line.endswith("kept in the catalogue alone")
    assert verifying("verify", "--quiet").stdout == b""
    assert verifying("--json", "verify", "docs/small", "-q").stdout
    pools = verifying.json("pools")
    assert {pool["scrub"]["lost"] for pool in pools} == {0}


def test_a_name_that_is_none_is_3_and_a_wrong_one_2(verifying):
    assert b"docs/none" in verifying("verify", "docs/none", code=3).stderr
    verifying("verify", "docs//none", code=2)
    verifying("verify", "a", "b", code=2)


def test_on_a_terminal_a_bar_moves(verifying):
    ours, theirs = os.openpty()
    with verifying.start("verify", stdin=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux's way to say that nobody has the other end open.
                break
            shown += data
        assert process.wait(60) == 0
        assert b"all is sound" in process.stdout.read()
    os.close(ours)
    assert b"verifying" in shown


def test_damage_is_named_by_file_and_pool_and_is_1_and_is_mended(verifying, breakable):
    verifying("put", "-", "docs/damaged", stdin=os.urandom(LARGE))
    (extent,) = verifying.json("stat", "docs/damaged")["extents"]
    pools = {pool["name"]: pool["data"] for pool in breakable.of_role("pool")}
    holder = extent["shards"][0]["name"]
    session, counter = (int(part, 16) for part in extent["id"].split("-"))
    (file,) = (Path(pools[holder]) / "large").glob(f"*/{session:012x}{counter:012x}-00")
    flip(file, 5000)
    result = verifying("verify", "docs/damaged", code=1).stdout.decode()
    assert f"damaged: shard 0 of extent 0 on {holder}" in result
    assert "2 sound, 1 damaged" in result
    deadline = time.monotonic() + PATIENCE_S
    while verifying.json("verify", "docs/damaged", code=None)["sound"] != 3:
        assert time.monotonic() < deadline, "the damaged shard is not mended"
        time.sleep(0.2)


def test_pools_that_are_away_make_it_6_and_their_folders_can_be_checked(verifying, breakable, pool_check):
    last = breakable.of_role("pool")[-1]
    assert "in use by another droppexd" in pool_check("--data", last["data"], code=1).stderr
    breakable.kill_pools([last["name"]])
    report = verifying.json("verify", code=6)
    assert [pool["name"] for pool in report["pools"] if pool["error"]] == [last["name"]]
    assert not report["sound"]
    assert b"1 pool not asked" in verifying("verify", code=6).stdout
    report = verifying.json("verify", "docs/large", code=6)
    assert (report["sound"], report["unreachable"], report["survives_pools"]) == (2, 1, 0)
    report = json.loads(pool_check("--data", last["data"], "--json", code=0).stdout)
    assert report["sound"]
    assert report["shards"] >= 2
    assert pool_check("--data", last["data"], code=0).stdout.strip().endswith("all is sound")
    assert pool_check("--data", last["data"], "--quiet", code=0).stdout == ""
