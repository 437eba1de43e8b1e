"""What strace wrote, as calls with their beginning and their end.

One strace follows one process and stops it at both ends of a call, so what one thread waits for from another
stands in the right order, and by the clock of the machine also across several straces.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass

CALLS = (
    "open,openat,creat,close,close_range,dup,dup2,dup3,fcntl,"
    "write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,copy_file_range,sendfile,splice,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync,sync_file_range,sync,syncfs,msync,mmap,clone,clone3,fork,vfork"
)
"""Every call that may change a file or a folder, order it to the disk, or tell which file a descriptor is."""

_LINE = re.compile(r"(\d+) +(\d+)\.(\d{9}) (.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>")
_RESULT = re.compile(r"\)\s+= (\S+)(?: [^<>]*)?(?:<(\d+)\.(\d{9})>)?$")
_TAIL = 400
_UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. Times are nanoseconds since 1970; `result` is None when it did not return."""

    thread: int
    name: str
    arguments: str
    began: int
    ended: int
    result: int | None

    def split(self):
        """Return the arguments. Strings are in hexadecimal, so nothing in them looks like a comma."""
        return self.arguments.split(", ")


def strace_command(output):
    """Return what stands before the command that is to be traced. The process keeps its id and its parent."""
    return [
        *("strace", "-D", "-f", "--seccomp-bpf", "-q", "-xx", "-s", str(2**26)),
        *("--absolute-timestamps=format:unix,precision:ns", "--syscall-times=ns"),
        *("-e", f"trace={CALLS}", "-o", str(output)),
    ]


def why_not_traceable(folder):
    """Return why strace cannot be used here; empty when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    output = folder / "probe.strace"
    done = subprocess.run([*strace_command(output), "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not output.stat().st_size:
        return f"strace may not trace here: {done.stderr.strip()}"
    return ""


def text_of(quoted):
    """Return the bytes of a string as strace writes it."""
    assert quoted.startswith('"'), quoted[:80]
    assert quoted.endswith('"'), f"strace cut a string short: {quoted[-80:]}"
    return bytes.fromhex(quoted[1:-1].replace("\\x", ""))


def ended(output):
    """Return whether the trace is complete: its first thread has ended, and strace has said so."""
    if not output.exists():
        return False
    with output.open("rb") as file:
        first = file.read(32).split(b" ", 1)[0]
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4096))
        tail = file.read()
    return any(line.startswith(first + b" ") and b" +++ " in line for line in tail.splitlines())


def read_trace(output):
    """Return the calls of a trace in the order in which they began."""
    calls = []
    pending = {}
    with output.open(encoding="ascii") as lines:
        for line in lines:
            found = _LINE.match(line.rstrip("\n"))
            assert found, f"not a line of strace: {line[:200]}"
            thread, seconds, nanoseconds, text = found.groups()
            now = int(seconds) * 10**9 + int(nanoseconds)
            if text.startswith("---"):
                continue
            if text.startswith("+++"):
                if thread in pending:
                    began, text = pending.pop(thread)
                    calls.append(_cut_off(thread, text, began, now))
                continue
            resumed = _RESUMED.match(text)
            if resumed:
                began, before = pending.pop(thread)
                calls.append(_call(thread, before + text[resumed.end() :], began, now))
            elif text.endswith(_UNFINISHED):
                pending[thread] = now, text.removesuffix(_UNFINISHED)
            else:
                calls.append(_call(thread, text, now, None))
    calls.sort(key=lambda call: call.began)
    return calls


def _call(thread, text, began, ended_at):
    tail = text[-_TAIL:]
    found = _RESULT.search(tail)
    assert found, f"strace tells no result: {tail}"
    result, seconds, nanoseconds = found.groups()
    if ended_at is None:
        ended_at = began + (int(seconds) * 10**9 + int(nanoseconds) if seconds else 0)
    name, _, arguments = text[: len(text) - len(tail) + found.start()].partition("(")
    return Call(int(thread), name, arguments, began, ended_at, None if result == "?" else int(result, 0))


def _cut_off(thread, text, began, ended_at):
    name, _, arguments = text.partition("(")
    return Call(int(thread), name, arguments.removesuffix(")"), began, ended_at, None)
