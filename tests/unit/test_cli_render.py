"""What `droppex` prints."""

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.cli.exits import ReaderGone
from droppexd.cli.progress import NoMeter, progress_meter
from droppexd.cli.render import (
    Items,
    Output,
    count_text,
    described_document,
    described_lines,
    entry_document,
    entry_line,
    losses_text,
    pool_document,
    pool_lines,
    problems,
    rate_text,
    receipt_document,
    receipt_line,
    size_text,
    status_document,
    status_lines,
    table,
    time_document,
    trouble_lines,
)
from droppexd.model import (
    ClusterStatus,
    ExtentId,
    ExtentPlaces,
    FileEntry,
    Layout,
    PoolInfo,
    Receipt,
    ShardPlace,
    SurvivalCount,
    VersionId,
)
from droppexd.wire.messages import Described, Status

NASTY = "docs/a\x1b[31m\nb"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def output_to(stdout, stderr=None, **options):
    options = {"quiet": False, "as_json": False, **options}
    return Output(stdout=stdout, stderr=stderr or io.StringIO(), **options)


RECEIPT = Receipt(
    name="docs/a",
    version=VersionId(1, 16),
    size=1536,
    blake3=bytes(32),
    layout="4+2",
    survives_pools=2,
    survives_machines=1,
    note="one pool was slow",
)
DESCRIBED = Described(
    name="docs/a",
    version=VersionId(1, 2),
    size=5,
    blake3=bytes(32),
    created_ms=1_700_000_000_123,
    names=1,
    metadata=(("mtime", "1.000000000"), ("mode", "644")),
    extents=(
        ExtentPlaces(
            id=ExtentId(1, 3),
            layout=Layout(1, 1),
            size=5,
            shards=(
                ShardPlace(index=0, pool=1, name="pool-1", machine="m", state="up"),
                ShardPlace(index=1, pool=0, name="", machine="", state="missing"),
            ),
        ),
    ),
    survives_pools=0,
    survives_machines=0,
)


def pool(**changes):
    fields = {
        "number": 1,
        "pool_id": bytes(16),
        "name": "pool-1",
        "machine": "m",
        "zone": "",
        "address": "tcp://127.0.0.1:1",
        "state": "up",
        "membership": "member",
        "capacity": 2048,
        "free": 1024,
    }
    return PoolInfo(**{**fields, **changes})


def status(**changes):
    fields = {
        "cluster_id": bytes(16),
        "term": 1,
        "files": 3,
        "size": 10,
        "extents": 2,
        "garbage": 0,
        "survival": (SurvivalCount(survives=2, files=3, extents=2),),
        "pools": (pool(),),
        "controllers": ("tcp://127.0.0.1:2",),
        "sessions": 1,
    }
    return Status(status=ClusterStatus(**{**fields, **changes}), apps=("tcp://127.0.0.1:3",))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (100 * 1024**2, "100.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2**63, "8.0 EiB"),
    ],
)
def test_sizes_for_people_are_binary(size, text):
    assert size_text(size) == text
    assert size_text(size, exact=True) == str(size)


@settings(max_examples=200, deadline=None)
@given(st.integers(1024, 2**63))
def test_a_size_for_people_has_at_most_four_digits_and_is_near(size):
    number, unit = size_text(size).split()
    assert 1 <= float(number) < 1024
    power = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB").index(unit) + 1
    assert abs(float(number) * 1024**power - size) <= 0.06 * 1024**power


def test_words():
    assert count_text(1, "file") == "1 file"
    assert count_text(0, "file") == "0 files"
    assert rate_text(1024, 0.5) == "2.0 KiB/s"
    assert rate_text(1024, 0) == "-"
    assert time_document(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"


def test_tables_are_aligned():
    assert table([("a", "10", "x"), ("long", "9", "y")], right=(1,)) == ["a     10  x", "long   9  y"]
    assert table([]) == []


@pytest.mark.parametrize(
    ("pools", "machines", "words"),
    [
        (2, 1, "2 pools or 1 machine"),
        (2, 0, "but of no machine"),
        (0, 0, "no loss"),
        (-1, 0, "cannot be read"),
        (None, None, "kept in the catalogue alone"),
    ],
)
def test_losses_are_told_in_words(pools, machines, words):
    assert words in losses_text(pools, machines)


def test_names_are_escaped_on_terminals_only():
    entry = FileEntry(name=NASTY, size=5, created_ms=0)
    assert entry_line(entry, output_to(Terminal()), long=False, exact=False) == "docs/a\\x1b[31m\\nb"
    assert entry_line(entry, output_to(io.StringIO()), long=False, exact=False) == NASTY


def test_long_listings_have_size_and_time():
    output = output_to(io.StringIO())
    entry = FileEntry(name="docs/a", size=1536, created_ms=1_700_000_000_000)
    line = entry_line(entry, output, long=True, exact=False)
    assert line.split()[:2] == ["1.5", "KiB"]
    assert line.endswith("  docs/a")
    assert entry_line(entry, output, long=True, exact=True).split()[0] == "1536"
    folder = entry_line(FileEntry(name="docs/", folder=True), output, long=True, exact=False)
    assert folder.index("docs/") == line.index("docs/a")


def test_the_receipt():
    assert receipt_document(RECEIPT) == {
        "name": "docs/a",
        "version": "1-10",
        "size": 1536,
        "blake3": "00" * 32,
        "layout": "4+2",
        "survives_pools": 2,
        "survives_machines": 1,
        "replaced": False,
        "note": "one pool was slow",
    }
    line = receipt_line(RECEIPT)
    for part in (
        "stored docs/a",
        "1.5 KiB",
        "4+2",
        "2 pools or 1 machine",
        "1-10",
        "00" * 32,
        "one pool was slow",
    ):
        assert part in line
    assert "\n" not in line


def test_an_empty_file_is_kept_in_the_catalogue_alone():
    nothing = {"size": 0, "survives_pools": None, "survives_machines": None}
    receipt = replace(RECEIPT, layout="", **nothing)
    described = replace(DESCRIBED, extents=(), **nothing)
    for document in (receipt_document(receipt), described_document(described)):
        assert [document[key] for key in ("layout", "survives_pools", "survives_machines")] == [None] * 3
    words = "kept in the catalogue alone"
    assert f"0 B, {words}, version" in receipt_line(receipt)
    lines = described_lines(described, output_to(io.StringIO()), exact=False)
    assert {"layout    -", f"losses    {words}"} <= set(lines)
    reply = status(files=2, empty_files=2, survival=())
    assert f"2 empty files {words}" in "\n".join(status_lines(reply, exact=False))
    assert status_document(reply)["empty_files"] == 2
    assert problems(reply.status) == []


def test_entries_for_programs():
    entry = FileEntry(name=NASTY, size=5, created_ms=0, version=VersionId(1, 2))
    assert entry_document(entry) == {
        "name": NASTY,
        "folder": False,
        "size": 5,
        "created": "1970-01-01T00:00:00.000Z",
        "version": "1-2",
    }
    assert entry_document(FileEntry(name="docs/", folder=True)) == {"name": "docs/", "folder": True}


def test_a_description_names_every_shard():
    document = described_document(DESCRIBED)
    assert json.loads(json.dumps(document)) == document
    assert document["metadata"] == {"mtime": "1.000000000", "mode": "644"}
    assert document["extents"][0]["shards"] == [
        {"index": 0, "pool": 1, "name": "pool-1", "machine": "m", "state": "up"},
        {"index": 1, "pool": 0, "name": "", "machine": "", "state": "missing"},
    ]
    text = "\n".join(described_lines(DESCRIBED, output_to(io.StringIO()), exact=False))
    assert "pool-1" in text
    assert "missing" in text
    assert "parity" in text


def test_a_healthy_cluster_needs_nobody():
    assert problems(status().status) == []
    assert status_lines(status(), exact=False)[-1] == "all is well"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pools": (pool(state="down"),)}, "pool pool-1 on m is down"),
        ({"pools": (pool(state="read-only"),)}, "read-only"),
        ({"survival": (SurvivalCount(survives=-1, files=2, extents=2),)}, "2 files cannot be read"),
        ({"survival": (SurvivalCount(survives=0, files=1, extents=1),)}, "1 file would not survive"),
        ({"warnings": ("no standby",)}, "no standby"),
    ],
)
def test_what_needs_a_person_is_said(changes, words):
    reply = status(**changes)
    assert words in problems(reply.status)[0]
    assert words in status_lines(reply, exact=False)[-1]
    assert status_document(reply)["problems"] == problems(reply.status)


def test_a_removed_pool_may_be_away():
    assert problems(status(pools=(pool(state="out", membership="removed"),)).status) == []


def test_the_status_for_programs():
    document = status_document(status())
    assert json.loads(json.dumps(document)) == document
    assert document["pools"][0]["state"] == "up"
    assert document["survival"] == [{"survives": 2, "files": 3, "extents": 2}]
    assert document["apps"] == ["tcp://127.0.0.1:3"]


def test_why_a_pool_takes_no_writes_is_told():
    failed = pool(state="read-only", trouble="its disk failed: \x1b[2Ja flush failed")
    assert trouble_lines((pool(number=2), failed)) == [
        "pool-1 takes no writes: its disk failed: \\x1b[2Ja flush failed"
    ]
    assert pool_document(failed)["trouble"] == failed.trouble
    assert pool_document(pool())["trouble"] is None


def test_no_pools_is_said_in_words():
    assert pool_lines((), exact=False) == ["no pool has announced itself yet"]
    assert len(pool_lines((pool(), pool(number=2)), exact=True)) == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_items_are_one_json_document(count):
    stdout = io.StringIO()
    with Items(output_to(stdout, as_json=True)) as items:
        for number in range(count):
            items.add({"number": number, "name": NASTY})
    assert [one["number"] for one in json.loads(stdout.getvalue())] == list(range(count))


def test_items_are_a_document_even_when_an_error_ends_them():
    stdout = io.StringIO()

    def broken_off():
        with Items(output_to(stdout, as_json=True)) as items:
            items.add({"number": 1})
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert json.loads(stdout.getvalue()) == [{"number": 1}]


def test_what_quiet_and_json_leave_out():
    for options, said, noted in (
        ({}, "done\n", "droppex: by the way\n"),
        ({"quiet": True}, "", ""),
        ({"as_json": True}, "", "droppex: by the way\n"),
    ):
        stdout, stderr = io.StringIO(), io.StringIO()
        output = output_to(stdout, stderr, **options)
        output.say("done")
        output.note("by the way")
        assert (stdout.getvalue(), stderr.getvalue()) == (said, noted)
        output.error(KeyError("x"))
        assert stderr.getvalue() != noted


def test_a_closed_reader_ends_the_output():
    output = output_to(Closed(), Closed())
    with pytest.raises(ReaderGone):
        output.line("x")
    with pytest.raises(ReaderGone):
        output.flush()
    with pytest.raises(ReaderGone):
        output.note("x")
    with pytest.raises(ReaderGone), Items(output_to(Closed(), as_json=True)):
        pass


@pytest.mark.parametrize(("stderr", "quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_there_is_no_bar_without_a_terminal_or_with_quiet(stderr, quiet):
    with progress_meter(output_to(io.StringIO(), stderr, quiet=quiet), "put") as meter:
        assert isinstance(meter, NoMeter)
        meter.expect(5)
        meter.advance(5)
        meter.finish_file()
    assert stderr.getvalue() == ""


def test_a_bar_is_drawn_on_standard_error_of_a_terminal(capfd):
    stdout = io.StringIO()
    output = output_to(stdout, Terminal())
    with progress_meter(output, "put") as meter:
        for size in (10, None, 20):
            meter.expect(size)
            meter.advance(10)
            meter.advance(-10)
            meter.finish_file()
        output.line("a result")
        output.note("a note")
    assert stdout.getvalue() == "a result\n"
    assert "a note" in capfd.readouterr().err
