"""Which machine some texts describe: device tree, /proc/cpuinfo, or the processor's name on macOS and Windows.

Pure functions and tables; a new board is one line in `_BOARDS` or `_PROCESSORS`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# In order of preference: `compatible` strings of the device tree.
_BOARDS = (
    ("brcm,bcm2712", "rpi5"),
    ("brcm,bcm2711", "rpi4"),
    ("raspberrypi,model-zero-2-w", "rpi-zero2w"),
    ("raspberrypi,model-zero-2", "rpi-zero2w"),
    ("rockchip,rk3588", "rk3588"),
    ("rockchip,rk3588s", "rk3588"),
    ("nvidia,jetson-nano", "jetson-nano"),
    ("nvidia,p3450-0000", "jetson-nano"),
    ("nvidia,p3767-0003", "jetson-orin-nano"),  # the module of 8 GB
    ("nvidia,p3767-0005", "jetson-orin-nano"),  # the module of 8 GB of the developer kit
    ("qcom,sm8650", "snapdragon-8gen3"),
    ("mediatek,mt6878", "dimensity7300"),
)
# x86 model names and Apple brand strings, matched whole so that an "M2 Pro" is no M2.
_PROCESSORS = (
    (r"Intel\(R\) (Processor )?N100", "n100"),
    (r"Intel\(R\) (Processor )?N150", "n150"),
    (r"Intel\(R\) Core\(TM\) Ultra 7 155H", "core-ultra-155h"),
    (r"AMD Ryzen 7 7840U.*", "ryzen-7840u"),
    (r"AMD Ryzen 7 7840HS.*", "ryzen-7840hs"),
    (r"Apple M([1-4])", r"apple-m\1"),
)
_ARM_PARTS = {
    "0xd03": ("Cortex-A53", False),
    "0xd04": ("Cortex-A35", False),
    "0xd05": ("Cortex-A55", False),
    "0xd46": ("Cortex-A510", False),
    "0xd80": ("Cortex-A520", False),
    "0xd07": ("Cortex-A57", True),
    "0xd08": ("Cortex-A72", True),
    "0xd09": ("Cortex-A73", True),
    "0xd0a": ("Cortex-A75", True),
    "0xd0b": ("Cortex-A76", True),
    "0xd0d": ("Cortex-A77", True),
    "0xd41": ("Cortex-A78", True),
    "0xd42": ("Cortex-A78AE", True),
    "0xd44": ("Cortex-X1", True),
    "0xd47": ("Cortex-A710", True),
    "0xd48": ("Cortex-X2", True),
    "0xd4d": ("Cortex-A715", True),
    "0xd4e": ("Cortex-X3", True),
    "0xd81": ("Cortex-A720", True),
    "0xd82": ("Cortex-X4", True),
}
# Names in /proc/cpuinfo or sysctl -> names in profiles, for the extensions that change which kernels run.
_ISA = {
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "fphp": "fp16",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "feat_dotprod": "dotprod",
    "feat_fp16": "fp16",
    "feat_i8mm": "i8mm",
    "feat_bf16": "bf16",
}
# Power modes of the Jetson Orin Nano 8 GB by the number in nvpmodel's status: the Super module (JetPack 6.2) and the
# older one.
_ORIN_MODES = {True: {0: "15w", 1: "25w", 2: "maxn", 3: "7w"}, False: {0: "15w", 1: "7w"}}


@dataclass(frozen=True)
class Host:
    """What the texts of a machine say. `profile` is the known device it is, or None."""

    profile: str | None
    model: str
    cores: int
    big_cores: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """The raw texts a machine is recognised by; empty where the machine has none."""

    cpuinfo: str = ""  # /proc/cpuinfo
    compatible: str = ""  # /proc/device-tree/compatible, entries separated by NUL
    brand: str = ""  # sysctl machdep.cpu.brand_string, or the platform's name of the processor
    features: str = ""  # sysctl hw.optional.arm: "hw.optional.arm.FEAT_DotProd: 1" lines
    performance_cores: int = 0  # sysctl hw.perflevel0.physicalcpu
    power_mode: str = ""  # /var/lib/nvpmodel/status


def _fields(cpuinfo: str) -> list[dict[str, str]]:
    blocks = []
    for block in re.split(r"\n\s*\n", cpuinfo):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        blocks.append({key.strip().lower(): value.strip() for key, value in pairs})
    return [block for block in blocks if block]


def _x86_physical_cores(blocks: list[dict[str, str]]) -> int:
    return len({(block.get("physical id", "0"), block["core id"]) for block in blocks if "core id" in block})


def _orin_mode(compatible: set[str], power_mode: str) -> str:
    super_module = any(entry.endswith("-super") for entry in compatible)
    found = re.search(r"pmode:(\d{1,4})", power_mode)
    # An unknown mode counts as 15 W, the lower of the two that boards ship in.
    return _ORIN_MODES[super_module].get(int(found[1]), "15w") if found else ("25w" if super_module else "15w")


def _known_device(texts: Texts, model: str, parts: Counter[str]) -> str | None:
    compatible = {entry.lower() for entry in texts.compatible.split("\0") if entry}
    for entry, profile in _BOARDS:
        if entry in compatible or f"{entry}-super" in compatible:
            if profile == "jetson-orin-nano":
                return f"{profile}-{_orin_mode(compatible, texts.power_mode)}"
            return profile
    for pattern, profile in _PROCESSORS:
        if found := re.fullmatch(pattern, model, re.IGNORECASE):
            return found.expand(profile)
    # Without a device tree (a container, a phone): the Pi names its board in cpuinfo, others show their mix of cores.
    # 4 x A78 + 4 x A55 is no sign of a Dimensity 7300: several chips have it.
    if found := re.search(r"Raspberry Pi (5|4|400|500|Compute Module [45]|Zero 2)", texts.cpuinfo):
        board = found[1]
        return "rpi-zero2w" if board == "Zero 2" else "rpi5" if "5" in board else "rpi4"
    mixes: dict[frozenset[tuple[str, int]], str] = {
        frozenset({("0xd0b", 4), ("0xd05", 4)}): "rk3588",
        frozenset({("0xd82", 1), ("0xd81", 5), ("0xd80", 2)}): "snapdragon-8gen3",
    }
    return mixes.get(frozenset(parts.items()))


def recognise(texts: Texts, *, logical_cores: int = 1) -> Host:
    """What machine these texts describe. Pure; unknown or broken texts give `profile` None and what can be told.

    Args:
        texts: see `Texts`.
        logical_cores: counted by the system, for where the texts do not list cores.
    """
    blocks = _fields(texts.cpuinfo)
    parts = Counter(block["cpu part"].lower() for block in blocks if "cpu part" in block)
    model = next((block["model name"] for block in blocks if "model name" in block), texts.brand).strip()
    cores = big = max(1, logical_cores)
    if parts:
        cores = sum(parts.values())
        big = sum(n for part, n in parts.items() if _ARM_PARTS.get(part, ("", True))[1]) or cores
        model = " + ".join(f"{n}x {_ARM_PARTS.get(part, (f'ARM part {part}', True))[0]}" for part, n in parts.items())
    elif physical := _x86_physical_cores(blocks):
        cores = big = physical
    if texts.performance_cores:
        big = min(cores, texts.performance_cores)
    words = set()
    for block in blocks[:1]:
        words |= set((block.get("flags", "") + " " + block.get("features", "")).lower().split())
    for line in texts.features.lower().splitlines():
        name, _, on = line.partition(":")
        if on.strip() == "1":
            words.add(name.rsplit(".", 1)[-1].strip())
    if texts.features:
        words.add("neon")  # every ARM Mac
    isa = tuple(dict.fromkeys(_ISA[word] for word in sorted(words) if word in _ISA))
    return Host(_known_device(texts, model, parts), model or "unknown processor", cores, big, isa)
