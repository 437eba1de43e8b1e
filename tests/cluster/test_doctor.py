"""`droppex doctor` and `droppexd doctor` on real processes: what is well, and what is not."""

import json
import subprocess

import pytest

from droppexd.cli.daemon_keys import make_key
from droppexd.model import Role
from tests.cluster.clocks import LIBRARIES
from tests.cluster.conftest import DROPPEXD, PATIENCE_S, clean_environment, wait_for
from tests.cluster.test_joining import hosts

POOLS = 3


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    members = [(Role.CONTROLLER, "controller"), (Role.APP, "app"), (Role.CLIENT, "person")]
    members += [(Role.POOL, f"pool-{number}") for number in range(1, POOLS + 1)]
    for role, name in members:
        make_key(folder, role, name)
    return folder


@pytest.fixture
def cluster(new_cluster, keys):
    with new_cluster(
        pools=POOLS, keys=keys, controller={"heartbeat": "300ms", "down_after": "2s"}
    ) as running:
        running.wait_until_up()
        yield running


def checks_of(done):
    return json.loads(done.stdout)["checks"]


def examine(cluster, code):
    """Run `droppex doctor`."""
    return checks_of(cluster.droppex("doctor", "--json", code=code))


def examine_role(droppexd, process, code, **changes):
    """Run `droppexd doctor` with what a process was started with."""
    options = process.arguments()
    for option, value in changes.items():
        options[options.index(f"--{option}") + 1] = str(value)
    config = process.folder / "droppex.toml"
    return checks_of(droppexd("doctor", "--config", config, *options, "--json", code=code))


def errors(checks):
    return [check for check in checks if check["level"] == "error"]


def of(checks, name):
    return [check for check in checks if check["check"] == name]


@pytest.mark.slow
def test_a_healthy_cluster_is_well_and_each_of_its_peers_is_told_of(cluster, droppexd):
    checks = examine(cluster, 0)
    # How full the disk is that the tests run on is not theirs to say.
    assert {check["level"] for check in checks if check["check"] != "disk"} == {"ok"}
    assert errors(checks) == []
    said = [check["text"] for check in of(checks, "peers")]
    for name in ("app", "controller", *(pool.name for pool in cluster.pools)):
        assert any(name in text and "answers" in text for text in said), (name, said)
    assert any("knows the key of the client person" in check["text"] for check in of(checks, "keys"))
    assert "error" not in cluster.droppex("doctor", "--quiet").stdout


@pytest.mark.slow
def test_a_role_that_runs_is_well_and_nothing_is_left_behind(cluster, droppexd):
    for process in cluster.processes:
        before = sorted(process.data.rglob("*")) if process.data.exists() else []
        checks = examine_role(droppexd, process, 0)
        after = sorted(process.data.rglob("*")) if process.data.exists() else []
        assert not [path for path in {*before} ^ {*after} if "doctor" in path.name]
        (role,) = process.roles
        (port,) = of(checks, "ports")
        assert f"is held by the {role} {process.name}" in port["text"]
        assert any(f"knows the key of the {role}" in check["text"] for check in of(checks, "keys"))
        assert len(of(checks, "flush")) == (role != "app")
        assert len(of(checks, "peers")) == (role != "controller")


@pytest.mark.slow
def test_a_pool_that_was_killed_is_named_with_what_to_do(cluster, droppexd):
    lost = cluster.pools[1]
    lost.kill()
    (error,) = errors(examine(cluster, 1))
    assert (error["check"], error["subject"]) == ("peers", "pool-2")
    assert lost.address in error["text"]
    assert "droppex pools replace pool-2" in error["advice"]
    # Whoever looks after that machine sees that its address is free.
    (port,) = of(examine_role(droppexd, lost, 0), "ports")
    assert "is free: the pool is not running" in port["text"]
    lost.start()
    cluster.wait_until_up()
    assert errors(examine(cluster, 0)) == []


@pytest.mark.slow
def test_a_pool_that_stands_still_is_named_within_bounded_time(cluster):
    still = cluster.pools[0]
    still.stop()
    try:
        (error,) = errors(examine(cluster, 1))
        assert error["subject"] == "pool-1"
    finally:
        still.go_on()


@pytest.mark.slow
def test_without_its_master_a_cluster_is_ill_and_the_doctor_comes_to_an_end(cluster, droppexd):
    cluster.controller.kill()
    found = errors(examine(cluster, 1))
    assert any("no controller is the master" in error["text"] for error in found)
    assert any(cluster.controller.address in error["text"] for error in found)
    (error,) = errors(examine_role(droppexd, cluster.pools[0], 1))
    assert (error["check"], error["subject"]) == ("peers", cluster.controller.address)


@pytest.mark.slow
def test_keys_and_folders_that_cannot_be_used_are_errors_with_what_to_do(cluster, droppexd, tmp_path):
    pool = cluster.pools[2]
    cluster.key("pool-pool-3").chmod(0o644)
    cluster.key("client-person").chmod(0o604)
    try:
        for found in (errors(examine_role(droppexd, pool, 1)), errors(examine(cluster, 1))):
            (error,) = found
            assert error["check"] == "keys"
            assert "chmod 600" in error["text"]
            assert "revoke" in error["advice"]
    finally:
        cluster.key("pool-pool-3").chmod(0o600)
        cluster.key("client-person").chmod(0o600)
    (tmp_path / "file").touch()
    (error,) = errors(examine_role(droppexd, pool, 1, data=tmp_path / "file" / "data"))
    assert error["check"] == "disk"
    assert "is not a folder" in error["text"]
    address = cluster.app.address
    (error,) = errors(examine_role(droppexd, pool, 1, **{"pool-listen": address}))
    assert (error["check"], error["subject"]) == ("ports", address)
    assert "is the app app" in error["text"]


@pytest.mark.slow
def test_a_key_that_was_revoked_is_told_so(tmp_path, droppexd):
    with hosts(tmp_path, droppexd, 2) as (first, second):
        first.init()
        first.start("controller", "app", "pool")
        second.join(first.token("--role", "pool", "--role", "client"))
        second.start("pool")
        assert errors(checks_of(second.client("doctor", "--json"))) == []
        first.client("members", "revoke", second.name, "--role", "pool")
        first.client("members", "revoke", second.name, "--role", "client")

        def refused():
            config = second.folder / "droppex.toml"
            found = errors(checks_of(droppexd("doctor", "--config", config, "--json", code=None)))
            return [error for error in found if error["check"] == "keys"]

        (error,) = wait_for(refused, "the pool's doctor does not notice that its key is revoked")
        assert f"does not let the pool {second.name} in" in error["text"]
        (error,) = errors(checks_of(second.client("doctor", "--json", code=1)))
        assert f"does not let the client {second.name} in" in error["text"]
        assert "join-token" in error["advice"]


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES, reason="needs Debian's libfaketime")
def test_a_clock_that_is_an_hour_off_is_a_warning_that_names_it(new_cluster, clocks):
    def prepare(cluster):
        clocks.give(cluster.pools[0])
        clocks.set(cluster.pools[0], "+3600")

    with new_cluster(pools=2, prepare=prepare) as cluster:
        cluster.wait_until_up()
        checks = examine(cluster, 0)
        (warning,) = [check for check in checks if check["level"] == "warning"]
        assert (warning["check"], warning["subject"]) == ("clock", "the pool pool-1")
        assert "ahead of those of most" in warning["text"]
        assert warning["advice"]


def test_who_ends_the_doctor_leaves_no_file_behind(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    options = ["--role", "controller", "--listen", "tcp://127.0.0.1:0", "--data", str(data)]
    doctor = subprocess.Popen(
        [*DROPPEXD, "doctor", *options],
        env=clean_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: list(data.iterdir()) or doctor.poll() is not None, "nothing is written to the folder"
        )
        doctor.terminate()
        assert doctor.wait(PATIENCE_S) in (143, 0)  # 0: on a slow machine it may be through already.
    finally:
        doctor.kill()
        doctor.wait()
    assert list(data.iterdir()) == []
