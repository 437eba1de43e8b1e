"""Which app `droppex` talks to."""

import pytest

from droppexd.cli.client_settings import PATIENCE_S, ClientSettings, load_settings, user_file
from droppexd.errors import ConfigError

APP, OTHER, FILED = "tcp://127.0.0.1:1", "tcp://[::1]:2", "tcp://host.example:3"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text(f'app = "{FILED}"\nkey = "my.key"\n')
    return path


@pytest.fixture
def own(tmp_path):
    """The environment of a user with a file of their own."""
    environment = {"HOME": str(tmp_path / "home")}
    path = user_file(environment)
    path.parent.mkdir(parents=True)
    path.write_text(f'app = "{FILED}"\n')
    return environment


def test_the_option_beats_all(file, own):
    environment = {**own, "DROPPEX_APP": OTHER}
    assert load_settings(APP, None, environment) == ClientSettings(app=APP)
    assert load_settings(APP, file, environment).app == APP


def test_a_named_file_beats_the_environment(file, own):
    settings = load_settings(None, file, {**own, "DROPPEX_APP": OTHER})
    assert settings == ClientSettings(app=FILED, key=file.parent / "my.key")


def test_the_environment_beats_the_users_file(own):
    assert load_settings(None, None, {**own, "DROPPEX_APP": OTHER}) == ClientSettings(app=OTHER)


def test_the_environment_can_name_a_file(file, own):
    environment = {**own, "DROPPEX_CONFIG": str(file)}
    assert load_settings(None, None, environment).app == FILED
    both = load_settings(None, None, {**environment, "DROPPEX_APP": OTHER})
    assert both == ClientSettings(app=OTHER, key=file.parent / "my.key")


def test_the_users_file_is_the_last_resort(own, tmp_path):
    assert load_settings(None, None, own).app == FILED
    assert user_file({"XDG_CONFIG_HOME": "/x"}).as_posix() == "/x/droppex/client.toml"
    with pytest.raises(ConfigError, match="--app"):
        load_settings(None, None, {"HOME": str(tmp_path)})


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text('app = "nonsense"\nkey = 7\nappp = 1\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(None, path, {})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["app = [", "", "app = 7", "app = 'tcp://x:99999'", "app = 'tcp://x:0'"])
def test_a_file_that_is_no_client_file(tmp_path, text):
    path = tmp_path / "client.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"client\.toml"):
        load_settings(None, path, {})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(None, tmp_path / "gone", {})


@pytest.mark.parametrize("address", ["localhost:7701", "http://x:1", "tcp://x", "tcp://x:y", "tcp://x:1 "])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        load_settings(address, None, {})


def test_patience_is_that_of_the_environment_else_of_the_file(file):
    assert load_settings(APP, None, {}).patience_s == PATIENCE_S
    assert load_settings(None, file, {}).patience_s == PATIENCE_S
    file.write_text(f'app = "{FILED}"\npatience = "2m"\n')
    assert load_settings(None, file, {}).patience_s == 120
    assert load_settings(None, file, {"DROPPEX_PATIENCE": "7"}).patience_s == 7
    assert load_settings(None, file, {"DROPPEX_PATIENCE": "0"}).patience_s == 0
    file.write_text(f'app = "{FILED}"\npatience = "0s"\n')
    assert load_settings(None, file, {}).patience_s == 0


@pytest.mark.parametrize("wrong", ["soon", "-1", "5 parsecs"])
def test_patience_that_is_no_duration_is_a_mistake(file, wrong):
    with pytest.raises(ConfigError, match="DROPPEX_PATIENCE"):
        load_settings(APP, None, {"DROPPEX_PATIENCE": wrong})
    file.write_text(f'app = "{FILED}"\npatience = "{wrong}"\n')
    with pytest.raises(ConfigError, match="patience"):
        load_settings(None, file, {})
