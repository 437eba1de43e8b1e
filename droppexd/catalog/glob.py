"""Globs over names, matched in time linear in the name, whatever the pattern.

- `*` matches any run of characters, `?` one character, `[a-z]` and `[!a-z]` one of a class (or not of it);
  none of them matches a slash.
- `**` matches anything, slashes too; `**/` at the start of a part also matches nothing, so that `a/**/b`
  finds `a/b`.
- A pattern with a slash is matched against the whole name; one without is matched against the name's last
  part, in any folder.
- A special character stands for itself in a class: `[*]`, `[?]`, `[[]`. A `[` that no `]` ends stands for
  itself.

The pattern is a nondeterministic automaton whose set of states is the bits of an int; sets that were met
become dictionaries from a character to the next set, so that a character costs one dictionary look-up. A
regular expression would be as quick, but can be made to backtrack for ever by whoever writes the pattern.
"""

from collections.abc import Callable

_MOST_STATES = 2000
"""States that are kept; each holds a dictionary of the characters met there."""

_Accepts = Callable[[str], bool]


class _Token:
    """One step of a pattern: a character to match, a star to stay in, or a fork."""

    __slots__ = ("accepts", "fork", "star")

    def __init__(self, accepts: _Accepts, *, star: bool = False, fork: bool = False) -> None:
        self.accepts = accepts
        self.star = star
        self.fork = fork
        """Stands before the star and the slash of `**/`, which may be left out together."""


def _nothing(_character: str) -> bool:
    return False


def _anything(_character: str) -> bool:
    return True


def _no_slash(character: str) -> bool:
    return character != "/"


def _literal(wanted: str) -> _Accepts:
    return wanted.__eq__


def _class_end(pattern: str, start: int) -> int:
    """Return where the class that opens at `start` ends, or -1. A `]` in first place stands for itself."""
    first = start + 1
    if pattern[first : first + 1] == "!":
        first += 1
    return pattern.find("]", first + 1)


def _class(body: str) -> _Accepts:
    """Return the test for the inside of `[...]`."""
    negated = body.startswith("!")
    members = body[1:] if negated else body
    singles: set[str] = set()
    ranges: list[tuple[str, str]] = []
    position = 0
    while position < len(members):
        if members[position + 1 : position + 2] == "-" and position + 2 < len(members):
            ranges.append((members[position], members[position + 2]))
            position += 3
        else:
            singles.add(members[position])
            position += 1

    def accepts(character: str) -> bool:
        inside = character in singles or any(low <= character <= high for low, high in ranges)
        return inside is not negated and character != "/"

    return accepts


def _parse(pattern: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "*":
            end = position
            while pattern[end : end + 1] == "*":
                end += 1
            crossing = end - position > 1
            whole_part = position == 0 or pattern[position - 1] == "/"
            if crossing and whole_part and pattern[end : end + 1] == "/":
                if len(tokens) >= 3 and tokens[-3].fork:
                    position = end + 1  # `**/**/` says no more than `**/`.
                    continue
                tokens.append(_Token(_nothing, fork=True))
            tokens.append(_Token(_anything if crossing else _no_slash, star=True))
            position = end
            continue
        if character == "[" and (end := _class_end(pattern, position)) > 0:
            tokens.append(_Token(_class(pattern[position + 1 : end])))
            position = end + 1
            continue
        tokens.append(_Token(_no_slash if character == "?" else _literal(character)))
        position += 1
    return tokens


def _literal_prefix(pattern: str) -> str:
    """Return what every matching name starts with."""
    for position, character in enumerate(pattern):
        if character in "*?" or (character == "[" and _class_end(pattern, position) > 0):
            return pattern[:position]
    return pattern


class _State(dict[str, "_State"]):
    """A set of positions in the pattern, and the states that follow it."""

    def __init__(self, glob: "Glob", positions: int) -> None:
        super().__init__()
        self._glob = glob
        self.positions = positions

    def __missing__(self, character: str) -> "_State":
        return self._glob.follow(self, character)


class Glob:
    """A compiled pattern. `prefix` is what every matching name starts with."""

    def __init__(self, pattern: str) -> None:
        anywhere = "/" not in pattern
        self.prefix = "" if anywhere else _literal_prefix(pattern)
        self._tokens = _parse("**/" + pattern if anywhere else pattern)
        self._stars = sum(1 << i for i, token in enumerate(self._tokens) if token.star)
        self._forks = sum(1 << i for i, token in enumerate(self._tokens) if token.fork)
        self._accepting = 1 << len(self._tokens)
        self._moves: dict[str, tuple[int, int]] = {}
        self._states: dict[int, _State] = {}
        self._first = self._closure(1)

    def matches(self, name: str) -> bool:
        """Return whether the whole name matches."""
        state = self._state(self._first)
        for character in name:
            state = state[character]
        return bool(state.positions & self._accepting)

    def follow(self, state: _State, character: str) -> _State:
        """Return the state behind a character, and remember it."""
        if len(self._states) > _MOST_STATES:
            self._states.clear()
            self._moves.clear()
            return self._state(self._step(state.positions, character))
        following = self._state(self._step(state.positions, character))
        state[character] = following
        return following

    def _step(self, positions: int, character: str) -> int:
        moves = self._moves.get(character)
        if moves is None:
            advance = stay = 0
            for i, token in enumerate(self._tokens):
                if token.accepts(character):
                    if token.star:
                        stay |= 1 << i
                    else:
                        advance |= 1 << i
            self._moves[character] = moves = (advance, stay)
        return self._closure((positions & moves[0]) << 1 | positions & moves[1])

    def _closure(self, positions: int) -> int:
        """Add the positions that are reached without a character: behind a star, and both ways of a fork."""
        while True:
            forked = positions & self._forks
            more = positions | (positions & self._stars) << 1 | forked << 1 | forked << 3
            if more == positions:
                return positions
            positions = more

    def _state(self, positions: int) -> _State:
        state = self._states.get(positions)
        if state is None:
            self._states[positions] = state = _State(self, positions)
        return state
