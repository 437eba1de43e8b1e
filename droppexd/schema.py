"""Turn frozen dataclasses into plain lists and back, checking every value on the way in.

A record is packed as the list of its fields in the order of their declaration. Fields are described by
their annotations: `int`, `bool`, `str`, `bytes`, `float`, `X | None`, `tuple[X, ...]`, NamedTuples and other
records, with bounds in `Annotated[int, Bounds(0, 10)]` (the value of an int, the length of the rest).
A field without bounds gets the defaults below: nothing that comes from outside is unbounded.

Compatibility: a list may be shorter than the record when the missing fields have defaults, and longer by
a few fields that a newer release added, which are ignored.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform

from droppexd.errors import RemoteProtocolError

Raw = Any
"""What msgpack gives: None, bool, int, float, str, bytes, list or dict."""

T = TypeVar("T")

MAX_EXTRA_FIELDS = 32
"""Fields of newer releases that are skipped before a list is called malformed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest and largest value of an int, or length of anything else."""

    low: int
    high: int


_INT_BOUNDS = Bounds(0, 2**63 - 1)
_TEXT_BOUNDS = Bounds(0, 4096)
_BYTES_BOUNDS = Bounds(0, 4096)
_LIST_BOUNDS = Bounds(0, 16384)

_Pack = Callable[[Any], Raw]
_Unpack = Callable[[Raw], Any]

_PACKERS: dict[type, _Pack] = {}
_UNPACKERS: dict[type, _Unpack] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass that `pack` and `unpack` know."""
    made = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)
    _register(made)
    return made


def pack(value: Any) -> Raw:
    """Return the plain list for a record or a NamedTuple."""
    return _packer_of(type(value))(value)


def unpack(cls: type[T], raw: Raw) -> T:
    """Return the record that `raw` describes; raise RemoteProtocolError when it does not fit."""
    value: T = _unpacker_of(cls)(raw)
    return value


def _packer_of(cls: type) -> _Pack:
    packer = _PACKERS.get(cls)
    if packer is None:
        _register(cls)
        packer = _PACKERS[cls]
    return packer


def _unpacker_of(cls: type) -> _Unpack:
    unpacker = _UNPACKERS.get(cls)
    if unpacker is None:
        _register(cls)
        unpacker = _UNPACKERS[cls]
    return unpacker


def _malformed(where: str, what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"malformed {where}: {what}")


def _register(cls: type) -> None:
    """Compile the two functions of a record or NamedTuple class from its annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    if dataclasses.is_dataclass(cls):
        described = dataclasses.fields(cls)
        names = tuple(field.name for field in described)
        required = sum(
            1
            for field in described
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
    else:
        names = tuple(cls._fields)  # type: ignore[attr-defined]
        required = len(names) - len(cls._field_defaults)  # type: ignore[attr-defined]
    packs = tuple(_field_packer(hints[name]) for name in names)
    unpacks = tuple(_field_unpacker(hints[name], f"{cls.__name__}.{name}") for name in names)
    _PACKERS[cls] = _compile_packer(names, packs)
    careful = _careful_unpacker(cls, names, unpacks, required)
    _UNPACKERS[cls] = _compile_unpacker(cls, names, tuple(hints[name] for name in names), unpacks, careful)


def _compile_packer(names: tuple[str, ...], packs: tuple[_Pack | None, ...]) -> _Pack:
    """Write the packer as source, so that a message costs one call and not one a field."""
    items = [
        f"value.{name}" if function is None else f"pack_{name}(value.{name})"
        for name, function in zip(names, packs, strict=True)
    ]
    scope: dict[str, Any] = {f"pack_{n}": f for n, f in zip(names, packs, strict=True) if f}
    exec(f"def packer(value):\n    return [{', '.join(items)}]", scope)
    packer: _Pack = scope["packer"]
    return packer


def _compile_unpacker(
    cls: type, names: tuple[str, ...], hints: tuple[Any, ...], unpacks: tuple[_Unpack, ...], careful: _Unpack
) -> _Unpack:
    """Write the unpacker as source: one pass over a list of the usual length whose plain fields fit.

    Whatever is unusual goes to the careful one, which knows defaults and words for what is wrong.
    """
    checks = ["type(raw) is list", f"len(raw) == {len(names)}"]
    items = []
    scope: dict[str, Any] = {"cls": cls, "careful": careful}
    for at, (name, hint, unpack_field) in enumerate(zip(names, hints, unpacks, strict=True)):
        check = _plain_check(f"raw[{at}]", hint)
        if check:
            checks.append(check)
        else:
            scope[f"unpack_{name}"] = unpack_field
        items.append(f"{name}=raw[{at}]" if check else f"{name}=unpack_{name}(raw[{at}])")
    source = (
        f"def unpacker(raw):\n    if {' and '.join(checks)}:\n"
        f"        return cls({', '.join(items)})\n    return careful(raw)"
    )
    exec(source, scope)
    unpacker: _Unpack = scope["unpacker"]
    return unpacker


def _plain_check(item: str, hint: Any) -> str:
    """Return the condition under which a plain field is taken as it is; empty for all other fields."""
    inner, bounds = _split(hint)
    if inner is bool:
        return f"type({item}) is bool"
    if inner is int:
        low, high = dataclasses.astuple(bounds or _INT_BOUNDS)
        return f"type({item}) is int and {low} <= {item} <= {high}"
    if inner is str or inner is bytes:
        low, high = dataclasses.astuple(bounds or (_TEXT_BOUNDS if inner is str else _BYTES_BOUNDS))
        return f"type({item}) is {inner.__name__} and {low} <= len({item}) <= {high}"
    return ""


def _careful_unpacker(
    cls: type, names: tuple[str, ...], unpacks: tuple[_Unpack, ...], required: int
) -> _Unpack:
    most = len(names) + MAX_EXTRA_FIELDS
    where = cls.__name__
    positional = not dataclasses.is_dataclass(cls)

    def unpacker(raw: Raw) -> Any:
        if type(raw) is not list and type(raw) is not tuple:
            raise _malformed(where, "not a list")
        if not required <= len(raw) <= most:
            raise _malformed(where, f"{len(raw)} fields")
        values = [check(item) for check, item in zip(unpacks, raw, strict=False)]
        if positional:
            return cls(*values)
        return cls(**dict(zip(names, values, strict=False)))

    return unpacker


def _split(hint: Any) -> tuple[Any, Bounds | None]:
    """Take `Annotated` apart."""
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), None)
        return inner, bounds
    return hint, None


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _optional_of(hint: Any) -> Any:
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if len(inner) != 1:
        raise TypeError(f"{hint} is no X | None")
    return inner[0]


def _field_packer(hint: Any) -> _Pack | None:
    """Return the packer of a field, or None when the value is plain already."""
    inner, _ = _split(hint)
    if inner in (int, bool, str, bytes, float):
        return None
    if _is_optional(inner):
        some = _field_packer(_optional_of(inner))
        return None if some is None else lambda value: None if value is None else some(value)
    if typing.get_origin(inner) is tuple:
        item = _field_packer(typing.get_args(inner)[0])
        return list if item is None else lambda value: [item(one) for one in value]
    return _packer_of(inner)


def _field_unpacker(hint: Any, where: str) -> _Unpack:
    inner, bounds = _split(hint)
    if inner is bool:
        return _bool_unpacker(where)
    if inner is float:
        return _float_unpacker(where)
    if inner is int:
        return _int_unpacker(where, bounds or _INT_BOUNDS)
    if inner is str:
        return _sized_unpacker(where, str, bounds or _TEXT_BOUNDS)
    if inner is bytes:
        return _sized_unpacker(where, bytes, bounds or _BYTES_BOUNDS)
    if _is_optional(inner):
        some = _field_unpacker(_optional_of(inner), where)
        return lambda raw: None if raw is None else some(raw)
    if typing.get_origin(inner) is tuple:
        return _tuple_unpacker(where, typing.get_args(inner)[0], bounds or _LIST_BOUNDS)
    return _unpacker_of(inner)


def _bool_unpacker(where: str) -> _Unpack:
    def unpacker(raw: Raw) -> bool:
        if raw is True or raw is False:
            return raw
        raise _malformed(where, "not a bool")

    return unpacker


def _float_unpacker(where: str) -> _Unpack:
    def unpacker(raw: Raw) -> float:
        if type(raw) is float or type(raw) is int:
            return float(raw)
        raise _malformed(where, "not a number")

    return unpacker


def _int_unpacker(where: str, bounds: Bounds) -> _Unpack:
    low, high = bounds.low, bounds.high

    def unpacker(raw: Raw) -> int:
        if type(raw) is int and low <= raw <= high:
            return raw
        raise _malformed(where, f"not an int from {low} to {high}")

    return unpacker


def _sized_unpacker(where: str, kind: type[str] | type[bytes], bounds: Bounds) -> _Unpack:
    low, high = bounds.low, bounds.high

    def unpacker(raw: Raw) -> Any:
        if type(raw) is kind and low <= len(raw) <= high:
            return raw
        raise _malformed(where, f"not {kind.__name__} of length {low} to {high}")

    return unpacker


def _tuple_unpacker(where: str, item_hint: Any, bounds: Bounds) -> _Unpack:
    low, high = bounds.low, bounds.high
    item = _field_unpacker(item_hint, where)

    def unpacker(raw: Raw) -> tuple[Any, ...]:
        if (type(raw) is list or type(raw) is tuple) and low <= len(raw) <= high:
            return tuple([item(one) for one in raw])
        raise _malformed(where, f"not a list of length {low} to {high}")

    return unpacker
