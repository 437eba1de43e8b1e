"""What happened in a run: a digest of every delivery, and the lines that a person reads."""

import hashlib

import trio

MOST_LINES = 20_000


class Trace:
    """One run's trace. `messages` has every delivery listed, too."""

    def __init__(self, *, messages: bool = False) -> None:
        self.lines: list[str] = []
        self.deliveries = 0
        self._messages = messages
        self._digest = hashlib.blake2b(digest_size=16)

    def say(self, text: str) -> None:
        """Note something that a person would want to know."""
        if len(self.lines) < MOST_LINES:
            self.lines.append(f"{trio.current_time():9.4f}  {text}")

    def delivered(self, when, source, target, frames) -> None:
        """Note one message, as the network tells it."""
        self.deliveries += 1
        self._digest.update(f"{when!r} {source} {target} ".encode())
        for frame in frames:
            self._digest.update(frame)
        if self._messages:
            self.say(f"    {source} -> {target}: {_kind(frames)}")

    def digest(self) -> str:
        """Return what two runs have in common that delivered the same, byte for byte."""
        return self._digest.hexdigest()


def _kind(frames) -> str:
    from droppexd.errors import DroppexError
    from droppexd.wire.codec import decode

    try:
        message = decode(frames)[0]
    except DroppexError as error:
        return f"not a message: {error}"
    return str(message)[:200]
