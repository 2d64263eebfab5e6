"""What a runtime can be told beside threads and context: names, allowed values, and which are worth trying.

A runtime's class has a table `SETTINGS`; `--set NAME=VALUE`, the tuner and the bundle read it, so a new setting is one
entry there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeprune.errors import BadInput, unknown

Value = bool | int | str
Values = dict[str, Value]
ALL_LAYERS = 999  # of llama.cpp's gpu_layers: more than any model has
_WORDS = {"on": True, "true": True, "off": False, "false": False}


@dataclass(frozen=True)
class Setting:
    """One setting of a runtime.

    Attributes:
        values: what is worth trying, the runtime's own choice first.
        about: one line for the reader.
        lossless: whether the model's answers stay the same but for rounding; the tuner tries only these by itself.
        limits: a whole number between these is allowed too.
    """

    values: tuple[Value, ...]
    about: str
    lossless: bool = True
    limits: tuple[int, int] | None = None

    def allows(self, value: Value) -> bool:
        """Whether the runtime takes `value`."""
        if self.limits and isinstance(value, int) and not isinstance(value, bool):
            return self.limits[0] <= value <= self.limits[1]
        return any(value == known and type(value) is type(known) for known in self.values)

    def words(self) -> str:
        """The allowed values, for a message."""
        return f"{self.limits[0]} to {self.limits[1]}" if self.limits else ", ".join(map(show, self.values))


def show(value: Value) -> str:
    """A value as `parse` reads it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def describe(values: Mapping[str, Value]) -> str:
    """All of `values` in one line, "" if there are none."""
    return " ".join(f"{name}={show(value)}" for name, value in values.items())


def check(values: Mapping[str, Value], table: Mapping[str, Setting]) -> Values:
    """`values` with what they leave out filled in from `table`.

    Raises:
        BadInput: a name that is not in the table, or a value that it does not allow.
    """
    for name, value in values.items():
        if name not in table:
            raise unknown("runtime setting", name, table)
        if not table[name].allows(value):
            raise BadInput(f"{name}={show(value)}", remedy=f"{name} takes {table[name].words()}")
    return {name: values.get(name, setting.values[0]) for name, setting in table.items()}


def parse(texts: Iterable[str]) -> Values:
    """{"flash_attn": False, "n_ubatch": 128} of ["flash_attn=off", "n_ubatch=128"].

    Raises:
        BadInput: a text is not of the form NAME=VALUE, or a name comes twice.
    """
    values: Values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise BadInput(f"cannot read the setting {text!r}", remedy="write NAME=VALUE, such as flash_attn=off")
        if name in values:
            raise BadInput(f"the setting {name} is given twice")
        values[name] = _WORDS.get(value.lower(), int(value) if value.isdecimal() and len(value) < 10 else value)
    return values
