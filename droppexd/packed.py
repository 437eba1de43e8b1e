"""The one file that `scripts/build-binary` makes: what is in it is used from memory, never unpacked.

The file is a program (scripts/binary/start.c) with a zip archive behind it. Python imports modules that are
written in Python from there by itself. Libraries are opened by the system's loader, and by path: each is
written to a file in memory, which goes with the process, however that ends.

All is installed before zlib can be imported, so nothing may be imported at the head of this module that is
not in the interpreter itself.
"""

import marshal
import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from zipimport import zipimporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

THIS_FILE = "/proc/self/exe"
"""The file that runs, also when another has taken its place on the disk meanwhile."""

INDEX = "libraries.index"
"""The entry that tells, marshalled, which modules are libraries, and which libraries need which others."""


class PackedLibraries:
    """The libraries in the archive; as a finder of imports, the modules among them."""

    def __init__(
        self, archive: zipimporter, modules: "Mapping[str, str]", needs: "Mapping[str, Sequence[str]]"
    ) -> None:
        self._archive = archive
        self._modules = modules
        self._needs = needs
        self._loaded: set[str] = set()

    def path_of(self, entry: str) -> str:
        """Return a path to a copy of an entry in memory, good as long as the process lives.

        It is never closed: the system's loader takes two libraries with the same path for one.
        """
        with open(os.memfd_create(entry.rpartition("/")[2]), "wb", closefd=False) as file:
            file.write(self._archive.get_data(f"{self._archive.archive}/{entry}"))
            return f"/proc/self/fd/{file.fileno()}"

    def load_needed(self, entry: str) -> None:
        """Load what a library needs; the system's loader then finds it by its name."""
        for needed in self._needs.get(entry, ()):
            if needed not in self._loaded:
                import ctypes

                self.load_needed(needed)
                ctypes.CDLL(self.path_of(needed))
                self._loaded.add(needed)

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Tell how to load a module, if it is a library. Called by the import system."""
        entry = self._modules.get(name)
        if entry is None:
            return None
        return ModuleSpec(name, _Loader(self, name, entry), origin=f"{THIS_FILE}/{entry}")


class _Loader(ExtensionFileLoader):
    """Loads one module that is a library."""

    def __init__(self, libraries: PackedLibraries, name: str, entry: str) -> None:
        super().__init__(name, f"{THIS_FILE}/{entry}")
        self._libraries = libraries
        self._entry = entry

    def create_module(self, spec: ModuleSpec) -> "ModuleType":
        self._libraries.load_needed(self._entry)
        in_memory = self._libraries.path_of(self._entry)
        return super().create_module(ModuleSpec(spec.name, self, origin=in_memory))


_libraries: PackedLibraries | None = None


def install() -> None:
    """Make what is in this file importable. Called once, by the program at its beginning."""
    global _libraries  # noqa: PLW0603
    archive = zipimporter(THIS_FILE)
    modules, needs = marshal.loads(archive.get_data(f"{THIS_FILE}/{INDEX}"))  # noqa: S302 - our own
    _libraries = PackedLibraries(archive, modules, needs)
    sys.meta_path.insert(0, _libraries)


def is_packed() -> bool:
    """Tell whether this process runs from the one file."""
    return _libraries is not None


def path_of(entry: str) -> str | None:
    """Return a path to an entry of the one file, good in this process only; None without that file."""
    return None if _libraries is None else _libraries.path_of(entry)
