"""The signed document that says where the controllers are."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppexd.bucket import (
    MAX_BYTES,
    BucketError,
    Whereabouts,
    make_signing_key,
    read_file,
    read_signing_key,
    sign,
    verify,
    write_file,
)
from droppexd.errors import ConfigError

SECRET = bytes(range(32))
TOLD = Whereabouts(
    cluster_id=bytes(16),
    term=7,
    master="tcp://10.0.0.1:7700",
    controllers=("tcp://10.0.0.1:7700", "tcp://10.0.0.2:7700"),
    written_ms=1_700_000_000_000,
)


@pytest.fixture
def public(tmp_path):
    from nacl.signing import SigningKey

    return bytes(SigningKey(SECRET).verify_key)


def test_what_was_signed_is_read(public):
    assert verify(sign(TOLD, SECRET), public) == TOLD
    alone = TOLD._replace(controllers=(), term=0)
    assert verify(sign(alone, SECRET), public) == alone


def test_no_other_key_and_no_other_text_is_believed(public):
    document = json.loads(sign(TOLD, SECRET))
    with pytest.raises(BucketError, match="signature is wrong"):
        verify(sign(TOLD, bytes(32)), public)
    document["says"] = document["says"].replace("10.0.0.1", "10.0.0.9")
    with pytest.raises(BucketError, match="signature is wrong"):
        verify(json.dumps(document).encode(), public)


@given(st.data())
def test_no_document_with_another_byte_says_something_else(data):
    from nacl.signing import SigningKey

    public = bytes(SigningKey(SECRET).verify_key)
    document = bytearray(sign(TOLD, SECRET))
    document[data.draw(st.integers(0, len(document) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        told = verify(bytes(document), public)
    except BucketError:
        return
    assert told == TOLD  # White space around what is signed, or the case of a digit of the signature.


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[]", b"3", b'{"says": 3, "signature": ""}', b'{"says": "x", "signature": "zz"}', b"\xff",
     b'{"signature": "00"}', b" " * (MAX_BYTES + 1), b"[" * MAX_BYTES, b'{"says": ' * 5000],
)  # fmt: skip
def test_rubbish_is_refused(document, public):
    with pytest.raises(BucketError):
        verify(document, public)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"cluster_id": "00"},
        {"term": "7"},
        {"term": -1},
        {"master": "http://10.0.0.1"},
        {"controllers": ["tcp://a:1"] * 65},
        {"controllers": [3]},
        {"controllers": None},
        {"master": "tcp://" + "a" * 300 + ":1"},
        {"master": "tcp://10.0.0.1"},
        {"master": "tcp://10.0.0.1:0"},
        {"master": "tcp://10.0.0.1:65536"},
        {"master": "tcp://*:7700"},
        {"controllers": ["tcp://10.0.0.1:7700 "]},
        {"written_ms": float("inf")},
    ],
)
def test_fields_that_cannot_be_are_refused_though_they_are_signed(change, public):
    from nacl.signing import SigningKey

    text = json.dumps(json.loads(json.loads(sign(TOLD, SECRET))["says"]) | change)
    signature = SigningKey(SECRET).sign(text.encode()).signature.hex()
    with pytest.raises(BucketError, match="not understood"):
        verify(json.dumps({"says": text, "signature": signature}).encode(), public)


def test_keys_are_made_once_for_their_owner_alone(tmp_path):
    file = tmp_path / "bucket.key"
    public = make_signing_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert verify(sign(TOLD, read_signing_key(file, bytes.fromhex(public))), bytes.fromhex(public)) == TOLD
    with pytest.raises(ConfigError, match="cannot write"):
        make_signing_key(file)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="open to others"):
        read_signing_key(file, bytes.fromhex(public))
    file.chmod(0o600)
    file.write_text("rubbish")
    with pytest.raises(ConfigError, match="no signing key"):
        read_signing_key(file, bytes.fromhex(public))
    with pytest.raises(ConfigError, match="cannot read"):
        read_signing_key(tmp_path / "nowhere", bytes.fromhex(public))


def test_a_signing_key_that_does_not_belong_to_the_public_key_is_refused(tmp_path, public):
    other = make_signing_key(tmp_path / "other.key")
    with pytest.raises(ConfigError, match=f"nobody would believe.*{other}"):
        read_signing_key(tmp_path / "other.key", public)


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "droppex.json"
    with pytest.raises(BucketError, match="No such file"):
        read_file(file)
    write_file(file, b"one")
    write_file(file, b"two")
    assert read_file(file) == b"two"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(BucketError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "droppex.json", b"")


def test_a_file_is_not_mixed_of_what_two_processes_with_one_id_write(tmp_path, monkeypatch):
    file = tmp_path / "droppex.json"
    flush = os.fsync

    def another_writes(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        write_file(file, b"the other's, which is longer")
        assert read_file(file) == b"the other's, which is longer"
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", another_writes)
    write_file(file, b"mine")
    assert read_file(file) == b"mine"
    assert list(tmp_path.iterdir()) == [file]
