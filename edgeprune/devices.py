"""Devices as data: what a device can do, with the source of every number, and the budget it is asked to meet.

A profile is one TOML file. Built-in ones live in `edgeprune.profiles`; a file of the same name in
`<config folder>/profiles` takes precedence. Every number in a profile is a `Figure`: value, interval, kind, source.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune import files
from edgeprune.errors import BadInput, unknown

MAX_PROFILE_BYTES = 64 * 1024  # the largest built-in profile is under 8 KiB
MIB_PER_GIB = 1024

T = TypeVar("T")
Kind = Literal["measured", "published", "vendor", "derived", "assumed"]
Backend = Literal["cpu", "cuda", "metal", "vulkan", "igpu"]
RuntimeName = Literal["llamacpp", "onnxruntime", "pytorch"]

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=_NAME)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
# TOML has arrays, not tuples: only the container is lenient, what it holds is still checked strictly.
Names = Annotated[tuple[Name, ...], Field(strict=False, max_length=32)]
Positive = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Figure(_Model):
    """One number with its interval, where it comes from, and how it was come by.

    `low` and `high` default to `value`: a figure without spread, such as a core count.
    """

    value: NotNegative
    low: NotNegative
    high: NotNegative
    kind: Kind
    source: Text

    @model_validator(mode="before")
    @classmethod
    def _default_interval(cls, data: Any) -> Any:
        if isinstance(data, dict) and "value" in data:
            return {"low": data["value"], "high": data["value"], **data}
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"needs low <= value <= high, found {self.low}, {self.value}, {self.high}")
        return self

    def scaled(self, factor: float, *, kind: Kind, source: str) -> Figure:
        """The figure times `factor`, with a new kind and source."""
        return Figure(
            value=self.value * factor, low=self.low * factor, high=self.high * factor, kind=kind, source=source
        )


class PositiveFigure(Figure):
    """A figure that divides: none of its three numbers may be zero."""

    value: Positive
    low: Positive
    high: Positive


class Memory(_Model):
    """Memory that the model has to fit into: the GPU's own where `dedicated`, else the machine's."""

    total_gib: PositiveFigure
    usable_share: PositiveFigure  # part of it that one process can hold without swapping
    nominal_gbs: PositiveFigure | None = None  # 10^9 bytes/s
    dedicated: bool = False

    @property
    def usable_mib(self) -> float:
        """What of it one process can hold without swapping, MiB."""
        return self.total_gib.value * self.usable_share.value * MIB_PER_GIB

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.usable_share.high > 1:
            raise ValueError("usable_share is a part of the whole: at most 1")
        return self


class Cpu(_Model):
    """The processor. `isa` lists the extensions that the runtimes' kernels ask for."""

    model: Text
    cores: PositiveFigure
    big_cores: PositiveFigure
    isa: Names = ()

    @model_validator(mode="after")
    def _fewer_big(self) -> Self:
        if self.big_cores.value > self.cores.value:
            raise ValueError("big_cores exceeds cores")
        return self


class Decode(_Model):
    """Speed of generating one token on one backend: bytes read / `gbs` + `fixed_ms` + layers x `layer_ms`.

    `gbs` is that of four-bit types; `kernel` says what share of it other quantisations reach, whose kernels are bound
    by arithmetic or waste less of the memory's time. `types` says it of tensor types, which is nearer to the truth: a
    mixture's types depend on the model's widths. It counts where it has all types that a model is made of.
    """

    gbs: PositiveFigure  # effective 10^9 bytes/s of weights
    one_thread_gbs: PositiveFigure | None = None
    fixed_ms: Figure | None = None  # a token
    layer_ms: Figure | None = None  # a token and layer
    kernel: dict[Annotated[str, Field(min_length=1, max_length=32)], PositiveFigure] = {}
    types: dict[Annotated[str, Field(min_length=1, max_length=32)], PositiveFigure] = {}


class Load(_Model):
    """Opening a file that the page cache holds: bytes / `gbs` + `fixed_ms` + tokens of its vocabulary x `token_us`.

    From a card or disk it takes longer.
    """

    gbs: PositiveFigure  # 10^9 bytes/s, repacking among it
    fixed_ms: Figure
    token_us: Figure


class RuntimeScale(_Model):
    """A runtime's effective decode bandwidth relative to llama.cpp's on the same backend."""

    decode: PositiveFigure
    backend: Backend = "cpu"


class Start(_Model):
    """Where to start: the runtime, backend, quantisation and threads known to do well."""

    runtime: RuntimeName
    backend: Backend
    quantisation: Text
    threads: PositiveFigure


class BudgetDefaults(_Model):
    """The budget of a device when none is given; memory is always the usable memory."""

    min_tokens_per_s: PositiveFigure


_BUDGET_OPTIONS = {
    "min_tokens_per_s": "--min-tps",
    "max_memory_mib": "--max-memory",
    "max_file_mib": "--max-file",
    "context": "--context",
}


class Budget(_Model):
    """What a model must meet on the device. None leaves that side open. Memory and file in MiB."""

    min_tokens_per_s: Positive | None = None
    max_memory_mib: Positive | None = None
    max_file_mib: Positive | None = None
    context: Annotated[int, Field(ge=16, le=1 << 22)] = 2048

    @classmethod
    def of(
        cls,
        profile: DeviceProfile | None = None,
        *,
        min_tokens_per_s: float | None = None,
        max_memory_mib: float | None = None,
        max_file_mib: float | None = None,
        context: int | None = None,
    ) -> Budget:
        """The profile's default budget, each given value taking its place. Without a profile, only what is given.

        Raises:
            BadInput: a value out of range; the message names the option.
        """
        values: dict[str, float | int] = {}
        if profile is not None:
            values["max_memory_mib"] = profile.usable_memory_mib
            if profile.budget is not None:
                values["min_tokens_per_s"] = profile.budget.min_tokens_per_s.value
        given = {
            "min_tokens_per_s": min_tokens_per_s,
            "max_memory_mib": max_memory_mib,
            "max_file_mib": max_file_mib,
            "context": context,
        }
        values |= {key: value for key, value in given.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise BadInput(first["msg"].lower(), where=_BUDGET_OPTIONS[str(first["loc"][0])]) from error


class Variant(_Model):
    """The same device with another amount of memory, in GiB."""

    memory_gib: Positive


class DeviceProfile(_Model):
    """One device. `base` is the profile that a recognised host was built from.

    Where `memory` is a GPU's own, `beside` is the machine's: layers that the GPU has no room for are computed there by
    the processor, at the speed of `decode["cpu"]`. Without it a model has to fit into the GPU.
    """

    name: Name
    description: Text
    aliases: Names = ()
    variants: dict[Name, Variant] = {}
    notes: Annotated[str, Field(max_length=4000)] = ""
    memory: Memory
    beside: Memory | None = None
    cpu: Cpu
    gpu: Annotated[str, Field(max_length=200)] | None = None
    decode: Annotated[dict[Backend, Decode], Field(min_length=1)]
    # Prompt processing by backend and quantisation, in 10^9 parameters x tokens/s: it depends on the kernel, not on
    # bytes, so only published quantisations appear.
    prefill: dict[Backend, dict[Annotated[str, Field(min_length=1, max_length=32)], PositiveFigure]] = {}
    load: Load | None = None
    runtime: dict[RuntimeName, RuntimeScale] = {}
    start: Start
    budget: BudgetDefaults | None = None
    base: Name | None = None
    reachable: bool = False  # a board of this kind is there to be measured

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.start.backend not in self.decode:
            raise ValueError(f"start.backend {self.start.backend!r} has no [decode.{self.start.backend}]")
        for name, scale in self.runtime.items():
            if scale.backend not in self.decode:
                raise ValueError(f"runtime.{name}.backend {scale.backend!r} has no [decode.{scale.backend}]")
        if self.beside and (not self.memory.dedicated or self.beside.dedicated or "cpu" not in self.decode):
            raise ValueError("[beside] needs a [memory] that is dedicated, none that is itself, and a [decode.cpu]")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The name, the aliases and the variants: everything `load_profile` knows it by."""
        return (self.name, *self.aliases, *self.variants)

    @property
    def usable_memory_mib(self) -> float:
        """Memory in MiB that one process can hold without swapping."""
        return self.memory.usable_mib

    @property
    def at_hand(self) -> bool:
        """Whether the device is this machine or a board in reach, so that speed and memory can be measured."""
        return self.name == "host" or self.reachable

    @property
    def threads(self) -> int:
        """The number of threads known to decode best."""
        return int(self.start.threads.value)

    def scale_for(self, runtime: str) -> RuntimeScale | None:
        """What the profile says of `runtime` relative to llama.cpp; None where it says nothing."""
        return next((scale for name, scale in self.runtime.items() if name == runtime), None)

    def backend_for(self, runtime: str) -> Backend | None:
        """The backend that `runtime` decodes on here; None where the profile has no figure for it."""
        if scale := self.scale_for(runtime):
            return scale.backend
        return self.start.backend if runtime == "llamacpp" else None

    def renamed(self, name: str) -> DeviceProfile:
        """The profile as one of its own: another name, without aliases and variants.

        Raises:
            BadInput: no name that a profile can have.
        """
        if not re.match(_NAME, name) or name == "host":
            raise BadInput(f"{name!r} is no name for a profile", remedy="use a-z, 0-9, '.', '_' and '-'")
        return self.model_copy(update={"name": name, "aliases": (), "variants": {}})

    def called(self, name: str) -> DeviceProfile:
        """The profile under one of its `names`; a variant gets that variant's memory."""
        variant = self.variants.get(name)
        if variant is None:
            return self
        total = self.memory.total_gib.model_copy(
            update=dict.fromkeys(("value", "low", "high"), variant.memory_gib) | {"source": "the variant's name"}
        )
        return self.model_copy(update={"name": name, "memory": self.memory.model_copy(update={"total_gib": total})})


def flatten(error: ValidationError) -> str:
    """A pydantic error as one line: the first three fields at fault, and how many more."""
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        field = ".".join(str(part) for part in item["loc"] if part != "[key]")
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{field[:120]}: {message[:200]}" if field else message[:200])
    more = error.error_count() - len(problems)
    return "; ".join(problems).replace("\n", " ") + (f" (and {more} more)" if more > 0 else "")


def read_toml(path: Path, validate: Callable[[Any], T]) -> T:
    """What `validate`, a pydantic model's or adapter's, makes of a TOML file.

    Raises:
        BadInput: no such file, no TOML, or a field that is missing, unknown or out of range.
    """
    try:
        return validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=path) from error
    except ValidationError as error:
        raise BadInput(flatten(error), where=path) from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise BadInput(f"not readable TOML ({error})", where=path) from error


def parse_profile(text: str, *, where: object) -> DeviceProfile:
    """Validate the text of a profile; `where` names it in errors.

    Raises:
        BadInput: no TOML, or a field that is missing, unknown or out of range; the message names the field.
    """
    remedy = "compare with a built-in profile: edgeprune devices show rpi5"
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # tomllib reports bad integers and dates as plain ValueError, of which its own error is one.
        raise BadInput(f"not readable TOML ({str(error)[:200]})", where=where, remedy=remedy) from error
    try:
        return DeviceProfile.model_validate(data)
    except (ValidationError, RecursionError) as error:
        reason = flatten(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise BadInput(reason, where=where, remedy=remedy) from error


def read_profile(path: Path) -> DeviceProfile:
    """Read and validate one profile file of at most `MAX_PROFILE_BYTES`.

    Raises:
        BadInput: no such regular file, too large, not UTF-8, or as `parse_profile`.
    """
    try:
        if not path.is_file():
            raise BadInput("no such profile file", where=path)
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
        if len(raw) > MAX_PROFILE_BYTES:
            raise BadInput(f"larger than {MAX_PROFILE_BYTES // 1024} KiB: not a device profile", where=path)
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8 text", where=path, remedy="save the profile as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInput(f"cannot be read ({error})", where=repr(str(path))) from error
    return parse_profile(text, where=path)


@cache
def _built_in() -> tuple[DeviceProfile, ...]:
    entries = sorted(resources.files("edgeprune.profiles").iterdir(), key=lambda entry: entry.name)
    return tuple(
        parse_profile(entry.read_text(encoding="utf-8"), where=entry.name)
        for entry in entries
        if entry.name.endswith(".toml")
    )


def _user_files() -> dict[str, Path]:
    folder = files.config_dir() / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder.is_dir() else {}


def list_profiles(broken: Callable[[BadInput], None] | None = None) -> list[DeviceProfile]:
    """All profiles by name: the built-in ones, and the user's, which take precedence.

    Args:
        broken: is told of each file in the user's profile folder that is broken; None: the first is raised.

    Raises:
        BadInput: as said.
    """
    profiles = {profile.name: profile for profile in _built_in()}
    for path in _user_files().values():
        try:
            profile = read_profile(path)
        except BadInput as error:
            if broken is None:
                raise
            broken(error)
            continue
        profiles[profile.name] = profile
    return sorted(profiles.values(), key=lambda profile: profile.name)


def load_profile(name_or_path: str) -> DeviceProfile:
    """A profile by name, alias or variant ("rpi5-8gb"), by the path of a .toml file, or "host" for this machine.

    Raises:
        BadInput: an unknown name (the message names the nearest), or a broken file.
    """
    if name_or_path == "host":
        from edgeprune import host  # host builds on this module

        return host.host_profile()
    if name_or_path.endswith(".toml"):
        return read_profile(Path(name_or_path).expanduser())
    name = name_or_path.lower()
    user = _user_files()
    if re.match(_NAME, name) and name in user:  # found by its file name: other broken files do not matter
        return read_profile(user[name])
    known: dict[str, DeviceProfile] = {}
    broken: list[BadInput] = []
    for profile in list_profiles(broken.append):
        known |= dict.fromkeys(profile.names, profile)
    if name not in known and broken:
        raise broken[0]  # it may be the one
    if name not in known:
        raise unknown("device", name_or_path, [*known, "host"])
    return known[name].called(name)
