"""What `droppex doctor` and `droppexd doctor` print, and how they end without a cluster."""

import contextlib
import io
import json
import logging

import pytest

from droppexd.cli import client, daemon
from droppexd.cli.daemon_keys import make_key
from droppexd.cli.doctor_report import report, report_document, report_lines
from droppexd.cli.render import Output
from droppexd.config import OPTIONS, variable_of
from droppexd.doctor.verdicts import error, ok, warning
from droppexd.model import Role

VERDICTS = [
    ok("clock", "all is right"),
    warning("disk", "it is slow", "buy another", subject="/srv"),
    error("peers", "the pool attic\x1b does\nnot answer", "start it", subject="attic"),
]


def test_each_verdict_is_a_line_and_what_to_do_another():
    assert report_lines(VERDICTS) == [
        "ok       clock  all is right",
        "warning  disk   it is slow",
        "                do: buy another",
        "error    peers  the pool attic\\x1b does; not answer",
        "                do: start it",
        "1 error, 1 warning",
    ]
    assert report_lines(VERDICTS[:1])[-1] == "all is well"


def test_quiet_leaves_out_what_is_ok():
    assert report_lines(VERDICTS[:2], quiet=True) == [
        "warning  disk  it is slow",
        "               do: buy another",
    ]
    assert report_lines(VERDICTS[:1], quiet=True) == []


def test_a_program_gets_every_field():
    assert report_document(VERDICTS[:2]) == {
        "worst": "warning",
        "checks": [
            {"check": "clock", "level": "ok", "subject": None, "text": "all is right", "advice": None},
            {
                "check": "disk",
                "level": "warning",
                "subject": "/srv",
                "text": "it is slow",
                "advice": "buy another",
            },
        ],
    }


@pytest.mark.parametrize(("count", "code"), [(1, 0), (2, 0), (3, 1)])
def test_only_an_error_makes_it_fail(count, code):
    said = io.StringIO()
    assert report(Output(quiet=False, as_json=True, stdout=said), VERDICTS[:count]) == code
    assert len(json.loads(said.getvalue())["checks"]) == count


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in this process, as a user without files of its own."""
    for name in (*map(variable_of, OPTIONS), "DROPPEXD_CONFIG", "DROPPEX_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setattr("droppexd.cli.daemon_join.SYSTEM_FOLDER", home)
    monkeypatch.setattr("droppexd.cli.daemon_doctor.SYSTEM_FOLDER", home)
    monkeypatch.setattr("droppexd.cli.client_settings.SYSTEM_FILE", home / "client.toml")

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with contextlib.suppress(SystemExit), pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert said.err == ""
        return ended.value.code or 0, json.loads(said.out)["checks"] if "--json" in arguments else said.out

    yield run
    logging.disable(logging.NOTSET)


def of(checks, name):
    return [check for check in checks if check["check"] == name]


def test_a_machine_without_roles_is_checked_as_well(run):
    code, checks = run(daemon.main, "doctor", "--json")
    assert code == 0
    (config,) = of(checks, "config")
    assert config["level"] == "warning"
    assert "droppexd init" in config["advice"]
    for name in ("versions", "coding", "limits", "clock"):
        assert of(checks, name)


def test_a_configuration_that_cannot_be_used_is_an_error_line_by_line(run, tmp_path):
    file = tmp_path / "droppex.toml"
    file.write_text('layuot = "4+2"\nroles = ["pool"]\n')
    code, checks = run(daemon.main, "doctor", "--config", file, "--json")
    assert code == 1
    assert [check["level"] for check in of(checks, "config")] == ["error", "error"]
    assert of(checks, "coding")


def test_the_configuration_of_the_machine_is_found_without_being_named(run, tmp_path, monkeypatch):
    (tmp_path / "home" / "droppex.toml").write_text(
        f'roles = ["controller"]\n[controller]\ndata = "{tmp_path}"\nlisten = "tcp://127.0.0.1:0"\n'
    )
    code, checks = run(daemon.main, "doctor", "--json")
    assert code == 0
    assert "droppex.toml: controller on" in of(checks, "config")[0]["text"]
    # Services run as another user, who may do less than root.
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("droppexd.cli.daemon_doctor.SERVICE_UNIT", tmp_path)
    _, checks = run(daemon.main, "doctor", "--json")
    assert [check["level"] for check in of(checks, "config")] == ["ok", "warning"]
    assert "sudo -u droppex" in of(checks, "config")[1]["advice"]


def test_a_role_that_does_not_run_is_checked(run, tmp_path):
    options = ("--role", "pool", "--data", tmp_path / "pool", "--listen", "tcp://127.0.0.1:0")
    options += ("--controller", "tcp://127.0.0.1:1", "--pool-reserve", "1MiB")
    code, checks = run(daemon.main, "doctor", *options, "--json")
    assert code == 1
    (silent,) = of(checks, "peers")
    assert (silent["level"], silent["subject"]) == ("error", "tcp://127.0.0.1:1")
    (disk,) = of(checks, "disk")
    assert disk["subject"] == str(tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_the_first_controller_is_well_before_it_was_started(run, tmp_path):
    options = ("--role", "controller", "--data", tmp_path, "--listen", "tcp://127.0.0.1:0")
    code, checks = run(daemon.main, "doctor", *options, "--json")
    assert code == 0
    assert of(checks, "peers") == []
    assert len(of(checks, "flush")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_client_without_a_file_is_told_what_to_do(run):
    code, checks = run(client.main, "doctor", "--json")
    assert code == 1
    (config,) = of(checks, "config")
    assert "no app is known" in config["text"]
    assert "--app" in config["advice"]


def test_a_client_whose_app_is_not_there_is_told_so(run):
    code, checks = run(client.main, "--app", "tcp://127.0.0.1:1", "doctor", "--json")
    assert code == 1
    (peers,) = of(checks, "peers")
    assert (peers["level"], peers["subject"]) == ("error", "tcp://127.0.0.1:1")


def test_a_client_with_a_key_that_others_can_read_asks_nobody(run, tmp_path):
    make_key(tmp_path / "keys", Role.CLIENT, "ann")
    key = tmp_path / "keys" / "client-ann.key"
    key.chmod(0o640)
    file = tmp_path / "client.toml"
    file.write_text(f'app = "tcp://127.0.0.1:1"\nkey = "{key}"\n')
    code, checks = run(client.main, "--config", file, "doctor", "--json")
    assert code == 1
    (keys,) = of(checks, "keys")
    assert "is open to others (mode 640)" in keys["text"]
    assert of(checks, "peers") == []


def test_people_get_lines(run):
    code, out = run(client.main, "--app", "tcp://127.0.0.1:1", "doctor")
    assert code == 1
    assert out.splitlines()[-1] == "1 error, 0 warnings"
    code, out = run(client.main, "--app", "tcp://127.0.0.1:1", "doctor", "--quiet")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["error", "do:"]
