"""Errors cross the wire as the class they were, with their text and details."""

import pytest

from droppexd import errors
from droppexd.errors import (
    ConfigError,
    DroppexError,
    NotEnoughShards,
    NotMaster,
    RemoteProtocolError,
    StoreFull,
    from_wire,
)
from droppexd.wire.messages import Failed

CLASSES = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DroppexError)),
    key=lambda cls: cls.__name__,
)


def made(error_class):
    if error_class is ConfigError:
        return ConfigError(["one problem", "another"])
    return error_class("what went wrong")


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_comes_out_of_the_wire_as_it_went_in(error_class):
    error = made(error_class)
    back = Failed.of(error).error()
    assert type(back) is error_class
    assert str(back) == str(error)
    assert back.details == error.details


def test_each_class_has_a_code_of_its_own():
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda cls: cls.__name__)
def test_each_class_says_in_one_sentence_when_it_is_raised(error_class):
    assert error_class.__doc__
    assert "\n\n" not in error_class.__doc__


def test_missing_shards_travel_with_the_error():
    error = NotEnoughShards("only 3 of 4", ["shard 1: gone", "shard 2: late"])
    back = Failed.of(error).error()
    assert isinstance(back, NotEnoughShards)
    assert back.missing == ("shard 1: gone", "shard 2: late")


def test_the_masters_address_travels_when_it_is_known():
    assert Failed.of(NotMaster("ask there", "tcp://127.0.0.1:1")).error().address == "tcp://127.0.0.1:1"
    assert Failed.of(NotMaster("nobody knows")).error().address == ""


def test_an_unknown_code_is_still_an_error_of_ours():
    error = from_wire("from-a-newer-release", "text", ["detail"])
    assert type(error) is DroppexError
    assert str(error) == "text"


def test_a_report_is_cut_to_what_fits_in_a_message():
    failed = Failed.of(NotEnoughShards("x" * 10_000, ["y" * 2000] * 300))
    assert len(failed.text) == 8192
    assert len(failed.details) == 256
    assert {len(detail) for detail in failed.details} == {1024}


def test_a_config_error_tells_all_problems_at_once():
    error = ConfigError(["port out of range", "no folder"])
    assert error.problems == ("port out of range", "no folder")
    assert str(error) == "port out of range\nno folder"


def test_narrower_errors_are_handled_with_the_broader_ones():
    assert isinstance(from_wire("store-full", "", []), errors.StoreError)
    assert isinstance(from_wire("timeout", "", []), errors.PeerError)
    assert isinstance(from_wire("version-mismatch", "", []), RemoteProtocolError)
    assert issubclass(StoreFull, DroppexError)
