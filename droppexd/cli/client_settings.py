"""Which app `droppex` talks to, and with which keys: options, environment and the client file."""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from droppexd.config import parse_duration
from droppexd.errors import ConfigError

APP_VARIABLE = "DROPPEX_APP"
CONFIG_VARIABLE = "DROPPEX_CONFIG"
PATIENCE_VARIABLE = "DROPPEX_PATIENCE"
SYSTEM_FILE = Path("/etc/droppex/client.toml")
"""What root begins or joins a cluster with; it counts where a user has no file."""

PATIENCE_S = 30.0
"""How long a command goes on while its app is away: longer than a restart takes."""

_KEYS = ("app", "key", "patience")

_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Where the app is, and who we are to it."""

    app: str
    key: Path | None = None
    """The client's key file (`droppexd keygen`); None only reaches an app on this machine."""
    patience_s: float = PATIENCE_S
    """How long to go on while the app is away; 0: not at all."""


def user_file(environment: Mapping[str, str]) -> Path:
    """Return the client file in the user's config folder."""
    home = Path(environment.get("HOME") or "~").expanduser()
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "droppex" / "client.toml"


def load_settings(app: str | None, config: Path | None, environment: Mapping[str, str]) -> ClientSettings:
    """Return the settings; raise ConfigError with everything that is wrong.

    What is said with an option beats the environment, which beats the user's own file. The address is that
    of `--app`, else of the `--config` file, else of DROPPEX_APP, else of the DROPPEX_CONFIG file, else of the
    file in the user's config folder, or where there is none of /etc/droppex/client.toml. The key comes from
    the first of these files that is named; the user's own file counts only when it also gives the address: a
    key of one cluster is not tried on another. The patience is that of DROPPEX_PATIENCE, else of the file.
    """
    settings = _load(app, config, environment)
    told = environment.get(PATIENCE_VARIABLE)
    return replace(settings, patience_s=_patience(told, PATIENCE_VARIABLE)) if told else settings


def _load(app: str | None, config: Path | None, environment: Mapping[str, str]) -> ClientSettings:
    variable_file = environment.get(CONFIG_VARIABLE)
    named = config or (Path(variable_file) if variable_file else None)
    address = app if config else app or environment.get(APP_VARIABLE)
    if named is not None:
        return _from_file(named, address, environment.get(APP_VARIABLE))
    if address:
        return ClientSettings(app=_checked(address, "--app" if app else APP_VARIABLE))
    own = user_file(environment)
    for file in (own, SYSTEM_FILE):
        if file.exists():
            return _from_file(file, None, None)
    places = f'write app = "tcp://HOST:PORT" into {own}'
    raise ConfigError([f"no app is known: give --app tcp://HOST:PORT, set {APP_VARIABLE}, or {places}"])


def _from_file(file: Path, address: str | None, fallback: str | None) -> ClientSettings:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not valid TOML: {error}"]) from None
    problems = [f"{file}: {key}: there is no such option" for key in document if key not in _KEYS]
    key = _collect(problems, _key_file, file, document.get("key"))
    app = _collect(
        problems, _checked, address or document.get("app") or fallback, "--app" if address else f"{file}: app"
    )
    patience_s = _collect(problems, _patience, document.get("patience", PATIENCE_S), f"{file}: patience")
    if problems or app is None or patience_s is None:
        raise ConfigError(problems)
    return ClientSettings(app=app, key=key, patience_s=patience_s)


def _collect(problems: list[str], read: Callable[[*Ts], T], *args: *Ts) -> T | None:
    """Return what `read` returns, or note why it does not."""
    try:
        return read(*args)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _key_file(file: Path, value: object) -> Path | None:
    """Return the path of the key file; one that is relative starts at the folder of the client file."""
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError([f"{file}: key: must be the path of a key file, in quotes"])
    return file.parent / Path(value).expanduser()


def _patience(value: object, where: str) -> float:
    """Return seconds: of a duration as the daemon's configuration has them, or none at all."""
    if value in (0, "0", "0s"):
        return 0.0
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ConfigError([f"{where}: {error}"]) from None


def _checked(address: object, where: str) -> str:
    if not address:
        raise ConfigError([f"{where} is missing: where is the app? tcp://HOST:PORT"])
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if not match or not 0 < int(match[2]) < 65536:
        raise ConfigError([f"{where}: {address!r} is not an address of the form tcp://HOST:PORT"])
    return match[0]
