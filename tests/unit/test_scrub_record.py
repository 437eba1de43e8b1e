"""What is remembered of a scrub, and how fast it has to go."""

import json
import math

import pytest

from droppexd.errors import IntegrityError
from droppexd.model import ExtentId, VersionId
from droppexd.roles.pool_check import CheckedShard, ShardState
from droppexd.roles.scrub_record import (
    MOST_FINDINGS,
    SLICES,
    ScrubPass,
    ScrubRecord,
    due_shards,
    expected_size,
    next_slice_s,
)

DAY_S = 86400.0
EVERY_S = 30 * DAY_S

FINDING = CheckedShard(
    ExtentId(5, 6), 2, ShardState.DAMAGED, 300, (1, 7), "piece 1 does not fit", "files/ü", VersionId(5, 1)
)
BARE = CheckedShard(ExtentId(5, 7), 0, ShardState.ABSENT, reason="gone")


def a_pass(**fields):
    return ScrubPass(**{"number": 3, "requested": False, "begun_ms": 17, **fields})


@pytest.mark.parametrize(
    "record",
    [
        ScrubRecord(),
        ScrubRecord(current=a_pass(), since_s=12.5, written_ms=99),
        ScrubRecord(
            current=a_pass(number=8, requested=True, after=(ExtentId(2**47, 1), 5), shards=4, size=2**40),
            last=a_pass(ended_ms=5, trouble="no more", unreadable=1).found(FINDING).found(BARE),
            since_s=0.0,
            written_ms=1,
        ),
    ],
)
def test_a_record_comes_back_from_json_as_it_was(record):
    assert ScrubRecord.from_fields(json.loads(json.dumps(record.to_fields()))) == record


def changed(**changes):
    fields = ScrubRecord(current=a_pass().found(FINDING), since_s=1.0).to_fields()
    return {**fields, **changes}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        changed(record=2),
        changed(since_s="soon"),
        changed(written_ms=None),
        changed(current=[1]),
        changed(current={"number": 1}),
        changed(current={**changed()["current"], "after": [1, 2]}),
        changed(current={**changed()["current"], "findings": [{"place": None}]}),
    ],
)
def test_a_record_that_is_none_is_an_integrity_error(fields):
    with pytest.raises(IntegrityError, match="malformed"):
        ScrubRecord.from_fields(fields)


def test_findings_beyond_the_most_are_only_counted():
    one = a_pass()
    for _ in range(MOST_FINDINGS + 5):
        one = one.found(FINDING)
    assert (one.lost, len(one.findings)) == (MOST_FINDINGS + 5, MOST_FINDINGS)
    unreadable = one.found(FINDING._replace(state=ShardState.UNREADABLE))
    assert (unreadable.lost, unreadable.unreadable) == (MOST_FINDINGS + 5, 1)


def test_numbers_go_up():
    assert ScrubRecord().next_number == 1
    assert ScrubRecord(current=a_pass(number=7), last=a_pass(number=6)).next_number == 8
    assert ScrubRecord(last=a_pass(number=6)).next_number == 7


@pytest.mark.parametrize("held", [1, 2, 719, 720, 100_000])
def test_what_is_due_grows_evenly_from_the_first_portion_to_everything(held):
    moments = [EVERY_S * part / 1000 for part in range(1001)]
    due = [due_shards(moment, EVERY_S, held) for moment in moments]
    assert due[0] == math.ceil(held / SLICES)
    assert due == sorted(due)
    assert due[-1] == held
    for moment, shards in zip(moments, due, strict=True):
        exact = held * moment / EVERY_S
        assert exact - 1 <= shards <= exact + held / SLICES + 1


def test_nothing_is_due_of_nothing():
    assert due_shards(0.0, EVERY_S, 0) == due_shards(EVERY_S, EVERY_S, 0) == 0


@pytest.mark.parametrize("since_s", [0.0, 1.0, 3599.0, 3600.0, 12345.6])
def test_more_is_due_after_the_next_slice_and_not_before(since_s):
    held = 10 * SLICES
    pause_s = next_slice_s(since_s, EVERY_S)
    now = due_shards(since_s, EVERY_S, held)
    assert due_shards(since_s + pause_s * 0.99, EVERY_S, held) == now
    assert due_shards(since_s + pause_s + 0.001, EVERY_S, held) == now + 10


def test_the_expected_size_is_that_of_shards_like_those_that_were_read():
    last = a_pass(shards=10, size=1000)
    assert expected_size(a_pass(), None, 50) == 0
    assert expected_size(a_pass(), last, 50) == 5000
    assert expected_size(a_pass(shards=2, size=400), last, 50) == 10_000
    assert expected_size(a_pass(shards=60, size=700), last, 50) == 700
