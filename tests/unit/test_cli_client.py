"""The command line itself: what it says without a cluster."""

import os
import subprocess
import sys

import pytest

HEAVY = (
    "trio",
    "zmq",
    "rich",
    "msgpack",
    "reedsolo",
    "blake3",
    "sqlite3",
    "droppexd.model",
    "droppexd.client",
)


def droppex(*arguments, home, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DROPPEX", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-m", "droppexd.cli.client", *arguments],
        env={**kept, "HOME": str(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["put", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom droppexd.cli.client import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr.strip() == "[]"
    assert result.stdout


def test_help_names_every_command_and_the_exit_codes(tmp_path):
    text = droppex("--help", home=tmp_path).stdout
    for command in [
        "put",
        "get",
        "cat",
        "ls",
        "find",
        "stat",
        "rm",
        "mv",
        "cp",
        "status",
        "pools",
        "verify",
        "doctor",
    ]:
        assert f"\n  {command} " in text
    for code in "0123456":
        assert f" {code} " in text


@pytest.mark.parametrize("command", ["put", "get", "rm"])
def test_help_says_that_each_file_is_atomic(command, tmp_path):
    assert "each" in droppex(command, "--help", home=tmp_path).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["put"],
        ["get"],
        ["ls", "--nonsense"],
        ["--app", "nonsense", "ls"],
        ["--app", "tcp://127.0.0.1:1", "get", "a", "--range", "5-1"],
        ["--app", "tcp://127.0.0.1:1", "put", "-"],
        ["--app", "tcp://127.0.0.1:1", "put", "a", "--layout", "many"],
        ["--app", "tcp://127.0.0.1:1", "rm", "-r", "docs"],
        ["--config", "/nowhere/client.toml", "ls"],
        ["ls"],
    ],
)
def test_wrong_usage_is_2_and_no_traceback(arguments, tmp_path):
    result = droppex(*arguments, home=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["ls"], ["status", "--json"], ["put", "/etc/hostname", "a"], ["cat", "a"]]
)
def test_an_app_that_is_not_there_is_6(arguments, tmp_path):
    result = droppex("--app", "tcp://127.0.0.1:1", *arguments, home=tmp_path, DROPPEX_PATIENCE="0")
    assert result.returncode == 6
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("droppex: ")
    assert "tcp://127.0.0.1:1" in line


def test_an_app_that_is_away_is_waited_for_and_that_is_said_once(tmp_path):
    result = droppex("--app", "tcp://127.0.0.1:1", "ls", home=tmp_path, DROPPEX_PATIENCE="1s")
    assert result.returncode == 6
    waiting, failed = result.stderr.splitlines()
    assert "tcp://127.0.0.1:1 is not reachable; trying for 1 s" in waiting
    assert "tcp://127.0.0.1:1 is not reachable (" in failed


def test_another_machine_without_a_key_is_one_clear_line(tmp_path):
    result = droppex("--app", "tcp://192.0.2.1:7701", "ls", home=tmp_path)
    assert result.returncode in (1, 2, 6)
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_output_that_nobody_reads_is_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "droppexd.cli.client", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
