"""Join tokens as text, and the list of who is let in."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppexd.errors import ConfigError
from droppexd.model import MemberRecord, Role, TokenRecord
from droppexd.wire.keys import AllowList, Member, generate_keypair, keypair_of
from droppexd.wire.tokens import PREFIX, Token, format_token, parse_token

TOKEN = Token(
    secret=b"s" * 40,
    cluster_public=b"c" * 40,
    controllers=("tcp://10.0.0.1:7700", "tcp://[fd00::1]:7700"),
    roles=("pool", "app"),
)


def test_a_token_comes_back_from_its_line():
    line = format_token(TOKEN)
    assert parse_token(line) == TOKEN
    assert "\n" not in line
    wrapped = f" {line[:40]}\n  {line[40:]}\n"
    assert parse_token(wrapped) == TOKEN  # As a terminal or a mail may have it.


def test_a_token_does_not_show_its_secret_where_it_is_printed():
    assert "sss" not in repr(TOKEN)


@given(st.integers(len(PREFIX), len(format_token(TOKEN)) - 1), st.sampled_from("abcXYZ059-_"))
def test_a_token_with_another_letter_is_refused(at, letter):
    line = format_token(TOKEN)
    changed = line[:at] + letter + line[at + 1 :]
    if changed == line:
        return
    if at == len(line) - 1:  # It has bits that say nothing.
        with suppress(ConfigError):
            assert parse_token(changed) == TOKEN
        return
    with pytest.raises(ConfigError, match="damaged"):
        parse_token(changed)


@given(st.text(max_size=200))
def test_what_is_no_token_is_refused(text):
    with pytest.raises(ConfigError):
        parse_token(text)
    with pytest.raises(ConfigError):
        parse_token(PREFIX + text)


def test_a_token_cut_off_anywhere_is_refused():
    line = format_token(TOKEN)
    for end in range(len(line) - 1):
        with pytest.raises(ConfigError):
            parse_token(line[:end])


def test_the_public_key_follows_from_the_secret_one():
    pair = generate_keypair()
    assert keypair_of(pair.secret) == pair
    with pytest.raises(ConfigError):
        keypair_of(b"short")


def record(number, role="pool", *, revoked_ms=0):
    return MemberRecord(public=b"%040d" % number, role=role, name=f"{role}-{number}", revoked_ms=revoked_ms)


def test_founders_and_recorded_members_are_let_in_but_no_revoked_one():
    founder = b"f" * 40
    allowed = AllowList({founder: Member(Role.APP, "first"), record(3).public: Member(Role.POOL, "old")})
    assert allowed.get(founder) == Member(Role.APP, "first")
    assert allowed.get(record(1).public) is None
    allowed.learn(7, [record(1), record(2, revoked_ms=5), record(3, revoked_ms=6)])
    assert allowed.version == 7
    assert allowed.get(founder) == Member(Role.APP, "first")
    assert allowed.get(record(1).public) == Member(Role.POOL, "pool-1")
    assert allowed.get(record(2).public) is None
    assert allowed.get(record(3).public) is None  # Though the members file names it.
    allowed.learn(8, [record(1, revoked_ms=9)])
    assert allowed.get(record(1).public) is None


def test_a_token_is_let_in_as_a_joiner_and_never_in_place_of_a_member():
    token = TokenRecord(public=record(9).public, roles=("pool",), expires_ms=1, uses=1)
    clash = TokenRecord(public=record(1).public, roles=("pool",), expires_ms=1, uses=1)
    allowed = AllowList()
    allowed.learn(1, [record(1)], [token, clash])
    assert allowed.get(token.public) == Member(Role.JOINER, token.public.decode())
    assert allowed.get(record(1).public) == Member(Role.POOL, "pool-1")


def test_a_role_of_a_later_release_is_not_let_in():
    allowed = AllowList()
    allowed.learn(1, [record(1, role="gateway"), record(2, role="joiner")])
    assert allowed.get(record(1).public) is None
    assert allowed.get(record(2).public) is None
