"""Take turns by number: what arrived in order is worked on in order, though tasks run in any."""

import trio


class Turns:
    """Numbers from 0, or from another; each waits for the one before to be passed on."""

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._waiting: dict[int, trio.Event] = {}
        self._broken: BaseException | None = None

    async def wait(self, number: int) -> None:
        """Return when it is this number's turn; raise the reason when the order was broken."""
        if number > self._next and self._broken is None:
            event = self._waiting[number] = trio.Event()
            try:
                await event.wait()
            finally:
                self._waiting.pop(number, None)
        self.check()

    def due(self, number: int) -> bool:
        """Whether it is this number's turn, in an order that is not broken."""
        return number == self._next and self._broken is None

    def check(self) -> None:
        """Raise the reason when the order was broken."""
        if self._broken is not None:
            raise self._broken

    def pass_on(self, numbers: int = 1) -> None:
        """End the present turn, which took so many numbers."""
        self._next += numbers
        event = self._waiting.get(self._next)
        if event is not None:
            event.set()

    def break_off(self, reason: BaseException) -> None:
        """Let nobody have a turn any more."""
        if self._broken is None:
            self._broken = reason
        for event in list(self._waiting.values()):
            event.set()
