"""`droppexd catalog`, as an operator types it, beside a cluster that runs and after it has ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import clean_environment

pytestmark = pytest.mark.slow


@pytest.fixture
def catalog(tmp_path):
    """Run `droppexd catalog ...`, check its exit code and that it showed no traceback."""

    def run(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "droppexd", "catalog", *map(str, arguments)],
            env=clean_environment(tmp_path),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done

    return run


def data_of(cluster):
    (controller,) = cluster.of_role("controller")
    return Path(controller["data"])


def test_a_backup_is_made_beside_a_running_controller(cluster, droppex, folder, catalog, tmp_path):
    droppex("put", "-", f"{folder}/a", stdin=b"x" * 1000)
    files = droppex.json("status")["files"]
    data, target = data_of(cluster), tmp_path / "backup"
    told = catalog("backup", target, "--data", data).stdout
    assert f"{target}: " in told
    assert "revision " in told
    assert "incarnation " in told
    assert "--force" in catalog("backup", target, "--data", data, code=1).stderr
    document = json.loads(catalog("backup", target, "--data", data, "--force", "--json").stdout)
    assert document["files"] == files
    assert document["file_size"] == target.stat().st_size
    assert catalog("backup", tmp_path / "other", "--data", data, "--quiet").stdout == ""

    checked = json.loads(catalog("check", target, "--json").stdout)
    assert checked["sound"]
    assert checked["problems"] == []
    assert checked["records"]["files"] == files
    assert checked["facts"]["revision"] == document["revision"]
    assert catalog("check", target).stdout.endswith("all is sound\n")
    assert "in use" in catalog("check", "--data", data, code=1).stderr


def test_the_folder_is_found_in_the_config_of_the_daemon(cluster, catalog, tmp_path):
    config = tmp_path / "droppex.toml"
    config.write_text(f'[controller]\ndata = "{data_of(cluster)}"\n')
    catalog("backup", tmp_path / "backup", "--config", config)
    config.write_text(f'roles = ["controller", "pool"]\ndata = "{data_of(cluster).parent}"\n')
    catalog("backup", tmp_path / "backup", "--config", config, "--force")
    config.write_text('name = "nobody"\n')
    assert "--data" in catalog("backup", tmp_path / "other", "--config", config, code=2).stderr
    assert "--data" in catalog("backup", tmp_path / "other", code=2).stderr


def test_what_is_wrong_is_told_a_line_each(cluster, catalog, tmp_path):
    target = tmp_path / "backup"
    catalog("backup", target, "--data", data_of(cluster))
    content = bytearray(target.read_bytes())
    content[4096:8192] = b"\xa5" * 4096
    target.write_bytes(content)
    done = catalog("check", target, code=1)
    assert done.stdout.startswith("problem: ")
    assert not json.loads(catalog("check", target, "--json", code=1).stdout)["sound"]
    assert catalog("check", target, "--quiet", code=1).stdout == ""
    assert "there is no catalogue" in catalog("check", tmp_path / "nothing", code=1).stderr
    assert "there is no catalogue" in catalog("check", "--data", tmp_path, code=1).stderr


def test_wrong_usage(catalog):
    for arguments in ((), ("nonsense",), ("backup",), ("check", "a", "b")):
        catalog(*arguments, code=2)


def test_a_backup_is_restored_into_an_empty_folder_and_with_force_into_any(cluster, catalog, tmp_path):
    backup, data = tmp_path / "backup", tmp_path / "controller"
    made = json.loads(catalog("backup", backup, "--data", data_of(cluster), "--json").stdout)
    assert "in use" in catalog("restore", backup, "--data", data_of(cluster), "--force", code=1).stderr
    assert "no backup" in catalog("restore", tmp_path / "nothing", "--data", data, code=1).stderr
    told = catalog("restore", backup, "--data", data).stdout
    assert "restored, revision " in told
    assert "--force" in catalog("restore", backup, "--data", data, code=1).stderr
    again = json.loads(catalog("restore", backup, "--data", data, "--force", "--json").stdout)
    assert again["former"] == str(data / "catalogue.sqlite.before-1")
    assert again["files"] == made["files"]
    assert again["cluster_id"] == made["cluster_id"]
    assert again["incarnation"] != made["incarnation"]
    assert catalog("check", "--data", data).stdout.endswith("all is sound\n")
    catalog("check", again["former"])
    backup.write_bytes(backup.read_bytes()[:-4096])
    assert "nothing was changed" in catalog("restore", backup, "--data", data, "--force", code=1).stderr
    catalog("check", "--data", data)
    catalog("restore", "--data", data, code=2)
