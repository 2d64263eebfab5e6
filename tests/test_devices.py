"""Profiles and budgets: what ships is valid and sourced, and what is wrong ends in one clear line."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeprune.devices import (
    MAX_PROFILE_BYTES,
    Budget,
    DeviceProfile,
    Figure,
    list_profiles,
    load_profile,
    parse_profile,
    read_profile,
)
from edgeprune.errors import BadInput

EXPECTED = [
    "rpi5",
    "rpi5-4gb",
    "rpi5-8gb",
    "rpi5-16gb",
    "rpi4",
    "rpi-zero2w",
    "rk3588",
    "orangepi5",
    "rock5b",
    "jetson-nano",
    "jetson-orin-nano-7w",
    "jetson-orin-nano-15w",
    "jetson-orin-nano-25w",
    "jetson-orin-nano-maxn",
    "n100",
    "n150",
    "core-ultra-155h",
    "ryzen-7840u",
    "ryzen-7840hs",
    "apple-m1",
    "apple-m2",
    "apple-m3",
    "apple-m4",
    "rtx4050-laptop",
    "rtx4060-laptop",
    "snapdragon-8gen3",
    "dimensity7300",
]

GOOD = """
name = "board"
description = "a board"
[memory]
total_gib = { value = 1, kind = "vendor", source = "sheet" }
usable_share = { value = 0.5, kind = "assumed", source = "guess" }
[cpu]
model = "a core"
cores = { value = 4, kind = "vendor", source = "sheet" }
big_cores = { value = 4, kind = "vendor", source = "sheet" }
[decode.cpu]
gbs = { value = 5.0, low = 4.0, high = 6.0, kind = "measured", source = "here" }
[start]
runtime = "llamacpp"
backend = "cpu"
quantisation = "Q4_0"
threads = { value = 4, kind = "assumed", source = "guess" }
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "edgeprune" / "profiles"
    folder.mkdir(parents=True)
    return folder


def figures(value: Any, path: str = "") -> list[tuple[str, Figure]]:
    if isinstance(value, Figure):
        return [(path, value)]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in figures(item, f"{path}.{key}")]
    if hasattr(type(value), "model_fields"):
        return [found for key in type(value).model_fields for found in figures(getattr(value, key), f"{path}.{key}")]
    return []


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_shipped_numbers_have_sources_and_intervals(profile: DeviceProfile) -> None:
    found = figures(profile)
    assert len(found) >= 8
    for path, figure in found:
        assert figure.low <= figure.value <= figure.high, path
        assert len(figure.source) > 5, path
        assert not figure.source.startswith("/"), path
        if figure.kind == "assumed" and ("gbs" in path or "runtime" in path):
            assert figure.high > figure.low, f"{path}: an assumption needs an interval"
    for backend, decode in profile.decode.items():
        if profile.memory.nominal_gbs is not None:
            assert decode.gbs.high < profile.memory.nominal_gbs.value, f"{backend} beyond the memory's own speed"
    assert profile.backend_for("llamacpp") == profile.start.backend
    assert profile.budget is not None


def test_every_promised_name_loads() -> None:
    for name in EXPECTED:
        assert load_profile(name).description
    names = [name for profile in list_profiles() for name in profile.names]
    assert len(names) == len(set(names)), "a name must mean one device"


def test_variants_change_memory_only() -> None:
    base, small = load_profile("rpi5"), load_profile("RPI5-4GB")
    assert small.name == "rpi5-4gb"
    assert small.memory.total_gib.value == 4
    assert small.usable_memory_mib == pytest.approx(base.usable_memory_mib / 2)
    assert small.decode == base.decode
    assert load_profile("orangepi5").name == "rk3588"


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"unknown device 'rpi6'.*did you mean 'rpi[45]'.*host"):
        load_profile("rpi6")
    with pytest.raises(BadInput, match="unknown device"):
        load_profile("../../etc/passwd")


def test_a_round_trip_through_json_keeps_the_profile() -> None:
    profile = load_profile("rpi5")
    assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile


def test_user_profiles_take_precedence(config: Path) -> None:
    (config / "mine.toml").write_text(GOOD.replace('"board"', '"rpi5"'), encoding="utf-8")
    assert load_profile("rpi5").description == "a board"
    assert [profile.description for profile in list_profiles() if profile.name == "rpi5"] == ["a board"]
    (config / "lab.toml").write_text(GOOD, encoding="utf-8")
    assert load_profile("lab").name == "board"
    assert load_profile("board").name == "board"


def test_a_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD, encoding="utf-8")
    profile = load_profile(str(path))
    assert profile.usable_memory_mib == 512
    assert profile.memory.total_gib.low == profile.memory.total_gib.value  # the interval defaults to the value
    assert profile.backend_for("onnxruntime") is None


BROKEN = {
    "no TOML": ("name = ", "not readable TOML"),
    "empty": ("", "name: Field required"),
    "unknown field": (GOOD.replace("[memory]", "[memory]\nspeed = 3"), "memory.speed: Extra inputs"),
    "number as text": (GOOD.replace("value = 5.0", 'value = "5.0"'), "decode.cpu.gbs.value"),
    "boolean as number": (GOOD.replace("value = 5.0", "value = true"), "decode.cpu.gbs.value"),
    "no source": (GOOD.replace(', source = "here"', ""), "decode.cpu.gbs.source: Field required"),
    "unknown kind": (GOOD.replace('"measured"', '"believed"'), "decode.cpu.gbs.kind"),
    "not a number": (GOOD.replace("value = 5.0", "value = nan"), "decode.cpu.gbs.value"),
    "infinite": (GOOD.replace("high = 6.0", "high = inf"), "decode.cpu.gbs.high"),
    "negative": (GOOD.replace("low = 4.0", "low = -4.0"), "decode.cpu.gbs.low"),
    "zero": (GOOD.replace("value = 5.0, low = 4.0", "value = 0, low = 0"), "decode.cpu.gbs.value"),
    "disordered": (GOOD.replace("low = 4.0", "low = 5.5"), "low <= value <= high"),
    "huge integer": (GOOD.replace("value = 5.0", "value = 1" + "0" * 400), "decode.cpu.gbs.value"),
    "huge literal": (GOOD.replace("value = 5.0", "value = 1" + "0" * 9000), "not readable TOML"),
    "more than all memory": (GOOD.replace("value = 0.5", "value = 1.5"), "usable_share"),
    "bad backend": (GOOD.replace('backend = "cpu"', 'backend = "cuda"'), "no [decode.cuda]"),
    "unknown backend": (GOOD.replace("[decode.cpu]", "[decode.tpu]"), "decode.tpu"),
    "bad name": (GOOD.replace('name = "board"', 'name = "../board"'), "name: "),
    "list for table": (GOOD.replace("[memory]", "[[memory]]"), "memory: "),
    "deep nesting": ("a = " + "[" * 20000, "not readable TOML"),
    "deep table": (GOOD + "\n[a" + ".a" * 5000 + "]\n", "a"),
    "more big cores than cores": (GOOD.replace("big_cores = { value = 4", "big_cores = { value = 8"), "big_cores"),
}


@pytest.mark.parametrize("text, says", BROKEN.values(), ids=BROKEN.keys())
def test_broken_profiles_end_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_profile(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert says in line
    assert "\n" not in line
    assert len(line) < 1000
    assert caught.value.exit_code == 2


def test_a_broken_file_of_the_user_stands_in_no_other_devices_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "edgeprune" / "profiles"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text("schema_version = ")
    assert load_profile("rpi5").name == "rpi5"
    for name in ("mine", "nowhere"):  # which the broken file may have meant to be
        with pytest.raises(BadInput, match=r"mine\.toml"):
            load_profile(name)
    told: list[BadInput] = []
    assert "rpi5" in [profile.name for profile in list_profiles(told.append)]
    assert len(told) == 1 and "mine.toml" in str(told[0])


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_PROFILE_BYTES + 1))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for path, says in (
        (large, "larger than"),
        (binary, "UTF-8"),
        (folder, "no such"),
        (tmp_path / "no.toml", "no such"),
    ):
        with pytest.raises(BadInput, match=says):
            load_profile(str(path))
    with pytest.raises(BadInput):
        load_profile("a\0b.toml")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.toml")
        with pytest.raises(BadInput, match="no such"):  # and it must not wait for a writer
            read_profile(tmp_path / "pipe.toml")


@given(st.text(max_size=200))
def test_any_text_is_a_profile_or_bad_input(text: str) -> None:
    with pytest.raises(BadInput):
        parse_profile(text, where="fuzz")


@given(st.text(max_size=40), st.sampled_from(["5.0", "measured", "here", "cpu", "board", "llamacpp", "[memory]"]))
def test_damaged_profiles_are_valid_or_bad_input(noise: str, target: str) -> None:
    try:
        profile = parse_profile(GOOD.replace(target, noise), where="fuzz")
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert all(math.isfinite(figure.value) for _, figure in figures(profile))


def test_budgets_come_from_the_profile_and_can_be_overridden() -> None:
    profile = load_profile("rpi5")
    default = Budget.of(profile)
    assert default.max_memory_mib == pytest.approx(profile.usable_memory_mib)
    assert profile.budget is not None
    assert default.min_tokens_per_s == profile.budget.min_tokens_per_s.value
    assert profile.budget.min_tokens_per_s.kind == "assumed"
    asked = Budget.of(profile, min_tokens_per_s=150, max_memory_mib=256, context=512)
    assert (asked.min_tokens_per_s, asked.max_memory_mib, asked.context) == (150, 256, 512)
    assert Budget.of() == Budget()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("--min-tps", "min_tokens_per_s", -1),
        ("--max-memory", "max_memory_mib", 0),
        ("--max-file", "max_file_mib", math.nan),
        ("--context", "context", 0),
    ],
)
def test_impossible_budgets_name_the_option(name: str, field: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{name}: input should be"):
        Budget.of(**{field: value})  # type: ignore[arg-type]


def test_budgets_and_profiles_are_frozen() -> None:
    with pytest.raises(ValidationError):
        setattr(Budget(), "context", 1)  # noqa: B010 - a type checker refuses the plain assignment, as it should
    with pytest.raises(ValidationError):
        setattr(load_profile("rpi5"), "name", "other")  # noqa: B010
