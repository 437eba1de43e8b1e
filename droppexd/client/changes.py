"""Changes of names that are asked for again when their answer was lost.

Such an answer leaves open whether the change was made. So it is looked up before which version the name has,
and what is done again is done to that version alone: it touches nothing that somebody else has put there
meanwhile, and a name without that version says that the change was made.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from droppexd.client.patience import Trying, leaves_open
from droppexd.errors import Conflict, DroppexError, NotFound
from droppexd.model import VersionId
from droppexd.wire.messages import Changed, Condition, List, Listed, Remove, Rename

Ask = Callable[[Any], Awaitable[Any]]
"""Asks once."""


class Changes:
    """Removes and renames through one app."""

    def __init__(self, ask: Ask, start: Callable[[], Trying]) -> None:
        self._ask = ask
        self._start = start

    async def remove(self, request: Remove, known: VersionId | None) -> VersionId:
        """Remove a name and return its version. `known` is what a listing said that it is."""
        while True:
            version = known or await self._version_of(request.name)
            condition = request.condition
            if version is None or condition.absent or condition.version not in (None, version):
                changed: Changed = await self._ask(request)  # It is refused, in the words of who knows.
                return changed.version
            try:
                return await self._remove(replace(request, condition=Condition(version=version)))
            except Conflict:
                if condition.version is not None:
                    raise
                known = None  # Somebody has replaced it: then that is what is removed.

    async def _remove(self, request: Remove) -> VersionId:
        """Remove a version from its name; raise NotFound or Conflict when it was not there any more."""
        trying, lost = self._start(), False
        while True:
            try:
                changed: Changed = await self._ask(request)
            except (NotFound, Conflict):
                if lost and request.condition.version is not None:
                    return request.condition.version
                raise
            except DroppexError as error:
                lost = lost or leaves_open(error)
                await trying.pause(error)
            else:
                return changed.version

    async def rename(self, request: Rename) -> VersionId:
        """Give a file another name, or one more, and return its version.

        Raise what the last answer was lost by when somebody else has changed both names meanwhile.
        """
        version = await self._version_of(request.source)
        if version is None:
            changed: Changed = await self._ask(request)
            return changed.version
        trying, lost = self._start(), False
        while True:
            try:
                changed = await self._ask(request)
            except (NotFound, Conflict):
                if lost and await self._version_of(request.target) == version:
                    return version
                raise
            except DroppexError as error:
                await trying.pause(error)
                lost = lost or leaves_open(error)
                if lost and await self._version_of(request.target) == version:
                    return version
                if lost and not request.keep and await self._version_of(request.source) != version:
                    raise
            else:
                return changed.version

    async def _version_of(self, name: str) -> VersionId | None:
        """Return what a name points at now; None when there is no such name."""
        request = List(prefix=name, recursive=True, limit=1)
        listed: Listed = await self._start().until_done(lambda: self._ask(request))
        return next((entry.version for entry in listed.entries if entry.name == name), None)
