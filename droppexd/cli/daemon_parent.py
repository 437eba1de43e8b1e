"""A child process that does not outlive its parent, however the parent ends."""

import ctypes
import os
import signal
import threading
import time

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def die_with_parent(parent: int) -> None:
    """End this process with SIGKILL as soon as the process `parent` has ended, or now if it has.

    The kernel does it on Linux; it counts the end of the *thread* that started us, so parents start
    children from their main thread. Elsewhere a thread looks who the parent is.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError, TypeError):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    else:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)
