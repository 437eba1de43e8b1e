"""Wall clocks of processes that are shifted."""

from pathlib import Path

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
"""Of Debian's package libfaketime: it shifts the wall clock of one process, and nothing else."""


class Clocks:
    """What time it is for each process."""

    def __init__(self, folder):
        self._folder = folder
        folder.mkdir()

    def give(self, process):
        """Have a process, not started yet, read a clock of its own."""
        self.set(process, "+0")
        process.command = [
            "env",
            f"LD_PRELOAD={LIBRARIES[0]}",
            f"FAKETIME_TIMESTAMP_FILE={self._folder / process.name}",
            "FAKETIME_CACHE_DURATION=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            *process.command,
        ]

    def clean_up(self):
        """Remove what the library leaves behind of processes that were killed."""
        for file in Path("/dev/shm").glob("*faketime_s*"):
            if not Path(f"/proc/{file.name.rpartition('_')[2]}").exists():
                file.unlink(missing_ok=True)

    def set(self, process, shift):
        """Shift a clock at once, as `+3600` seconds has it."""
        file = self._folder / process.name
        new = file.with_suffix(".new")
        new.write_text(f"{shift}\n")
        new.replace(file)
