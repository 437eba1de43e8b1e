"""Key files: who may read them, what is wrong with them, all of it at once."""

import pytest

from droppexd.errors import ConfigError
from droppexd.model import Role
from droppexd.wire.keys import (
    KeyPair,
    Member,
    MemberKey,
    format_member,
    generate_keypair,
    load_keys,
    read_cluster_key,
    read_member_key,
    read_members,
    write_cluster_key,
    write_member_key,
)


@pytest.fixture
def files(tmp_path):
    cluster, own = generate_keypair(), generate_keypair()
    member = Member(Role.POOL, "pool-1")
    write_cluster_key(tmp_path / "cluster.key", cluster)
    write_member_key(
        tmp_path / "pool-1.key", MemberKey(member=member, pair=own, cluster_public=cluster.public)
    )
    (tmp_path / "members.toml").write_text("# who is let in\n" + format_member(own.public, member))
    return tmp_path, cluster, own, member


def test_keys_come_back_from_their_files(files):
    folder, cluster, own, member = files
    assert read_cluster_key(folder / "cluster.key") == cluster
    assert read_member_key(folder / "pool-1.key") == MemberKey(
        member=member, pair=own, cluster_public=cluster.public
    )
    keys = load_keys(folder / "pool-1.key", cluster=folder / "cluster.key", members=folder / "members.toml")
    assert (keys.own, keys.cluster_public, keys.cluster_secret) == (own, cluster.public, cluster.secret)
    assert keys.allowed.founders == {own.public: member}
    assert keys.allowed.get(own.public) == member
    assert load_keys(folder / "pool-1.key").cluster_secret is None


def test_secret_files_are_private_and_never_overwritten(files):
    folder, *_ = files
    for name in ("cluster.key", "pool-1.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    before = (folder / "cluster.key").read_bytes()
    with pytest.raises(ConfigError, match="cannot write"):
        write_cluster_key(folder / "cluster.key", generate_keypair())
    assert (folder / "cluster.key").read_bytes() == before


def test_a_secret_file_that_others_can_read_is_refused(files):
    folder, *_ = files
    (folder / "pool-1.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_member_key(folder / "pool-1.key")


def test_secrets_are_not_printed(files):
    folder, cluster, own, _ = files
    keys = load_keys(folder / "pool-1.key", cluster=folder / "cluster.key")
    shown = f"{keys!r} {keys} {own!r} {own} {read_member_key(folder / 'pool-1.key')}"
    assert own.secret.decode() not in shown
    assert cluster.secret.decode() not in shown


def test_all_problems_are_told_at_once(files):
    folder, *_ = files
    (folder / "pool-1.key").write_text('role = "king"\nname = "pool-1"\n')
    (folder / "cluster.key").chmod(0o644)
    (folder / "members.toml").write_text("[[member")
    with pytest.raises(ConfigError) as caught:
        load_keys(folder / "pool-1.key", cluster=folder / "cluster.key", members=folder / "members.toml")
    assert len(caught.value.problems) == 3


def test_the_members_file_is_checked_line_by_line(tmp_path):
    key = generate_keypair().public.decode()
    path = tmp_path / "members.toml"
    path.write_text(
        f'[[member]]\nrole = "pool"\nname = "a"\npublic = "{key}"\n'
        f'[[member]]\nrole = "pool"\nname = "b"\npublic = "{key}"\n'
        f'[[member]]\nrole = "pool"\nname = "with space"\npublic = "{key}"\n'
        '[[member]]\nrole = "pool"\nname = "c"\npublic = "short"\n'
        f'[[member]]\nname = "d"\npublic = "{key}"\n'
    )
    with pytest.raises(ConfigError) as caught:
        read_members(path)
    assert [problem.partition("member ")[2].partition(":")[0] for problem in caught.value.problems] == list(
        "2345"
    )
    path.write_text("member = 3")
    with pytest.raises(ConfigError, match="tables"):
        read_members(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_members(tmp_path / "absent")


def test_keys_of_another_cluster_are_noticed(files, tmp_path):
    folder, *_ = files
    write_cluster_key(tmp_path / "other.key", generate_keypair())
    with pytest.raises(ConfigError, match="different clusters"):
        load_keys(folder / "pool-1.key", cluster=tmp_path / "other.key")


def test_a_member_needs_a_plain_name(tmp_path):
    pair = KeyPair(b"p" * 40, b"s" * 40)
    for name in ("", "a b", 'a"', "a\n", "x" * 65, "ä"):
        with pytest.raises(ConfigError, match="member's name"):
            write_member_key(
                tmp_path / "x", MemberKey(member=Member(Role.APP, name), pair=pair, cluster_public=b"c" * 40)
            )
