"""What the doctor makes of key files, and of what the cluster says of them."""

import pytest

from droppexd.cli.daemon_keys import make_key
from droppexd.config import Config
from droppexd.doctor.keys import check_key_files, judge_membership, refused
from droppexd.model import MemberRecord, Role
from droppexd.wire.keys import read_member_key


@pytest.fixture
def keys(tmp_path):
    make_key(tmp_path, Role.POOL, "attic")
    return tmp_path


def config(keys, **changes):
    fields = {
        "roles": (Role.POOL,),
        "keys_own": (str(keys / "pool-attic.key"),),
        "keys_cluster": str(keys / "cluster.key"),
        "keys_members": str(keys / "members.toml"),
    }
    return Config(**(fields | changes))


def errors(verdicts):
    return [verdict for verdict in verdicts if verdict.level == "error"]


def test_keys_that_fit_are_a_line_each(keys):
    verdicts, usable = check_key_files(config(keys))
    assert [verdict.level for verdict in verdicts] == ["ok", "ok"]
    assert [key.member.name for key in usable] == ["attic"]


def test_without_keys_it_says_who_can_connect():
    verdicts, usable = check_key_files(Config(roles=(Role.POOL,)))
    assert (verdicts[0].level, usable) == ("ok", [])
    assert "this machine" in verdicts[0].text


def test_a_key_that_others_can_read_is_an_error(keys):
    (keys / "pool-attic.key").chmod(0o644)
    verdicts, usable = check_key_files(config(keys))
    (wrong,) = errors(verdicts)
    assert "pool-attic.key is open to others (mode 644): chmod 600 it" in wrong.text
    assert "revoke" in wrong.advice
    assert usable == []


@pytest.mark.parametrize("file", ["pool-attic.key", "cluster.key", "members.toml"])
def test_a_file_that_is_gone_is_named(keys, file):
    (keys / file).unlink()
    (wrong,) = errors(check_key_files(config(keys))[0])
    assert file in wrong.text
    assert "put it back" in wrong.advice


def test_a_key_of_another_cluster_is_an_error(keys, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_key(other, Role.POOL, "attic")
    verdicts, usable = check_key_files(config(keys, keys_own=(str(other / "pool-attic.key"),)))
    (wrong,) = errors(verdicts)
    assert "different clusters" in wrong.text
    assert usable == []


def test_a_role_without_a_key_is_an_error(keys):
    verdicts, usable = check_key_files(config(keys, roles=(Role.POOL, Role.APP)))
    (wrong,) = errors(verdicts)
    assert wrong.text == "there is no key for the role app"
    assert len(usable) == 1


def test_a_member_is_known_and_what_is_not_is_told(keys):
    key = read_member_key(keys / "pool-attic.key")
    record = MemberRecord(public=key.pair.public, role="pool", name="attic", joined_ms=1)
    assert judge_membership(key, [record]).level == "ok"
    assert judge_membership(key, []).level == "warning"
    revoked = MemberRecord(public=key.pair.public, role="pool", name="attic", joined_ms=1, revoked_ms=2)
    verdict = judge_membership(key, [revoked])
    assert verdict.level == "error"
    assert "revoked" in verdict.text
    assert "join-token" in verdict.advice
    other = MemberRecord(public=key.pair.public, role="app", name="nas", joined_ms=1)
    assert judge_membership(key, [other]).level == "error"
    assert "does not let the pool attic in" in refused(key, "it was revoked").text
