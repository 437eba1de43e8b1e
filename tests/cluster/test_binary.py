"""The one file that scripts/build-binary makes, on a machine without Python."""

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE_S, ROOT, clean_environment, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("cc")
        or not sysconfig.get_config_var("Py_ENABLE_SHARED")
        or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        reason="needs a C compiler, and Python's headers and shared library",
    ),
]

OF_THE_C_LIBRARY = ("libc", "libm", "libdl", "libpthread", "librt", "libutil", "libresolv")

IN_THE_JAIL = """
mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" && exec env -i "$(command -v chroot)" "$0" "$@"
"""


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binary")
    file = folder / "droppex-as-built"
    done = subprocess.run(
        [ROOT / "scripts" / "build-binary", "--output", file],
        env=clean_environment(folder) | {"PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{file}: {file.stat().st_size / 1e6:.1f} MB; needs Linux with glibc 2." in done.stdout
    return file


class Machine:
    """A folder, and processes that know of nothing else: their environment is empty."""

    def __init__(self, top, binary):
        self.top = top
        shutil.copy(binary, self.path("bin/droppex"))
        self.path("bin/droppexd").hardlink_to(self.path("bin/droppex"))
        self.path("home").mkdir()
        self.log = self.path("home/log")

    def path(self, name):
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def inside(self, argument):
        """Return an argument as processes of this machine see it."""
        return str(argument)

    def call(self, command, arguments):
        """Return what to start, and the environment for it."""
        return [self.path(f"bin/{command}"), *map(self.inside, arguments)], {}

    def run(self, command, *arguments, code=0):
        call, environment = self.call(command, arguments)
        done = subprocess.run(
            call,
            env=environment,
            cwd=self.top,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert code in (None, done.returncode), (arguments, done.stdout, done.stderr)
        return done

    @contextmanager
    def running(self, *arguments):
        """Run `droppexd` meanwhile; it is killed and cannot tidy up."""
        call, environment = self.call("droppexd", [*arguments, "--die-with-parent", os.getpid()])
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                call, env=environment, cwd=self.top, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for(self, process, condition):
        """Wait until something is so that a process is to do."""
        wait_for(lambda: process.poll() is not None or condition(), self.log.read_text)
        assert process.poll() is None, self.log.read_text()


class Jail(Machine):
    """A machine that has nothing but the C library."""

    def __init__(self, top, binary):
        super().__init__(top, binary)
        self.path("proc").mkdir()
        self.path("dev").mkdir()
        told = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        needed = [Path(word) for word in told.split() if word.startswith("/")]
        beside = next(path.parent for path in needed if path.name.startswith("libc."))
        others = (path for name in OF_THE_C_LIBRARY for path in beside.glob(f"{name}.so.*"))
        for path in {*needed, *others}:
            shutil.copy(path, self.path(str(path).lstrip("/")))

    def inside(self, argument):
        return str(argument).replace(str(self.top), "")

    def call(self, command, arguments):
        jailed = [self.inside(self.path(f"bin/{command}")), *map(self.inside, arguments)]
        return ["unshare", "--mount", "sh", "-c", IN_THE_JAIL, self.top, *jailed], {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"
        }


def can_make_jails():
    made = (
        os.geteuid() == 0
        and shutil.which("unshare")
        and subprocess.run(["unshare", "--mount", "true"], check=False).returncode
    )
    return made == 0


@pytest.fixture(params=["empty environment", "nothing but the C library"])
def machine(request, tmp_path, binary):
    if request.param == "empty environment":
        return Machine(tmp_path, binary)
    if not can_make_jails():
        pytest.skip("only root can change the root folder")
    return Jail(tmp_path, binary)


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def files_in(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


def test_the_story_of_the_quickstart(machine):
    home = machine.path("home")
    cluster, got, name = home / "cluster", home / "got", "docs/größer"
    at_first = files_in(machine.top)

    def droppex(*arguments):
        done = machine.run("droppex", "--config", cluster / "client.toml", "--json", *arguments)
        return json.loads(done.stdout)

    with machine.running("dev", "--pools", 6, "--data", cluster) as dev:
        machine.wait_for(dev, (cluster / "dev.json").exists)
        processes = json.loads((cluster / "dev.json").read_text())["processes"]
        pids = {process["name"]: process["pid"] for process in processes}

        droppex("put", machine.path("bin/droppex"), name)
        stat = droppex("stat", name)
        data = [shard["name"] for shard in stat["extents"][0]["shards"] if shard["index"] < 2]
        for pool in data:
            os.kill(pids[pool], signal.SIGKILL)
        fetched = droppex("get", name, got)
        assert fetched["rebuilt_chunks"] > 0
        assert filecmp.cmp(machine.path("bin/droppex"), got, shallow=False)

    for pid in pids.values():
        wait_for(lambda pid=pid: not is_running(pid), "a child outlives its parent")
    logs = "".join(path.read_text() for path in (cluster / "logs").iterdir())
    assert "no ISA-L found" not in logs
    left = files_in(machine.top) - at_first - files_in(cluster) - {got, machine.log}
    assert not left, "something was unpacked and left behind"


def test_a_cluster_with_keys(machine):
    home = machine.path("home")
    file, got = home / "file", home / "got"
    file.write_bytes(random.Random(1).randbytes(1_000_000))
    address = f"127.{random.randrange(1, 255)}.{random.randrange(255)}.1"
    machine.run("droppexd", "init", "--dir", home, "--data", home / "data", "--address", address)
    client = ("--config", home / "client.toml")
    roles = ("--role", "controller", "--role", "app", "--role", "pool")
    with machine.running("--config", home / "droppex.toml", *roles) as process:
        put = ("droppex", *client, "put", "--force", file, "docs/file")
        machine.wait_for(process, lambda: machine.run(*put, code=None).returncode == 0)
        machine.run("droppex", *client, "get", "docs/file", got)
        assert filecmp.cmp(file, got, shallow=False)
        assert machine.run("droppexd", "join-token", "--config", home / "droppex.toml").stdout.startswith(
            "droppex1-"
        )


def test_an_address_with_tls_is_asked(machine):
    home = machine.path("home")
    public = machine.run("droppexd", "bucket-key", home / "key").stdout.split()[-1].strip('"')
    bucket = ("--bucket", "https://127.0.0.1:1/where", "--bucket-key", public)
    with machine.running("--role", "app", "--controller", "tcp://127.0.0.1:1", *bucket) as process:
        machine.wait_for(
            process, lambda: "attempts to connect to 127.0.0.1:1 failed" in machine.log.read_text()
        )


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "copy"])
@pytest.mark.parametrize(("command", "says"), [("droppex", "droppex 0."), ("droppexd", "0.")])
def test_it_is_the_command_that_it_is_called(tmp_path, binary, kind, command, says):
    called = tmp_path / command
    if kind == "symbolic link":
        called.symlink_to(binary)
    elif kind == "hard link":
        called.hardlink_to(binary)
    else:
        shutil.copy(binary, called)
    assert subprocess.check_output([called, "--version"], env={}, text=True).startswith(says)


def test_the_first_argument_can_say_which_command_it_is(tmp_path, binary):
    assert subprocess.check_output([binary, "droppex", "--version"], env={}, text=True).startswith(
        "droppex 0."
    )
    named = tmp_path / "droppex"
    named.symlink_to(binary)
    assert subprocess.check_output([named, "droppexd", "--version"], env={}, text=True).startswith("0.")
    unknown = subprocess.run([binary, "--version"], env={}, capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1


def test_nothing_around_it_is_imported(tmp_path, binary):
    (tmp_path / "trio.py").write_text("raise SystemExit('a foreign module')\n")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path), "PYTHONSTARTUP": "x"}
    done = subprocess.run(
        [binary, "droppexd", "dev", "--pools", "0"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "--pools" in done.stderr


def test_it_goes_on_when_another_file_takes_its_place(tmp_path, binary):
    home = tmp_path / "home"
    machine = Machine(tmp_path, binary)
    with machine.running(
        "--role", "controller", "--data", home / "data", "--listen", "tcp://127.0.0.1:0"
    ) as process:
        machine.wait_for(process, lambda: "controller ready" in machine.log.read_text())
        new = tmp_path / "new"
        new.write_bytes(b"something else")
        new.replace(machine.path("bin/droppexd"))
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        assert "Traceback" not in machine.log.read_text()


def test_it_is_installed_without_python(tmp_path, binary):
    place = tmp_path / "place"
    for _ in range(2):  # The second time is an upgrade.
        subprocess.run(
            [ROOT / "scripts" / "install", "--binary", binary, "--root", place],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHON": "/nowhere"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
    assert (place / "etc/systemd/system/droppexd@.service").exists()
    assert not (place / "opt").exists()
    for command in ("droppex", "droppexd"):
        assert subprocess.check_output([place / "usr/local/bin" / command, "--version"], env={})
