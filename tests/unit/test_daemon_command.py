"""The command `droppexd`: options, usage errors, and keys."""

import contextlib
import stat

import pytest

from droppexd import __version__
from droppexd.allocator import tune_allocator
from droppexd.cli import daemon
from droppexd.cli.daemon_dev import default_folder
from droppexd.cli.daemon_keys import make_key
from droppexd.config import OPTIONS, flags_of, variable_of
from droppexd.errors import ConfigError
from droppexd.model import Role
from droppexd.wire.keys import load_keys


@pytest.fixture
def droppexd(monkeypatch, capsys):
    for name in OPTIONS:
        monkeypatch.delenv(variable_of(name), raising=False)
    monkeypatch.delenv("DROPPEXD_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["droppexd", *arguments])
        with contextlib.suppress(SystemExit), pytest.raises(SystemExit) as ended:
            daemon.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def test_help_shows_every_option_with_its_variable(droppexd):
    code, out, _ = droppexd("--help")
    assert code == 0
    for name in OPTIONS:
        assert all(flag in out for flag in flags_of(name))
        assert f"[{variable_of(name)}]" in out


def test_version(droppexd):
    assert droppexd("--version") == (0, __version__ + "\n", "")


def test_nothing_to_do_is_a_usage_error(droppexd):
    code, _, err = droppexd()
    assert code == 2
    assert "--role" in err


def test_all_mistakes_are_told_at_once_without_a_traceback(droppexd, tmp_path):
    file = tmp_path / "droppex.toml"
    file.write_text('layuot = "4+2"\n[pool]\nreserve = "much"\n')
    code, out, err = droppexd("--config", str(file), "--role", "pool", "--listen", "tcp://10.0.0.1:1")
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "droppexd: 4 problems:"
    for expected in ("did you mean layout?", "'much' is not a size", "needs a folder", "needs keys"):
        assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["--rolle", "pool"], ["--role"], ["dev", "--pools", "0"], ["nonsense"]]
)
def test_wrong_usage_ends_with_two(droppexd, arguments):
    code, _, err = droppexd(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_options_of_a_role_before_a_sub_command_are_refused_and_not_ignored(droppexd):
    code, _, err = droppexd("--log-level", "debug", "dev")
    assert code == 2
    assert "behind its name" in err


def test_a_wrong_layout_for_dev_is_told_before_anything_starts(droppexd, tmp_path):
    code, _, err = droppexd("dev", "--data", str(tmp_path / "d"), "--layout", "4x2")
    assert code == 2
    assert "4x2" in err
    assert not (tmp_path / "d").exists()


def test_dev_keeps_its_data_in_the_users_data_folder():
    assert str(default_folder({"XDG_DATA_HOME": "/data"})) == "/data/droppex/dev"
    assert str(default_folder({})).endswith("/.local/share/droppex/dev")


def test_the_allocator_is_tuned_or_left_alone():
    assert tune_allocator() in (True, False)


# -- keys ------------------------------------------------------------------------------------------


def test_keygen_makes_keys_that_load(droppexd, tmp_path):
    folder = tmp_path / "keys"
    code, out, _ = droppexd("keygen", "pool", "nas", "--dir", str(folder))
    assert code == 0
    assert str(folder / "pool-nas.key") in out
    make_key(folder, Role.CLIENT, "alice")
    keys = load_keys(folder / "pool-nas.key", cluster=folder / "cluster.key", members=folder / "members.toml")
    assert {member.name for member in keys.allowed.founders.values()} == {"nas", "alice"}
    for secret in ("pool-nas.key", "client-alice.key", "cluster.key"):
        assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600


def test_keygen_never_replaces_a_key(tmp_path):
    make_key(tmp_path, Role.APP, "door")
    before = (tmp_path / "app-door.key").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        make_key(tmp_path, Role.APP, "door")
    assert (tmp_path / "app-door.key").read_text() == before
    assert load_keys(tmp_path / "app-door.key", members=tmp_path / "members.toml")


def test_keygen_refuses_a_name_that_cannot_be_before_it_makes_anything(droppexd, tmp_path):
    code, _, err = droppexd("keygen", "pool", "../evil", "--dir", str(tmp_path / "keys"))
    assert code == 2
    assert "evil" in err
    assert not (tmp_path / "keys").exists()
