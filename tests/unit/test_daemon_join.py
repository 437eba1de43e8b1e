"""The files that `droppexd init` and `join` write."""

import errno
import os
import socket
import tomllib

import pytest

from droppexd.cli import daemon_join
from droppexd.cli.daemon_join import (
    begin_cluster,
    config_folder,
    data_folder,
    describe_machine,
    has_joined,
    join_cluster,
    own_host,
)
from droppexd.config import Config
from droppexd.errors import ConfigError, KeyRefused, StoreError
from droppexd.model import Role
from droppexd.wire.keys import generate_keypair, load_keys, read_member_key
from droppexd.wire.member_messages import Enrolled
from droppexd.wire.tokens import Token

ALL = (Role.CONTROLLER, Role.APP, Role.POOL)


def machine(tmp_path, **options):
    given = {"name": "one", "machine": "rack 7", "zone": "", "address": "10.0.0.7", "towards": ""} | options
    return describe_machine({}, folder=tmp_path / "etc", data=tmp_path / "data", **given)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_init_writes_is_a_configuration_with_keys_that_load(tmp_path):
    begun = begin_cluster(machine(tmp_path, zone="cellar"), ALL)
    file = tmp_path / "etc" / "droppex.toml"
    config = Config.load({}, {}, file)
    assert config.roles == ALL
    assert (config.cluster, len(begun.cluster)) == (begun.cluster, 32)
    assert (config.name, config.machine, config.zone) == ("one", "rack 7", "cellar")
    assert config.controller_listen == "tcp://10.0.0.7:7700"
    assert config.app_listen == "tcp://10.0.0.7:7701"
    assert config.pool_listen == "tcp://10.0.0.7:7702"
    assert config.folder(Role.POOL) == tmp_path / "data" / "pool"
    for own in map(os.fspath, config.keys_own):
        role = read_member_key(daemon_join.Path(own)).member.role
        keys = load_keys(
            daemon_join.Path(own),
            cluster=daemon_join.Path(config.keys_cluster),
            members=daemon_join.Path(config.keys_members),
        )
        assert keys.allowed.get(keys.own.public).role == role
    client = tomllib.loads((tmp_path / "etc" / "client.toml").read_text())
    assert client == {"app": "tcp://10.0.0.7:7701", "key": "keys/client-one.key"}


def test_init_changes_nothing_that_is_there(tmp_path):
    first = begin_cluster(machine(tmp_path), ALL)
    before = files_of(tmp_path)
    again = begin_cluster(machine(tmp_path, name="other", address="10.0.0.8"), (Role.CONTROLLER,))
    assert (again.cluster, again.controller, again.made) == (first.cluster, "tcp://10.0.0.7:7700", ())
    assert files_of(tmp_path) == before


def test_init_goes_on_where_it_was_interrupted(tmp_path):
    begin_cluster(machine(tmp_path), ALL)
    whole = files_of(tmp_path)
    for lost in (["droppex.toml"], ["droppex.toml", "client.toml"], ["droppex.toml", "keys/pool-one.key"]):
        kept = files_of(tmp_path)
        for name in lost:
            (tmp_path / "etc" / name).unlink()
            del kept[tmp_path / "etc" / name]
        begin_cluster(machine(tmp_path), ALL)
        now = files_of(tmp_path)
        assert now.keys() == whole.keys()
        members = tmp_path / "etc" / "keys" / "members.toml"
        assert {path: now[path] for path in kept if path != members} == {
            path: data for path, data in kept.items() if path != members
        }
        Config.load({}, {}, tmp_path / "etc" / "droppex.toml")


def test_keys_of_another_cluster_are_not_taken(tmp_path):
    begin_cluster(machine(tmp_path), ALL)
    (tmp_path / "etc" / "droppex.toml").unlink()
    (tmp_path / "etc" / "keys" / "cluster.key").unlink()
    with pytest.raises(ConfigError, match="another member or cluster"):
        begin_cluster(machine(tmp_path), ALL)


def test_a_name_is_made_of_the_host_name_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon_join.socket, "gethostname", lambda: "my host!.example")
    assert machine(tmp_path, name="").name == "my-host-.example"
    assert machine(tmp_path, machine="").machine == "my host!.example"
    with pytest.raises(ConfigError, match="cannot be a member's name"):
        machine(tmp_path, name="a/b")


@pytest.mark.parametrize(
    ("address", "listen"),
    [
        ("10.0.0.7", "tcp://10.0.0.7:7702"),
        ("nas.example:8000", "tcp://nas.example:8002"),
        ("[fd00::7]", "tcp://[fd00::7]:7702"),
        ("[fd00::7]:9000", "tcp://[fd00::7]:9002"),
        ("tcp://10.0.0.7:9000", "tcp://10.0.0.7:9002"),
    ],
)
def test_addresses(tmp_path, address, listen):
    assert machine(tmp_path, address=address).listen(Role.POOL) == listen


@pytest.mark.parametrize(
    "address", ["fd00::7", "10.0.0.7:", "10.0.0.7:99999", "a b", "10.0.0.7:65534", "x:0"]
)
def test_bad_addresses(tmp_path, address):
    with pytest.raises(ConfigError):
        machine(tmp_path, address=address)


def test_the_own_address_is_the_one_on_the_way():
    assert own_host("tcp://127.0.0.9:7700").startswith("127.")
    assert own_host("tcp://[::1]:7700") in ("[::1]", "127.0.0.1")
    assert own_host("tcp://no-such-host.invalid:1") == "127.0.0.1"


def test_where_no_route_leads_anywhere_an_address_of_an_interface_is_taken(monkeypatch):
    addresses = {"lo": "127.0.0.1", "down0": None, "eth7": "10.66.0.3"}
    monkeypatch.setattr(daemon_join.socket, "getaddrinfo", lambda *_, **__: raise_no_route())
    monkeypatch.setattr(daemon_join.socket, "if_nameindex", lambda: list(enumerate(addresses)))

    def ioctl(_socket, request, data):
        assert (request, len(data)) == (0x8915, 256)
        address = addresses[data.partition(b"\0")[0].decode()]
        if address is None:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return data[:20] + socket.inet_aton(address) + data[24:]

    monkeypatch.setattr(daemon_join.fcntl, "ioctl", ioctl)
    assert own_host("") == "10.66.0.3"
    addresses["eth7"] = None
    assert own_host("") == "127.0.0.1"


def raise_no_route():
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


def test_folders_follow_the_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    home = {"XDG_CONFIG_HOME": "/home/a/conf", "XDG_DATA_HOME": "/home/a/data"}
    assert str(config_folder(home)) == "/home/a/conf/droppex"
    assert str(data_folder(home)) == "/home/a/data/droppex"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(config_folder(home)) == "/etc/droppex"
    assert str(data_folder(home)) == "/var/lib/droppex"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(StoreError, match="cannot make the folder"):
        begin_cluster(machine(tmp_path), ALL)


# -- join ------------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    return generate_keypair()


def token_of(cluster, *roles):
    return Token(
        secret=generate_keypair().secret,
        cluster_public=cluster.public,
        controllers=("tcp://10.0.0.1:7700",),
        roles=roles,
    )


def answer(monkeypatch, secret=b"", apps=("tcp://10.0.0.1:7701",), error=None):
    """Have a master answer so."""
    asked = []

    async def enroll(token, name, pairs):
        asked.append((name, {role: pair.public for role, pair in pairs.items()}))
        if error is not None:
            raise error
        return Enrolled(
            cluster_id=bytes(16),
            controllers=("tcp://10.0.0.1:7700", "tcp://10.0.0.2:7700"),
            apps=apps,
            cluster_secret=secret,
        )

    monkeypatch.setattr("droppexd.daemon.enroll", enroll)
    return asked


def test_a_pool_that_joins_gets_a_configuration_that_loads(tmp_path, monkeypatch, cluster):
    asked = answer(monkeypatch, cluster.secret)
    join_cluster(machine(tmp_path), token_of(cluster, "pool"), (Role.POOL,))
    config = Config.load({}, {}, tmp_path / "etc" / "droppex.toml")
    assert config.roles == (Role.POOL,)
    assert config.controllers == ("tcp://10.0.0.1:7700", "tcp://10.0.0.2:7700")
    assert config.keys_members == ""
    keys = load_keys(tmp_path / "etc" / "keys" / "pool-one.key", cluster=tmp_path / "etc/keys/cluster.key")
    assert keys.cluster_secret == cluster.secret
    assert asked == [("one", {Role.POOL: keys.own.public})]
    assert not (tmp_path / "etc" / "client.toml").exists()


def test_a_controller_that_joins_names_the_others_as_those_to_join(tmp_path, monkeypatch, cluster):
    answer(monkeypatch, cluster.secret)
    join_cluster(machine(tmp_path), token_of(cluster, "controller"), (Role.CONTROLLER,))
    config = Config.load({}, {}, tmp_path / "etc" / "droppex.toml")
    assert config.master == ("tcp://10.0.0.1:7700", "tcp://10.0.0.2:7700")
    assert config.cluster == ""


def test_a_client_that_joins_gets_its_key_alone(tmp_path, monkeypatch, cluster):
    answer(monkeypatch)
    join_cluster(machine(tmp_path), token_of(cluster, "client"), (Role.CLIENT,))
    assert sorted(path.name for path in files_of(tmp_path)) == ["client-one.key", "client.toml"]
    assert tomllib.loads((tmp_path / "etc" / "client.toml").read_text())["app"] == "tcp://10.0.0.1:7701"


def test_a_machine_that_has_joined_is_told_what_it_has_not_joined_for(tmp_path, monkeypatch, cluster):
    answer(monkeypatch, cluster.secret)
    one = machine(tmp_path)
    assert has_joined(one, (Role.POOL,)) is None
    join_cluster(one, token_of(cluster, "pool"), (Role.POOL,))
    assert has_joined(one, (Role.POOL,)) == one.config
    assert has_joined(one, (Role.CLIENT,)) is None  # A person there may still join.
    with pytest.raises(ConfigError, match="as controller as well give --dir"):
        has_joined(one, (Role.CONTROLLER, Role.POOL))
    with pytest.raises(ConfigError, match="as client as well say --role client"):
        has_joined(one, (Role.POOL, Role.CLIENT))
    join_cluster(one, token_of(cluster, "client"), (Role.CLIENT,))
    assert has_joined(one, (Role.POOL, Role.CLIENT)) == one.config


def test_a_join_that_failed_is_repeated_with_the_same_keys(tmp_path, monkeypatch, cluster):
    asked = answer(monkeypatch, error=KeyRefused("no"))
    with pytest.raises(KeyRefused, match="expired, or was used"):
        join_cluster(machine(tmp_path), token_of(cluster, "pool"), (Role.POOL,))
    assert not (tmp_path / "etc" / "droppex.toml").exists()
    again = answer(monkeypatch, cluster.secret)
    join_cluster(machine(tmp_path), token_of(cluster, "pool"), (Role.POOL,))
    assert asked == again


def test_a_cluster_key_that_is_not_that_of_the_token_is_refused(tmp_path, monkeypatch, cluster):
    answer(monkeypatch, generate_keypair().secret)
    with pytest.raises(ConfigError, match="not the cluster's"):
        join_cluster(machine(tmp_path), token_of(cluster, "pool"), (Role.POOL,))
    assert not (tmp_path / "etc" / "keys" / "cluster.key").exists()
    assert not (tmp_path / "etc" / "droppex.toml").exists()


def test_what_to_do_next_is_said_as_it_can_be_typed(tmp_path, monkeypatch):
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    elsewhere = machine(tmp_path)
    assert daemon_join.next_steps(elsewhere, ALL, home, controller="tcp://10.0.0.7:7700") == [
        f"start it:       droppexd --config {tmp_path}/etc/droppex.toml",
        f"try it:         droppex --config {tmp_path}/etc/client.toml status",
        f"add a machine:  droppexd join-token --config {tmp_path}/etc/droppex.toml",
    ]
    usual = describe_machine(
        home, folder=None, data=None, name="", machine="", zone="", address="127.0.0.1", towards=""
    )
    assert daemon_join.next_steps(usual, ALL, home, controller="tcp://127.0.0.1:7700") == [
        f"start it:       droppexd --config {tmp_path}/droppex/droppex.toml",
        "try it:         droppex status",
        "add a machine:  droppexd join-token",
        (
            f"only this machine can reach it: for others move {usual.folder} and {usual.data} away, "
            "and say `droppexd init --address HOST`"
        ),
    ]
    assert daemon_join.next_steps(usual, (Role.POOL,), home) == [
        f"start it:       droppexd --config {tmp_path}/droppex/droppex.toml"
    ]


def test_keys_of_services_are_given_to_their_user(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(daemon_join, "SYSTEM_FOLDER", tmp_path / "etc")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.update({path.name: (uid, gid)}))
    users = {"droppex": type("User", (), {"pw_uid": 900, "pw_gid": 901})}
    monkeypatch.setattr(daemon_join.pwd, "getpwnam", users.__getitem__)
    begin_cluster(machine(tmp_path), ALL)
    wanted = ("keys", "cluster.key", "members.toml", "controller-one.key", "app-one.key", "pool-one.key")
    assert given == dict.fromkeys(wanted, (900, 901))  # And not the key of the person.
