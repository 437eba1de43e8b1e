"""Write down what each kind of message, and each record in one, consists of: `make_messages.py > FILE`.

A line is a record: the number of its kind (a dash for one within another), its name and its fields in order; a
field with a default ends in an equals sign.
"""

import dataclasses
import typing

from droppexd.wire.codec import MODULES
from droppexd.wire.messages import KINDS


def fields_of(cls):
    """Return the fields of a record as they stand in a line."""
    if dataclasses.is_dataclass(cls):
        missing = dataclasses.MISSING
        return [
            field.name if field.default is field.default_factory is missing else f"{field.name}="
            for field in dataclasses.fields(cls)
        ]
    return [f"{name}=" if name in cls._field_defaults else name for name in cls._fields]


def is_record(hint):
    """Whether a class is a record of its own within a message."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))


def records_in(hint):
    """Yield the records that an annotation names, and those in them."""
    if is_record(hint):
        yield hint
        for inner in typing.get_type_hints(hint, include_extras=True).values():
            yield from records_in(inner)
    for inner in typing.get_args(hint):
        yield from records_in(inner)


def described():
    """Return all lines, in order."""
    assert MODULES  # Imported, they have entered their kinds.
    kinds = [(number, KINDS[number]) for number in sorted(KINDS)]
    inner = {one for _, cls in kinds for one in records_in(cls)} - {cls for _, cls in kinds}
    lines = [[str(number), cls.__name__, *fields_of(cls)] for number, cls in kinds]
    lines += [["-", cls.__name__, *fields_of(cls)] for cls in sorted(inner, key=lambda cls: cls.__name__)]
    return [" ".join(line) for line in lines]


if __name__ == "__main__":
    print("\n".join(described()))
