"""The machine itself: software, coding, limits, memory, and whether its clock is kept right."""

import ctypes
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from droppexd import __version__
from droppexd.coding.code import parity_matrix
from droppexd.coding.kernels import Kernel
from droppexd.config import Config
from droppexd.doctor.verdicts import Verdict, error, ok, warning
from droppexd.model import CHUNK_SIZE, Layout, Role
from droppexd.wire.messages import PROTOCOL_VERSION

Clock = Callable[[], float]
"""Seconds since an unspecified moment."""

_MB = 1_000_000
_MIB = 1024 * 1024


def judge_software() -> list[Verdict]:
    """Return what runs here."""
    runs = f"droppex {__version__}, protocol {PROTOCOL_VERSION}, Python {platform.python_version()}"
    return [ok("versions", f"this is {runs}")]


# -- coding ----------------------------------------------------------------------------------------

_CODING_S = 0.2
_CODING_LAYOUT = Layout(4, 2)


class CodingSpeed(NamedTuple):
    """Which kernel codes, and how fast: bytes of files a second, at 4+2 on one core."""

    kernel: str
    where: str
    bytes_per_s: float


def measure_coding(kernel: Kernel, clock: Clock) -> CodingSpeed:
    """Code chunks for a moment, once at the least."""
    matrix = parity_matrix(_CODING_LAYOUT)
    piece = bytes(range(256)) * (CHUNK_SIZE // _CODING_LAYOUT.k // 256)
    sources = [piece] * _CODING_LAYOUT.k
    kernel.apply(matrix, sources)  # The first time tables are made.
    began, coded = clock(), 0
    while True:
        kernel.apply(matrix, sources)
        coded += CHUNK_SIZE
        taken_s = clock() - began
        if taken_s >= _CODING_S:
            return CodingSpeed(kernel.name, str(getattr(kernel, "path", "")), coded / taken_s)


def judge_coding(speed: CodingSpeed) -> list[Verdict]:
    """Say whether ISA-L was found."""
    found = f"{speed.bytes_per_s / _MB:,.0f} MB/s".replace(",", " ")
    if speed.where:
        return [ok("coding", f"ISA-L ({speed.where}) codes {found} at 4+2")]
    return [
        warning(
            "coding",
            f"ISA-L is not found: the portable kernel codes {found} at 4+2",
            "install PyECLib into this Python, or the system's libisal2",
        )
    ]


# -- limits ----------------------------------------------------------------------------------------

_FEW_FILES = 1024
_TOO_FEW_FILES = 256


def read_open_files() -> int:
    """Return how many files a process that is started from here may have open; -1: any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return -1 if soft == resource.RLIM_INFINITY else soft


def judge_open_files(most: int) -> list[Verdict]:
    """Say whether sockets and files are enough for a role."""
    if most < 0:
        return [ok("limits", "any number of files may be open")]
    if most >= _FEW_FILES:
        return [ok("limits", f"{most} files may be open")]
    text = f"only {most} files may be open: each peer and each transfer takes some"
    advice = "`ulimit -n 65536` before the start; services of `scripts/install` have that already"
    return [(error if most < _TOO_FEW_FILES else warning)("limits", text, advice)]


class Memory(NamedTuple):
    """What there is, in bytes, and how the kernel hands it out."""

    total_bytes: int
    """Of the machine, or of the control group if that is less."""
    strict: bool
    """Whether the kernel refuses memory that may never be used (vm.overcommit_memory = 2)."""


def read_memory(root: Path = Path("/")) -> Memory | None:
    """Return what the kernel says below /proc and /sys; None where it says nothing."""
    total = _first_number(root / "proc/meminfo", "MemTotal:")
    if total is None:
        return None
    group = _first_number(root / "sys/fs/cgroup/memory.max")
    strict = _first_number(root / "proc/sys/vm/overcommit_memory") == 2
    return Memory(min(total * 1024, group or total * 1024), strict)


def _first_number(file: Path, label: str = "") -> int | None:
    """Return the first number behind a label at the beginning of a line."""
    try:
        lines = file.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.removeprefix(label).split()
        if line.startswith(label) and words and words[0].isdigit():
            return int(words[0])
    return None


_ROLE_BYTES = 128 * _MIB
"""What a role takes without its buffers, about: an interpreter, its caches, and what is under way."""


def memory_needed(config: Config) -> int:
    """Return what the roles of a configuration take together, in bytes, about."""
    buffers = 2 * config.app_buffer if Role.APP in config.roles else 0
    return len(config.roles) * _ROLE_BYTES + buffers


def judge_memory(memory: Memory | None, needed_bytes: int) -> list[Verdict]:
    """Say whether there is memory enough for the roles here."""
    if memory is None:
        return [ok("limits", "how much memory there is cannot be told here")]
    sizes = f"there are {memory.total_bytes // _MIB} MiB of memory"
    verdicts = []
    if memory.total_bytes < needed_bytes:
        text = f"{sizes}; the roles here may take {needed_bytes // _MIB} MiB"
        verdicts.append(warning("limits", text, "run fewer roles here, or lower `buffer` in [app]"))
    if memory.strict:
        text = "the kernel refuses memory before it is used up (vm.overcommit_memory = 2)"
        verdicts.append(
            warning("limits", text, "`sysctl vm.overcommit_memory=0`, unless there is much memory to spare")
        )
    taken = f"; the roles here may take {needed_bytes // _MIB} MiB" if needed_bytes else ""
    return verdicts or [ok("limits", sizes + taken)]


# -- clock -----------------------------------------------------------------------------------------

_STA_UNSYNC = 0x0040
_TIMEX_BYTES = 256
"""More than `struct timex` takes on any machine."""
_TIMEX_STATUS = 5
"""Its place in `struct timex`, in longs: behind modes, offset, freq, maxerror and esterror."""


def read_clock_state() -> bool | None:
    """Return whether the kernel's clock is kept right by a time service; None when it does not say.

    Asks `adjtimex` to change nothing (adjtimex(2)), which needs no rights.
    """
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    state = ctypes.create_string_buffer(_TIMEX_BYTES)
    if adjtimex(state) < 0:
        return None
    status = ctypes.c_int.from_buffer(state, _TIMEX_STATUS * ctypes.sizeof(ctypes.c_long)).value
    return not status & _STA_UNSYNC


def judge_clock_state(synchronised: bool | None) -> list[Verdict]:
    """Say whether this machine's clock is kept right."""
    if synchronised is None:
        return [ok("clock", "whether a time service sets this machine's clock cannot be told here")]
    if synchronised:
        return [ok("clock", "a time service sets this machine's clock")]
    return [
        warning(
            "clock",
            "no time service sets this machine's clock, as far as its kernel knows",
            "start one: systemd-timesyncd, chrony or ntpd",
        )
    ]
