"""The composition root: several roles in one process, in order up and in order down."""

import logging
import os
import signal
import subprocess
import sys

import pytest
import trio

from droppexd.cli.daemon_keys import make_key
from droppexd.config import Config
from droppexd.daemon import run_roles, system_runtime
from droppexd.errors import ConfigError, DroppexError, IdentityError, PeerError
from droppexd.model import Role

LOOPBACK = "tcp://127.0.0.1:0"
EVERYTHING = ["controller", "app", "pool"]


def config_of(folder, roles, **flags):
    listen = {f"{role}_listen": LOOPBACK for role in EVERYTHING}
    return Config.load({"roles": roles, "data": str(folder), **listen, **flags}, {})


def run_until_ready(config, count):
    """Run the roles, stop them with SIGTERM when that many serve, and return what they said."""
    reports = []

    def report(ready):
        reports.append(ready)
        if len(reports) == count:
            os.kill(os.getpid(), signal.SIGTERM)

    async def main():
        with trio.fail_after(60):
            await run_roles(config, report)

    trio.run(main)
    return reports


def flatten(error):
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in flatten(inner)]
    return [error]


def error_of(config):
    with pytest.raises((DroppexError, ExceptionGroup)) as caught:
        run_until_ready(config, 99)
    (error,) = flatten(caught.value)
    return error


def test_three_roles_in_one_process_serve_and_stop_in_order(tmp_path, caplog):
    caplog.set_level(logging.INFO, "droppex")
    reports = run_until_ready(config_of(tmp_path, EVERYTHING, name="one"), 3)
    assert reports[0].role == Role.CONTROLLER
    assert {report.role for report in reports} == {Role.CONTROLLER, Role.APP, Role.POOL}
    assert all(report.name == "one" and not report.address.endswith(":0") for report in reports)
    data = {report.role: report.data for report in reports}
    assert data == {"controller": str(tmp_path / "controller"), "pool": str(tmp_path / "pool"), "app": ""}
    messages = [record.getMessage() for record in caplog.records if record.name == "droppex.daemon"]
    assert [message.split(" name=")[0] for message in messages[:1]] == ["controller ready"]
    assert messages[-2:] == ["stopping signal=SIGTERM", "stopped"]


def test_the_same_folder_can_be_used_again(tmp_path):
    config = config_of(tmp_path, EVERYTHING)
    run_until_ready(config, 3)
    run_until_ready(config, 3)


def test_a_pool_without_a_controller_stops_when_told(tmp_path):
    config = config_of(tmp_path, ["pool"], controllers=["tcp://127.0.0.1:1"])

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_roles, config, pytest.fail)
            while not (tmp_path / "pool.json").exists():
                await trio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    trio.run(main)


def test_a_port_in_use_is_a_clear_error(tmp_path):
    async def main():
        listener, *_ = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            address = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
            await run_roles(config_of(tmp_path, ["controller"], controller_listen=address), pytest.fail)

    with pytest.raises((DroppexError, ExceptionGroup)) as caught:
        trio.run(main)
    (error,) = flatten(caught.value)
    assert isinstance(error, PeerError)
    assert "in use" in str(error)


def test_a_folder_with_other_things_in_it_is_not_taken_for_a_pools(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    error = error_of(config_of(tmp_path, ["pool"]))
    assert isinstance(error, IdentityError)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    error = error_of(config_of(tmp_path / "file" / "below", ["controller"]))
    assert "cannot make the folder" in str(error)


def test_roles_with_keys_of_their_own_work_together(tmp_path):
    keys = tmp_path / "keys"
    for role in (Role.CONTROLLER, Role.APP, Role.POOL):
        make_key(keys, role, "one")
    flags = {"keys_cluster": str(keys / "cluster.key"), "keys_members": str(keys / "members.toml")}
    own = [str(keys / f"{role}-one.key") for role in EVERYTHING]
    config = config_of(tmp_path / "data", EVERYTHING, keys_own=own, **flags)
    assert len(run_until_ready(config, 3)) == 3


def test_a_role_without_a_key_of_its_own_is_a_clear_error(tmp_path):
    keys = tmp_path / "keys"
    make_key(keys, Role.POOL, "one")
    flags = {"keys_cluster": str(keys / "cluster.key"), "keys_members": str(keys / "members.toml")}
    own = [str(keys / "pool-one.key")]
    error = error_of(config_of(tmp_path / "data", ["controller", "pool"], keys_own=own, **flags))
    assert isinstance(error, ConfigError)
    assert "droppexd keygen controller" in str(error)


def test_the_runtime_is_real():
    async def main():
        runtime = system_runtime()
        assert len(runtime.entropy.token(16)) == 16
        assert 1 <= runtime.entropy.uniform(1, 2) <= 2
        assert runtime.clock.wall_ms() > 1_700_000_000_000
        assert runtime.clock.now() <= runtime.clock.now()
        assert await runtime.run_blocking(divmod, 7, 2) == (3, 1)

    trio.run(main)


def test_a_process_that_does_not_stop_in_time_is_ended():
    code = "import threading; from droppexd.daemon import _deadline\nwith _deadline(0.01): threading.Event().wait()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 1
    assert b"ending anyway" in done.stderr
