"""Where published speeds were measured: a device's memory bandwidth, what computes, and the profile that it has here.

Bandwidths are the makers' own, 10^9 bytes/s; of desktop processors that of two channels of the memory they are sold
for. Processors of kind "scalar", for which llama.cpp has no vector kernels, are bound by arithmetic: their figure is
what such cores get through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GPUS = frozenset({"metal", "igpu", "nvidia", "amd", "gb10", "jetson", "phone-gpu"})  # kinds


@dataclass(frozen=True)
class Place:
    """What computes a row.

    Attributes:
        key: devices of one key are one device.
        kind: devices of one kind reach about the same share of their nominal bandwidth.
        nominal_gbs: nominal bandwidth, 10^9 bytes/s.
        big_cores: threads that decode best; 0 where the processor does not matter.
        profile, backend: the profile that the device is described by here, if there is one.
    """

    key: str
    kind: str
    nominal_gbs: float
    big_cores: int = 0
    profile: str | None = None
    backend: str = "cpu"

    @property
    def sort(self) -> str:
        """What kernels and runtimes differ by: "gpu" or "cpu"."""
        return "gpu" if self.kind in GPUS else "cpu"

    @property
    def layer(self) -> str:
        """The parameter of what a layer costs beside its bytes."""
        return f"{'launch' if self.kind in GPUS else 'layer'}:{self.kind}"


# A pattern of "device_id|backend" in lower case; kind, bandwidth, big cores; profile and its backend. The first counts.
PLACES: tuple[tuple[str, str, float, int, str | None, str], ...] = (
    # boards
    (r"^(rpi5|rpi500|sbc:raspberry-pi-(500|cm5))", "board", 17.1, 4, "rpi5", "cpu"),
    (r"^(rpi4|sbc:raspberry-pi-400)", "board, no dotprod", 12.8, 4, "rpi4", "cpu"),
    (r"^rpi0-2w", "board, no dotprod", 3.6, 4, "rpi-zero2w", "cpu"),
    (r"^rk3588\|", "board", 34.1, 4, "rk3588", "cpu"),
    (r"^(cix-cp8180|sbc:(minisforum|metacomputing|radxa-orion))", "board", 96.0, 8, None, "cpu"),
    (r"^(qcs6490|sbc:radxa-dragon)", "board", 51.2, 4, None, "cpu"),
    (r"(roma|p550)", "scalar", 1.5, 4, None, "cpu"),
    (r"^jetson-nano\|cuda", "jetson", 25.6, 0, "jetson-nano", "cuda"),
    (r"^jetson-nano\|cpu", "board, no dotprod", 25.6, 4, "jetson-nano", "cpu"),
    (r"^jetson-agx", "board", 204.8, 8, None, "cpu"),
    (r"^jetson-orin-nano\|cpu", "board", 68.0, 6, "jetson-orin-nano-15w", "cpu"),
    (r"^jetson-orin-nano-super", "jetson", 102.0, 0, "jetson-orin-nano-25w", "cuda"),
    (r"^jetson-orin-nano", "jetson", 68.0, 0, "jetson-orin-nano-15w", "cuda"),
    # telephones
    (r"^dimensity7300", "phone", 25.6, 4, "dimensity7300", "cpu"),
    (r"^sd8gen3\|cpu", "phone", 76.8, 5, "snapdragon-8gen3", "cpu"),
    (r"^sd8gen3", "phone-gpu", 76.8, 0, None, "gpu"),
    (r"^sd8elite-gen5\|cpu", "phone", 84.8, 6, None, "cpu"),
    (r"^sd8elite-gen5", "phone-gpu", 84.8, 0, None, "gpu"),
    (r"^sd8elite", "phone", 84.8, 6, None, "cpu"),
    (r"^sd8gen2", "phone-gpu", 67.2, 0, None, "gpu"),
    (r"^sd8gen1", "phone", 51.2, 4, None, "cpu"),
    (r"snapdragon-888", "phone", 51.2, 4, None, "cpu"),
    (r"^(exynos2400|tensor-g5)", "phone", 68.2, 4, None, "cpu"),
    (r"^iphone16pro", "phone-gpu", 60.0, 0, None, "gpu"),
    (r"^sc8280", "phone", 68.2, 4, None, "cpu"),
    # Apple's
    (r"^apple-m1-8c\|cpu", "apple-cpu", 68.0, 4, "apple-m1", "cpu"),
    (r"^apple-m1-8c", "metal", 68.0, 0, "apple-m1", "metal"),
    (r"^(apple-m1-max|lmx:m1-max|lmx:max|gpu:m1-max)", "metal", 400.0, 0, None, "metal"),
    (r"^apple-m1-ultra", "metal", 800.0, 0, None, "metal"),
    (r"apple-m1-pro", "metal", 200.0, 0, None, "metal"),
    (r"^gpu:m1-7", "metal", 68.0, 0, "apple-m1", "metal"),
    (r"^apple-m2-pro-cpu", "apple-cpu", 200.0, 8, None, "cpu"),
    (r"^apple-m2-ultra-cpu", "apple-cpu", 800.0, 16, None, "cpu"),
    (r"apple-m2-10c", "metal", 100.0, 0, "apple-m2", "metal"),
    (r"apple-m2-pro", "metal", 200.0, 0, None, "metal"),
    (r"^gpu:m2-ultra", "metal", 800.0, 0, None, "metal"),
    (r"m3-ultra", "metal", 819.0, 0, None, "metal"),
    (r"m3-pro", "metal", 150.0, 0, None, "metal"),
    (r"^gpu:m3-max", "metal", 400.0, 0, None, "metal"),
    (r"^apple-m3\|cpu", "apple-cpu", 100.0, 4, "apple-m3", "cpu"),
    (r"^apple-m-cpu", "apple-cpu", 273.0, 8, None, "cpu"),
    (r"m4-max-(cpu|12p-4e\|)", "apple-cpu", 546.0, 12, None, "cpu"),
    (r"m4-max", "metal", 546.0, 0, None, "metal"),
    (r"m4-pro", "metal", 273.0, 0, None, "metal"),
    (r"m5-max", "metal", 614.0, 0, None, "metal"),
    (r"m5-10c", "metal", 153.0, 0, None, "metal"),
    (r"(apple-m4|mac-mini-m4)", "metal", 120.0, 0, "apple-m4", "metal"),
    (r"macbook-neo", "metal", 60.0, 0, None, "metal"),
    # integrated GPUs, and machines that do not say whether the processor or its GPU computed
    (r"(8745h|x86-7840u|x86-8840u\|vulkan)", "igpu", 89.6, 0, "ryzen-7840u", "igpu"),
    (r"x86-strix-halo\|cpu", "x86", 256.0, 16, None, "cpu"),
    (r"(x86-strix-halo|framework-desktop)", "igpu", 256.0, 0, None, "igpu"),
    (r"ryzen-ai-npu-laptop\|vulkan", "igpu", 120.0, 0, None, "igpu"),
    (r"(840m|860m)", "igpu", 89.6, 0, None, "igpu"),
    (r"x86-258v", "igpu", 136.5, 0, None, "igpu"),
    (r"1165g7\|vulkan", "igpu", 68.3, 0, None, "igpu"),
    (r"arc-a770", "amd", 560.0, 0, None, "gpu"),
    # processors of PCs
    (r"(1270p|1365u)", "x86", 76.8, 4, None, "cpu"),
    (r"3230m", "x86", 25.6, 2, None, "cpu"),
    (r"(9500t|x86-i5-9500)", "x86", 42.7, 6, None, "cpu"),
    (r"258v", "x86", 136.5, 4, None, "cpu"),
    (r"155h", "x86", 119.5, 6, "core-ultra-155h", "cpu"),
    (r"epyc-7352", "server", 204.8, 24, None, "cpu"),
    (r"9274f", "server", 460.8, 24, None, "cpu"),
    (r"ampereone", "server", 332.8, 96, None, "cpu"),
    (r"13900k\|", "x86", 89.6, 8, None, "cpu"),
    (r"13900hx", "x86", 89.6, 8, None, "cpu"),
    (r"x86-8840u\|cpu", "x86", 89.6, 8, "ryzen-7840u", "cpu"),
    (r"framework-13-amd", "x86", 89.6, 6, None, "cpu"),
    (r"(c2q-q8400|optiplex-780)", "x86", 17.1, 4, None, "cpu"),
    (r"i3-1315u", "x86", 76.8, 2, None, "cpu"),
    (r"i3-14100", "x86", 76.8, 4, None, "cpu"),
    (r"i5-1035g7", "x86", 58.3, 4, None, "cpu"),
    (r"(1135g7|1165g7)", "x86", 51.2, 4, None, "cpu"),
    (r"i5-4278u", "x86", 25.6, 2, None, "cpu"),
    (r"13700t", "x86", 76.8, 8, None, "cpu"),
    (r"(7820hq|8550u)", "x86", 38.4, 4, None, "cpu"),
    (r"n100\|", "x86", 38.4, 4, "n100", "cpu"),
    (r"(n150|nucbox)", "x86", 25.6, 4, "n150", "cpu"),
    (r"ryzen-ai-(340|npu)", "x86", 89.6, 6, None, "cpu"),
    (r"dx13260", "x86", 136.5, 4, None, "cpu"),
    # GPUs with memory of their own
    (r"(gb10|spark)", "gb10", 273.0, 0, None, "gpu"),
    (r"w7700", "amd", 576.0, 0, None, "gpu"),
    (r"rx 580", "amd", 256.0, 0, None, "gpu"),
    (r"rx 6500", "amd", 144.0, 0, None, "gpu"),
    (r"rx-6650", "amd", 280.0, 0, None, "gpu"),
    (r"rx 6700", "amd", 384.0, 0, None, "gpu"),
    (r"rx 7600", "amd", 288.0, 0, None, "gpu"),
    (r"7900 xt", "amd", 800.0, 0, None, "gpu"),
    (r"(rx 9070|r9700)", "amd", 640.0, 0, None, "gpu"),
    (r"arc a310", "amd", 124.0, 0, None, "gpu"),
    (r"b580", "amd", 456.0, 0, None, "gpu"),
    (r"pro b50", "amd", 224.0, 0, None, "gpu"),
    (r"1050-ti", "nvidia", 112.1, 0, None, "gpu"),
    (r"1080-ti", "nvidia", 484.4, 0, None, "gpu"),
    (r"1650ti", "nvidia", 192.0, 0, None, "gpu"),
    (r"1650", "nvidia", 112.1, 0, None, "gpu"),
    (r"2070-maxq", "nvidia", 384.0, 0, None, "gpu"),
    (r"2080 ?ti", "nvidia", 616.0, 0, None, "gpu"),
    (r"3050-ti", "nvidia", 192.0, 0, None, "gpu"),
    (r"3050-6gb", "nvidia", 168.0, 0, None, "gpu"),
    (r"3060ti", "nvidia", 448.0, 0, None, "gpu"),
    (r"3060", "nvidia", 360.0, 0, None, "gpu"),
    (r"3070", "nvidia", 448.0, 0, None, "gpu"),
    (r"3080[- ]ti", "nvidia", 912.0, 0, None, "gpu"),
    (r"3080", "nvidia", 760.0, 0, None, "gpu"),
    (r"3090", "nvidia", 936.0, 0, None, "gpu"),
    (r"a400$|a400\|", "nvidia", 96.0, 0, None, "gpu"),
    (r"a2000", "nvidia", 288.0, 0, None, "gpu"),
    (r"4000-ada", "nvidia", 360.0, 0, None, "gpu"),
    (r"a4000", "nvidia", 448.0, 0, None, "gpu"),
    (r"5000-ada", "nvidia", 576.0, 0, None, "gpu"),
    (r"6000-ada", "nvidia", 960.0, 0, None, "gpu"),
    (r"a6000", "nvidia", 768.0, 0, None, "gpu"),
    (r"a100-pcie", "nvidia", 1935.0, 0, None, "gpu"),
    (r"a100-sxm", "nvidia", 2039.0, 0, None, "gpu"),
    (r"a40-", "nvidia", 696.0, 0, None, "gpu"),
    (r"h100", "nvidia", 2039.0, 0, None, "gpu"),
    (r"l40s", "nvidia", 864.0, 0, None, "gpu"),
    (r"4050", "nvidia", 192.0, 0, "rtx4050-laptop", "cuda"),
    (r"(rtx4060-laptop|4060-laptop)", "nvidia", 256.0, 0, "rtx4060-laptop", "cuda"),
    (r"4060-ti", "nvidia", 288.0, 0, None, "gpu"),
    (r"4070-laptop", "nvidia", 256.0, 0, None, "gpu"),
    (r"4070[- ]ti super", "nvidia", 672.0, 0, None, "gpu"),
    (r"4070", "nvidia", 504.0, 0, None, "gpu"),
    (r"4080", "nvidia", 717.0, 0, None, "gpu"),
    (r"4090", "nvidia", 1008.0, 0, None, "gpu"),
    (r"5060ti", "nvidia", 448.0, 0, None, "gpu"),
    (r"5070-laptop", "nvidia", 384.0, 0, None, "gpu"),
    (r"5090", "nvidia", 1792.0, 0, None, "gpu"),
)


def find(device_id: str, backend: str) -> Place:
    """Where a row was measured.

    Raises:
        KeyError: no entry.
    """
    name = f"{device_id}|{backend}".lower()
    for pattern, kind, gbs, cores, profile, ours in PLACES:
        if re.search(pattern, name):
            key = f"{profile}/{ours}" if profile else name
            return Place(key, kind, gbs, cores, profile, ours)
    raise KeyError(name)
