"""Tokens and members in the catalogue: what is refused, and what is written."""

import random

import pytest
import trio
import trio.testing

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.enrolment import (
    MAX_TOKENS,
    USED_TOKEN_MS,
    AddFounders,
    AddToken,
    Enrol,
    ForgetTokens,
    Revoke,
)
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import Conflict, NotAuthorised, NotFound
from droppexd.model import MemberRecord, TokenRecord
from droppexd.runtime import Runtime

NOW = 1_700_000_000_000
HOUR = 3_600_000


class MockedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return NOW


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)


RUNTIME = Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=None)


def story(function):
    """Run an async test with a catalogue on the mock clock, then see that another opening reads the same."""

    def test():
        async def main():
            engine = SimulatedEngine(RUNTIME)
            async with open_catalogue(engine, RUNTIME) as catalogue:
                await function(catalogue)
                members, version, tokens = catalogue.members, catalogue.members_version, catalogue.tokens
            async with open_catalogue(engine, RUNTIME) as again:
                assert (again.members, again.members_version, again.tokens) == (members, version, tokens)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    test.__name__ = function.__name__
    return test


def key(number):
    return b"%040d" % number


def token(number=99, *roles, uses=1, expires_ms=NOW + HOUR):
    return AddToken(
        TokenRecord(public=key(number), roles=roles or ("pool",), expires_ms=expires_ms, uses=uses)
    )


def member(number, role="pool", name="one"):
    return MemberRecord(public=key(number), role=role, name=name)


def enrol(*members, by=99, now_ms=NOW):
    return Enrol(key(by), members, now_ms)


@story
async def test_a_token_lets_one_machine_in_and_is_worth_nothing_then(catalogue):
    await catalogue.change_members(token())
    await catalogue.change_members(enrol(member(1)))
    (record,) = catalogue.members.values()
    assert (record.role, record.name, record.joined_ms, record.token) == ("pool", "one", NOW, key(99))
    with pytest.raises(NotAuthorised, match="was used"):
        await catalogue.change_members(enrol(member(2, name="two")))
    assert list(catalogue.members) == [key(1)]
    assert catalogue.members_version == 1


@story
async def test_who_joined_may_ask_again_for_a_minute(catalogue):
    await catalogue.change_members(token())
    await catalogue.change_members(enrol(member(1)))
    await catalogue.change_members(enrol(member(1), now_ms=NOW + USED_TOKEN_MS - 1))
    assert catalogue.members_version == 1
    with pytest.raises(NotAuthorised, match="expired"):
        await catalogue.change_members(enrol(member(1), now_ms=NOW + USED_TOKEN_MS))
    await catalogue.change_members(ForgetTokens(NOW + USED_TOKEN_MS))
    assert not catalogue.tokens


@story
async def test_an_expired_token_is_refused_and_forgotten(catalogue):
    await catalogue.change_members(token(expires_ms=NOW))
    await catalogue.change_members(token(98))
    with pytest.raises(NotAuthorised, match="expired"):
        await catalogue.change_members(enrol(member(1)))
    await catalogue.change_members(ForgetTokens(NOW))
    assert list(catalogue.tokens) == [key(98)]


@story
async def test_a_token_for_some_machines_counts_them(catalogue):
    await catalogue.change_members(token(uses=2))
    await catalogue.change_members(enrol(member(1)))
    await catalogue.change_members(enrol(member(1)))  # Asked again, and not counted.
    await catalogue.change_members(enrol(member(2, name="two")))
    with pytest.raises(NotAuthorised):
        await catalogue.change_members(enrol(member(3, name="three")))


@story
async def test_a_token_is_for_its_roles_alone(catalogue):
    await catalogue.change_members(token(99, "pool", "app"))
    for role in ("controller", "client"):
        with pytest.raises(NotAuthorised, match=f"for pool and app, and not for {role}"):
            await catalogue.change_members(enrol(member(1, "pool"), member(2, role)))
    assert not catalogue.members
    await catalogue.change_members(enrol(member(1, "pool"), member(2, "app")))
    assert {record.role for record in catalogue.members.values()} == {"pool", "app"}


@story
async def test_nothing_is_written_of_what_is_refused(catalogue):
    await catalogue.change_members(token(99, "pool", "app", uses=5))
    await catalogue.change_members(enrol(member(1, "app")))
    with pytest.raises(Conflict, match="the name 'one' is that of another app"):
        await catalogue.change_members(enrol(member(2, "pool"), member(3, "app")))
    with pytest.raises(Conflict, match="on record already"):
        await catalogue.change_members(enrol(member(4, "pool"), member(1, "app", "other")))
    with pytest.raises(Conflict, match="on record already"):
        await catalogue.change_members(enrol(member(5, "pool"), member(5, "app", "other")))
    assert list(catalogue.members) == [key(1)]
    assert catalogue.tokens[key(99)].uses == 4


@story
async def test_a_revoked_member_is_out_for_ever_and_its_name_is_free(catalogue):
    await catalogue.change_members(token(uses=5))
    await catalogue.change_members(enrol(member(1)))
    (revoked,) = await catalogue.change_members(Revoke("", "one", NOW + 1))
    assert (revoked.public, revoked.revoked_ms) == (key(1), NOW + 1)
    assert catalogue.members_version == 2
    with pytest.raises(NotFound, match="there is no member 'one'"):
        await catalogue.change_members(Revoke("", "one", NOW + 1))
    with pytest.raises(Conflict, match="revoked"):
        await catalogue.change_members(enrol(member(1, name="again")))
    with pytest.raises(Conflict, match="revoked"):
        await catalogue.change_members(enrol(member(1)))  # Nor by asking for the same once more.
    await catalogue.change_members(enrol(member(2)))
    await catalogue.change_members(AddFounders([member(1)]))  # As the members file still has it.
    assert catalogue.members[key(1)].revoked_ms


@story
async def test_a_name_of_several_roles_needs_the_role(catalogue):
    await catalogue.change_members(AddFounders([member(1, "pool"), member(2, "app")]))
    with pytest.raises(Conflict, match="several members, app and pool: say which with --role"):
        await catalogue.change_members(Revoke("", "one", NOW))
    (revoked,) = await catalogue.change_members(Revoke("app", "one", NOW))
    assert revoked.role == "app"
    (revoked,) = await catalogue.change_members(Revoke("", "one", NOW))
    assert revoked.role == "pool"


@story
async def test_founders_are_entered_once(catalogue):
    await catalogue.change_members(AddFounders([member(1), member(2, "app")]))
    await catalogue.change_members(AddFounders([member(1, name="other")]))
    assert catalogue.members[key(1)].name == "one"
    assert catalogue.members_version == 1


@story
async def test_there_are_so_many_tokens_and_no_more(catalogue):
    for number in range(MAX_TOKENS):
        await catalogue.change_members(token(number))
    with pytest.raises(Conflict, match="join tokens that have not expired"):
        await catalogue.change_members(token(MAX_TOKENS))
