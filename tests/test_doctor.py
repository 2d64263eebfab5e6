"""Recognising a machine from sample texts, and a diagnosis that survives whatever is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune import doctor, files, host
from edgeprune.cores import available_cores, group_limits, quota_cores
from edgeprune.devices import Figure, load_profile
from edgeprune.errors import BadInput
from edgeprune.fitting import FitOptions
from edgeprune.recognise import Host, Texts, recognise


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))


def arm(*parts: str, features: str = "fp asimd fphp asimdhp asimddp", tail: str = "") -> str:
    blocks = [
        f"processor\t: {index}\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
        for index, part in enumerate(parts)
    ]
    return "\n".join(blocks) + "\n" + tail


def x86(model: str, cores: int, flags: str = "fpu avx avx2 fma f16c avx_vnni") -> str:
    return "\n\n".join(
        f"processor\t: {index}\nmodel name\t: {model}\nphysical id\t: 0\ncore id\t\t: {index // 2}\nflags\t\t: {flags}"
        for index in range(2 * cores)
    )


A76, A55 = "0xd0b", "0xd05"
SAMPLES = {
    "rpi5": Texts(arm(*[A76] * 4), compatible="raspberrypi,5-model-b\0brcm,bcm2712\0"),
    "rpi5 in a container": Texts(arm(*[A76] * 4, tail="Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n")),
    "rpi5 compute module": Texts(arm(*[A76] * 4, tail="Model : Raspberry Pi Compute Module 5 Rev 1.0")),
    "rpi4": Texts(arm(*["0xd08"] * 4), compatible="raspberrypi,4-model-b\0brcm,bcm2711\0"),
    "rpi4 as 400": Texts(arm(*["0xd08"] * 4, tail="Model\t: Raspberry Pi 400 Rev 1.0")),
    "rpi-zero2w": Texts(arm(*["0xd03"] * 4), compatible="raspberrypi,model-zero-2-w\0brcm,bcm2837\0"),
    "rk3588": Texts(arm(*[A55] * 4, *[A76] * 4), compatible="xunlong,orangepi-5\0rockchip,rk3588s\0"),
    "rk3588 by its cores": Texts(arm(*[A55] * 4, *[A76] * 4)),
    "jetson-nano": Texts(arm(*["0xd07"] * 4), compatible="nvidia,jetson-nano\0nvidia,tegra210\0"),
    "jetson-orin-nano-15w": Texts(arm(*["0xd42"] * 6), compatible="nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005"),
    "jetson-orin-nano-7w": Texts(
        arm(*["0xd42"] * 6), compatible="nvidia,p3767-0005\0nvidia,tegra234", power_mode="pmode:0001 fmode:fanNull"
    ),
    "jetson-orin-nano-25w": Texts(
        arm(*["0xd42"] * 6), compatible="nvidia,p3767-0005-super\0nvidia,p3767-0005\0", power_mode="pmode:0001"
    ),
    "jetson-orin-nano-maxn": Texts(
        arm(*["0xd42"] * 6), compatible="nvidia,p3767-0005-super\0nvidia,tegra234\0", power_mode="pmode:0002"
    ),
    "snapdragon-8gen3": Texts(arm("0xd80", "0xd80", *["0xd81"] * 5, "0xd82")),
    "n100": Texts(x86("Intel(R) N100", 4)),
    "n150": Texts(x86("Intel(R) N150", 4)),
    "core-ultra-155h": Texts(x86("Intel(R) Core(TM) Ultra 7 155H", 16)),
    "ryzen-7840u": Texts(x86("AMD Ryzen 7 7840U w/ Radeon  780M Graphics", 8)),
    "ryzen-7840hs": Texts(x86("AMD Ryzen 7 7840HS w/ Radeon 780M Graphics", 8)),
    "apple-m2": Texts(brand="Apple M2", features="hw.optional.arm.FEAT_DotProd: 1", performance_cores=4),
}


@pytest.mark.parametrize("label, texts", SAMPLES.items(), ids=SAMPLES.keys())
def test_known_machines(label: str, texts: Texts) -> None:
    name = label.split()[0]
    found = recognise(texts, logical_cores=8)
    assert found.profile == name
    assert load_profile(name)


@pytest.mark.parametrize(
    "texts",
    [
        Texts(x86("AMD EPYC 9274F 24-Core Processor", 24)),
        Texts(brand="Apple M2 Pro"),
        Texts(x86("Intel(R) N1000", 4)),
        Texts(arm(*["0xd41"] * 4, *[A55] * 4)),
        Texts(arm(*[A76] * 3)),
        Texts(),
    ],
)
def test_near_misses_are_no_known_device(texts: Texts) -> None:
    assert recognise(texts, logical_cores=4).profile is None


def test_cores_and_extensions() -> None:
    board = recognise(SAMPLES["rk3588"])
    assert (board.cores, board.big_cores) == (8, 4)
    assert set(board.isa) == {"neon", "dotprod", "fp16"}
    pc = recognise(SAMPLES["n100"], logical_cores=8)
    assert (pc.cores, pc.big_cores) == (4, 4)  # two threads a core
    assert "avx_vnni" in pc.isa
    mac = recognise(
        Texts(
            brand="Apple M1",
            features="hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0",
            performance_cores=4,
        ),
        logical_cores=8,
    )
    assert (mac.cores, mac.big_cores) == (8, 4)
    assert set(mac.isa) == {"neon", "dotprod"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=400), st.text(max_size=80), st.text(max_size=80), st.integers(0, 10**6))
def test_any_text_is_recognised_as_something(cpuinfo: str, compatible: str, brand: str, cores: int) -> None:
    found = recognise(Texts(cpuinfo, compatible, brand, features=cpuinfo, power_mode=brand), logical_cores=cores)
    assert found.model
    assert 1 <= found.big_cores <= found.cores


def test_a_control_groups_share_of_processors() -> None:
    assert quota_cores("150000 100000\n") == 1
    assert quota_cores("300000 100000\n") == 3
    assert quota_cores("50000 100000") == 1
    for text in ("max 100000", "", "0 0", "x y z"):
        assert quota_cores(text) is None


def test_limits_of_every_control_group_above_are_found(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("1:name=systemd:/\n0::/user.slice/run.scope\n")
    (root / "user.slice" / "run.scope").mkdir(parents=True)
    (root / "user.slice" / "memory.max").write_text("2048\n")
    (root / "user.slice" / "run.scope" / "memory.max").write_text("max\n")
    assert group_limits("memory.max", own=own, root=root) == ["max\n", "2048\n"]
    assert group_limits("memory.max", own=tmp_path / "none", root=root) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call here")
def test_as_many_threads_as_cores_are_allowed() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert (available_cores(), FitOptions().threads) == (1, 1)
    finally:
        os.sched_setaffinity(0, allowed)


def test_read_bandwidth_measures_something() -> None:
    low, middle, best = host.read_bandwidth(2, seconds=0.05, buffer_bytes=8 << 20)
    assert 0 < low <= middle <= best
    with pytest.raises(BadInput):
        host.read_bandwidth(0)


def test_an_unknown_host_gets_a_wide_derived_bandwidth() -> None:
    read = Figure(value=40.0, low=38.0, high=41.0, kind="measured", source="test")
    wide = host.decode_from_read(read, 16)
    assert wide.kind == "derived"
    assert wide.value == pytest.approx(30.0)  # bound by memory
    assert host.decode_from_read(read, 1).value == pytest.approx(9.0)  # bound by one core
    profile = host.generic_profile(
        Host(None, "some processor", 16, 16, ("avx2",)), cores=4, memory_bytes=8 << 30, read_gbs=read
    )
    assert profile.name == "host"
    assert profile.threads == 4
    assert profile.usable_memory_mib == pytest.approx(0.75 * 8192)


def test_host_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(host, "gather", Texts)  # no known device, whatever this machine is
    rates = iter([(10.0, 11.0, 30.0), (19.0, 19.5, 20.0), (15.0, 15.0, 15.0)])
    monkeypatch.setattr(host, "read_bandwidth", lambda threads, **_: next(rates))

    def measured() -> float:
        (kept,) = cache.iterdir()
        return float(files.read_json(kept)["read_gbs"]["value"])

    busy = load_profile("host")
    assert busy.name == "host"
    assert load_profile("host") == busy
    assert measured() == 30
    (kept,) = cache.iterdir()
    os.utime(kept, (0, 0))  # a spread of three says the machine was busy: not kept for long
    steady = load_profile("host")
    assert measured() == 20
    os.utime(kept, (0, 0))
    assert load_profile("host") == steady
    kept.write_text("{broken", encoding="utf-8")
    load_profile("host")
    assert measured() == 15


def test_a_known_host_takes_the_profile_with_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "gather", lambda: SAMPLES["rpi5"])
    monkeypatch.setattr(host, "available_memory", lambda: 4 << 30)
    profile = load_profile("host")
    assert (profile.name, profile.base) == ("host", "rpi5")
    assert profile.memory.total_gib.value == 4
    assert profile.memory.total_gib.kind == "measured"
    assert profile.decode == load_profile("rpi5").decode


def test_diagnosis_covers_everything() -> None:
    names = {check.name for check in doctor.diagnose()}
    assert {"python", "runtime llamacpp", "runtime onnxruntime", "runtime pytorch", "this machine", "memory"} <= names
    assert {"cache folder", "config folder", "free disk"} <= names


def test_diagnosis_without_any_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(metadata, "requires", absent)
    checks = {check.name: check for check in doctor.diagnose()}
    for name in ("runtime llamacpp", "runtime onnxruntime", "runtime pytorch"):
        assert checks[name].ok is None
        assert "pip install" in (checks[name].remedy or "")


def test_a_runtime_that_does_not_load_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: "1.0")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    checks = {check.name: check for check in doctor.check_runtimes()}
    assert checks["runtime llamacpp"].ok is False
    assert "does not load" in checks["runtime llamacpp"].detail


def test_a_llama_cpp_that_was_compiled_for_amx_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> str:
        return next(check.detail for check in doctor.check_runtimes() if check.name == "runtime llamacpp")

    for flag, there in (("AMX_INT8 = 1", True), ("AMX_INT8 = 0", False)):
        info = f"CPU : AVX2 = 1 | {flag} | ".encode()
        monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda info=info: info)
        assert ("-mno-amx-int8" in told()) is there


def test_version_caps() -> None:
    def among(versions: dict[str, str]) -> Callable[[str], str | None]:
        return lambda package: versions.get(package)

    bad = doctor.check_caps(among({"transformers": "5.0.1", "onnx": "1.20.0"}))
    assert [check.ok for check in bad] == [False, False]
    assert bad[0].remedy == 'pip install "transformers>=4.57,<4.58"'
    assert [check.ok for check in doctor.check_caps(among({"transformers": "4.57.6", "onnx": "1.21.0"}))] == [
        True,
        True,
    ]
    assert doctor.check_caps(among({})) == []
    assert doctor.version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert doctor.version_tuple("odd") == ()


def test_extras_are_read_from_the_metadata() -> None:
    lines = [
        "numpy>=1.26",
        'torch>=2.4; extra == "prune"',
        "edgeprune[prune,llama]; extra == 'all'",
        "jinja2>=3.1; extra == 'prune'",
    ]
    assert doctor.extras_of(lines) == {"": ["numpy"], "prune": ["torch", "jinja2"]}


def test_python_versions() -> None:
    assert doctor.check_python((3, 12, 1)).ok
    assert not doctor.check_python((3, 10, 9)).ok
    assert not doctor.check_python((3, 14, 0)).ok


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert doctor.check_folder("cache", tmp_path / "new" / "deep", "r").ok
    assert not (tmp_path / "new").exists()
    found = doctor.check_folder("cache", file / "below", "choose another")
    assert found.ok is False
    assert found.remedy == "choose another"
