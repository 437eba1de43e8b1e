"""Make the one file that is droppex and droppexd: run by scripts/build-binary.

It is scripts/binary/start.c, which holds Python itself, with a zip archive behind it: Python's standard
library, the packages that setup.cfg asks for, and droppexd. `droppexd/packed.py` tells how that is used.
"""

import argparse
import configparser
import fcntl
import hashlib
import importlib.util
import marshal
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "binary"

LEFT_OUT = {
    "__pycache__", "_tests", "bin", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "tkinter", "turtle.py", "turtledemo", "venv",
}  # fmt: skip
"""Folders and files of the standard library and of packages that nothing here uses."""

LEFT_OUT_MODULES = re.compile(
    r"_test\w*|_xx\w*|xxlimited\w*|_crypt|_curses|_curses_panel|_dbm|_gdbm|_tkinter|nis|ossaudiodev|readline|spwd"
    r"|pyeclib_c"
)
"""Libraries that nothing here uses. Of PyECLib only ISA-L is, without its own module."""

NOT_DATA = re.compile(r"\.(c|h|pxd|pyi|pyx|so)$|\.libs/|/(RECORD|REQUESTED|direct_url\.json|py\.typed)$")

OF_THE_SYSTEM = re.compile(r"(linux-vdso|ld-linux[\w-]*|lib(c|m|dl|pthread|rt|util|resolv|python[\d.]+))\.so")
"""What is there already: the C library's own, which nobody may bring along, and Python."""

GLIBC = re.compile(rb"\0GLIBC_(\d+)\.(\d+)")

EARLY = re.compile(
    r"encodings/|importlib/|warnings\.|droppexd/(__init__|packed)\.|libraries\.index$|.*/zlib\."
)
"""What is imported before zlib is there to decompress it."""

LONG_AGO = (1980, 1, 1, 0, 0, 0)


class Failed(Exception):
    """The file cannot be made: one line for the person who asked."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/build-binary", description="Make droppex one executable file."
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: dist/droppex-VERSION-linux-MACHINE"
    )
    options = parser.parse_args()
    try:
        with (WORK / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # What is kept from build to build is changed by one at a time.
            file = build((options.output or default_output()).absolute())
    except Failed as error:
        sys.exit(f"build-binary: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"build-binary: {error.cmd[0]} failed")
    glibc = (base_folder() / "glibc").read_text()
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; needs Linux with glibc {glibc} or later")


def default_output() -> Path:
    text = (ROOT / "droppexd" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', text)
    assert version
    return ROOT / "dist" / f"droppex-{version[1]}-linux-{platform.machine()}"


def build(output: Path) -> Path:
    """Make the file from what is there already of an earlier build, and what has changed since."""
    if sys.platform != "linux":
        raise Failed("only for Linux so far")
    base = base_folder()
    if not base.exists():
        make_base(base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".droppex-") as scratch:
        new = Path(scratch) / output.name
        archive = Path(scratch) / "archive.zip"
        shutil.copyfile(base / "archive.zip", archive)
        with zipfile.ZipFile(archive, "a") as file:
            add_python(file, ROOT, sorted((ROOT / "droppexd").rglob("*.py")))
        with new.open("wb") as target:
            for part in (base / "start", archive):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        new.chmod(0o755)
        try_out(new)
        new.replace(output)
    return output


def try_out(file: Path) -> None:
    """Run the file as a machine without Python would."""
    for command in ("droppex", "droppexd"):
        done = subprocess.run(
            [file, command, "--version"], env={}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"what was made does not run: {done.stderr.strip()}")


def base_folder() -> Path:
    """Return where all but droppexd itself is, if an earlier build made it from the same."""
    sources = [Path(__file__), *sorted((HERE / "binary").iterdir())]
    told = [
        *requirements(),
        sys.version,
        sys.base_prefix,
        *(source.read_text(encoding="utf-8") for source in sources),
    ]
    return WORK / f"base-{hashlib.sha256('|'.join(told).encode()).hexdigest()[:16]}"


def requirements() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["options"]["install_requires"].split()


def make_base(base: Path) -> None:
    """Make all but droppexd itself: the program, and the archive with the rest."""
    for former in WORK.glob("base-*"):
        shutil.rmtree(former)
    with tempfile.TemporaryDirectory(dir=WORK, prefix="new-") as scratch:
        made = Path(scratch) / "base"
        made.mkdir()
        packages = Path(scratch) / "packages"
        print("Installing what droppex needs ...", flush=True)
        install(packages)
        libraries = find_libraries(packages)
        print("Compiling ...", flush=True)
        compile_start(made / "start", libraries.inside, Path(scratch) / "inside")
        with zipfile.ZipFile(made / "archive.zip", "w") as archive:
            add_libraries(archive, libraries, Path(scratch) / "inside")
            for folder in (Path(sysconfig.get_path("stdlib")), packages):
                add_python(archive, folder, sorted(files_below(folder, ".py")))
            add_data(archive, packages)
        (made / "glibc").write_text(needed_glibc(libraries))
        made.rename(base)


def install(packages: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install"]
    subprocess.run(
        [*pip, "--no-compile", "--target", packages, *requirements()], stdin=subprocess.DEVNULL, check=True
    )
    shutil.copyfile(HERE / "binary" / "certifi.py", packages / "certifi" / "__init__.py")


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in LEFT_OUT or path.name.startswith("config-"):
            continue
        if path.is_dir():
            yield from files_below(path, suffix)
        elif path.name.endswith(suffix):
            yield path


# -- libraries -------------------------------------------------------------------------------------


class Library(NamedTuple):
    """A library that goes into the archive."""

    path: Path
    entry: str
    """Where in the archive."""
    module: str = ""
    """What it is imported as, if it is a module."""


class Libraries(NamedTuple):
    """All libraries, by where they go."""

    inside: list[Path]
    """Inside the program: Python as the last, and before it what it needs to read the archive."""
    archived: list[Library]


def find_libraries(packages: Path) -> Libraries:
    modules = [
        *find_modules(Path(sysconfig.get_config_var("DESTSHARED")), "lib-dynload"),
        *find_modules(packages, ""),
    ]
    python = find_libpython()
    first = [python, *(module.path for module in modules if module.module in ("zlib", "_ctypes"))]
    inside = [*in_order(path for library in first for path in needed_by(library)), python]
    names = {path.name for path in inside}
    rest = in_order(path for module in modules for path in needed_by(module.path) if path.name not in names)
    (isal,) = packages.glob("[Pp]y[Ee][Cc][Ll]ib.libs/libisal*.so*")
    needed = [Library(path, f"libraries/{path.name}") for path in rest]
    return Libraries(inside, [*modules, *needed, Library(isal, "libraries/libisal.so")])


def find_modules(folder: Path, prefix: str) -> Iterator[Library]:
    for path in sorted(files_below(folder, ".so")):
        relative = path.relative_to(folder)
        module = str(relative.with_name(path.name.partition(".")[0])).replace("/", ".")
        if not LEFT_OUT_MODULES.fullmatch(module) and ".libs" not in relative.parts[0]:
            yield Library(path, str(Path(prefix) / relative), module)


def find_libpython() -> Path:
    name = sysconfig.get_config_var("INSTSONAME") or ""
    path = Path(sysconfig.get_config_var("LIBDIR")) / name
    if ".so" in name and path.is_file():
        return path
    raise Failed("this Python has no shared library; on Debian and Ubuntu: apt-get install python3-dev")


@cache
def needed_by(library: Path) -> frozenset[Path]:
    """Return all libraries that one needs, directly or not, without Python and the C library's own."""
    told = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    found = set()
    for name, path in re.findall(r"^\s*(\S+) => (not found|\S+)", told, re.MULTILINE):
        if path == "not found":
            raise Failed(f"{library} needs {name}, which is not found")
        if not OF_THE_SYSTEM.match(name):
            found.add(Path(path))
    return frozenset(found)


def in_order(libraries: Iterable[Path]) -> list[Path]:
    """Return libraries, of each name one, such that each comes behind those that it needs."""
    by_name = {path.name: path for path in libraries}
    return sorted(by_name.values(), key=lambda path: (len(needed_by(path)), path.name))


def add_libraries(archive: zipfile.ZipFile, libraries: Libraries, scratch: Path) -> None:
    """Add the libraries, and the index that `droppexd/packed.py` reads."""
    entries = {library.path.name: library.entry for library in libraries.archived}
    modules = {library.module: library.entry for library in libraries.archived if library.module}
    needs = {}
    for library in libraries.archived:
        add(archive, library.entry, stripped(library.path, scratch).read_bytes())
        names = [path.name for path in in_order(needed_by(library.path))]
        needs[library.entry] = tuple(entries[name] for name in names if name in entries)
    add(archive, "libraries.index", marshal.dumps((modules, needs)))


def stripped(library: Path, scratch: Path) -> Path:
    """Return a library of Python's own without what is for debuggers. Those of wheels stay as they came."""
    if not library.is_relative_to(sys.base_prefix):
        return library
    copy = scratch / library.name
    subprocess.run(["strip", "--strip-unneeded", "-o", copy, library], check=True)
    return copy


def compile_start(program: Path, inside: list[Path], scratch: Path) -> None:
    """Compile the program that holds these libraries."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Failed("there is no C compiler; on Debian and Ubuntu: apt-get install gcc libc6-dev")
    scratch.mkdir()
    lines = []
    for number, path in enumerate(inside):
        shutil.copyfile(stripped(path, scratch), scratch / f"{number}.so")
        lines.append(f'LIBRARY({number}, "{number}.so", "{path.name}")\n')
    (scratch / "libraries.def").write_text("".join(lines), encoding="utf-8")
    includes = [
        f"-I{folder}"
        for folder in (scratch, sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    ]
    command = [compiler, "-O2", "-Wall", "-s", *includes, f"-Wa,-I{scratch}", "-o", program]
    subprocess.run([*command, HERE / "binary" / "start.c", "-ldl"], check=True)


def needed_glibc(libraries: Libraries) -> str:
    """Return the newest version of the C library that one of them names."""
    paths = [*libraries.inside, *(library.path for library in libraries.archived)]
    versions = {tuple(map(int, version)) for path in paths for version in GLIBC.findall(path.read_bytes())}
    return ".".join(map(str, max(versions)))


# -- modules in Python -----------------------------------------------------------------------------


def add_python(archive: zipfile.ZipFile, folder: Path, sources: list[Path]) -> None:
    """Add modules, compiled."""
    names = [str(source.relative_to(folder)) for source in sources]
    with ProcessPoolExecutor() as pool:
        for name, code in zip(names, pool.map(compiled, sources, names, chunksize=16), strict=True):
            if code is not None:
                add(archive, f"{name}c", code)


def compiled(source: Path, name: str) -> bytes | None:
    """Return the content of a .pyc, or None for what is not meant for this version of Python."""
    try:
        code = compile(source.read_bytes(), name, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    unchecked = 0b01
    return importlib.util.MAGIC_NUMBER + unchecked.to_bytes(4, "little") + bytes(8) + marshal.dumps(code)


def add_data(archive: zipfile.ZipFile, packages: Path) -> None:
    """Add the other files of packages: their licences, versions and certificates."""
    for path in sorted(files_below(packages, "")):
        entry = str(path.relative_to(packages))
        if path.suffix != ".py" and not NOT_DATA.search(entry):
            add(archive, entry, path.read_bytes())


def add(archive: zipfile.ZipFile, entry: str, content: bytes) -> None:
    """Add an entry that is the same whenever it is made."""
    info = zipfile.ZipInfo(entry, LONG_AGO)
    early = EARLY.match(entry)
    archive.writestr(info, content, zipfile.ZIP_STORED if early else zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
