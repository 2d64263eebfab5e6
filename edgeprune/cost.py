"""What a model costs on a device: speed, memory and file size, predicted with intervals. Pure arithmetic.

Speed of decoding (one token):  t = (W + K) / (q·B) + f + n·c
with W the weight bytes read, K the cache bytes read, B the effective bandwidth, q the share of it that the
quantisation's kernel reaches, f and c the fixed terms of the device's profile and n the layers. Prompt processing is
bound by arithmetic: t = parameters / P a token, P by quantisation, in proportion to the big cores at work.
Where a GPU has no room for all layers, each part takes its own time, one after the other (`offload`).
Memory is a cliff: beyond what the device can hold, a model does not run slower but (almost) not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgeprune.devices import Backend, Budget, Decode, DeviceProfile, Figure, Load, PositiveFigure
from edgeprune.errors import BadInput, unknown
from edgeprune.offload import Split, split
from edgeprune.runtimes.settings import ALL_LAYERS

MIB = 1 << 20
# llama-bench's tg128 generates 128 tokens from an empty cache: 64 cached tokens on average.
DEFAULT_DEPTH = 64

# Peak memory of the process (VmHWM) beyond weights, cache at full context and repacked copies, in MiB: interpreter,
# libraries, activations of one batch. Measured through `edgeprune.runtimes` on SmolLM2-135M, x86, 2 threads, contexts
# of 512 and 2048, prompts of 128 and 512 tokens.
OVERHEAD_MIB: Mapping[str, Figure] = {
    "llamacpp": Figure(
        value=75,
        low=65,
        high=95,
        kind="measured",
        source="llama-cpp-python 0.3.36: F16, Q8_0, Q4_K_M, Q4_1 68-87 MiB; Q4_0 67-78 beside its repacked copy",
    ),
    "onnxruntime": Figure(
        value=120,
        low=90,
        high=165,
        kind="measured",
        source="onnxruntime 1.32, int4 fused graph: 115-133 MiB, weights packed anew at load among it",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """A predicted number with its interval; never to be shown as a measurement."""

    value: float
    low: float
    high: float

    kind: Literal["predicted"] = "predicted"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high:
            raise ValueError(f"needs 0 <= low <= value <= high, found {self.low}, {self.value}, {self.high}")

    def __str__(self) -> str:
        """The value with its interval: "110 (101–118)"."""
        value, low, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in (self.value, self.low, self.high))
        return f"{value} ({low}–{high})"


@dataclass(frozen=True)
class Cost:
    """What one model costs on one device. Speeds in tokens/s; None where the profile has no figure.

    Where a GPU computes a part of the model only, `memory_mib` is that on the GPU and `beside_mib` the rest.
    """

    decode_tps: Prediction
    prefill_tps: Prediction | None
    load_s: Prediction | None  # opening the file, from the page cache
    memory_mib: Prediction
    file_mib: float
    runtime: str
    backend: Backend
    threads: int
    context: int
    gpu_layers: int | None = None  # of llama.cpp; None on the processor
    beside_mib: Prediction | None = None


def bytes_read_per_token(parts: Mapping[str, int], *, tied: bool, vocab: int) -> int:
    """Bytes of weights that generating one token reads.

    Args:
        parts: bytes by part of the model. "embedding" is the token embedding, of which an untied model reads one
            row; every other part ("head", "attention", "mlp", "norms", ...) is read in full.
        tied: the head is the embedding's tensor, which is then read in full (and once: the row is among it).
        vocab: rows of the embedding.

    Raises:
        BadInput: no vocabulary, or a negative size.
    """
    if vocab < 1 or any(size < 0 for size in parts.values()):
        raise BadInput("a model's parts need sizes of at least 0 and a vocabulary of at least 1")
    total = sum(parts.values())
    if tied:
        return total
    embedding = parts.get("embedding", 0)
    return total - embedding + -(-embedding // vocab)


def _interval(figure: Figure | None) -> tuple[float, float, float]:
    return (0.0, 0.0, 0.0) if figure is None else (figure.low, figure.value, figure.high)


def effective_bandwidth(profile: DeviceProfile, decode: Decode, backend: Backend, threads: int) -> PositiveFigure:
    """Effective decode bandwidth in 10^9 bytes/s at `threads` threads.

    On the CPU it is bound by the memory and by the cores: fewer threads than the profile's reach at most `threads`
    times one thread's bandwidth; threads on small cores make the big ones wait for them (Dimensity 7300: 6.5 GB/s on
    all eight cores, 13 on the four big ones).
    """
    full, best = decode.gbs, profile.threads
    if backend != "cpu" or threads == best:
        return full
    if threads < best:
        share = threads / best
        low, value, high = full.low * share, full.value * share, full.high
        if decode.one_thread_gbs is not None:
            one = decode.one_thread_gbs
            low, value, high = (
                min(full.low, one.low),  # more threads do not make it slower than one
                min(full.value, one.value * threads),
                min(full.high, one.high * threads),
            )
        source = f"{full.source}; scaled to {threads} of {best} threads"
        return PositiveFigure(value=value, low=low, high=high, kind="derived", source=source)
    if threads > profile.cpu.big_cores.value:
        source = f"{full.source}; {threads} threads reach beyond the big cores"
        return PositiveFigure(
            value=full.value * 0.7, low=full.low * 0.45, high=full.high, kind="derived", source=source
        )
    return full


def kernel_share(
    decode: Decode, runtime: str, quantisation: str | None, types: Mapping[str, int] | None = None
) -> float:
    """Share of the effective bandwidth that llama.cpp's kernels of a model reach; 1 where nothing is known.

    Args:
        quantisation: the mixture's name.
        types: bytes that a token reads by tensor type. Where the profile has a figure for each, the share is that of
            all bytes over the sum of the times that each type's take.
    """
    if runtime != "llamacpp":
        return 1.0
    if types and all(kind in decode.types for kind in types):
        return sum(types.values()) / sum(size / decode.types[kind].value for kind, size in types.items())
    figure = decode.kernel.get(quantisation or "")
    return 1.0 if figure is None else figure.value


def predict(
    profile: DeviceProfile,
    *,
    runtime: str,
    bytes_per_token: float,
    n_layers: int,
    weights_bytes: int,
    kv_bytes: int,
    repack_bytes: int = 0,
    threads: int | None = None,
    context: int = 2048,
    file_bytes: int | None = None,
    depth: int = DEFAULT_DEPTH,
    parameters: int | None = None,
    quantisation: str | None = None,
    types: Mapping[str, int] | None = None,
    vocab: int = 0,
    head_bytes: int = 0,
    gpu_memory_mib: float | None = None,
) -> Cost:
    """Predict what a model costs on a device.

    Args:
        runtime: "llamacpp" or another that the profile knows.
        bytes_per_token: weight bytes read for one token (`bytes_read_per_token`).
        n_layers: decoder layers.
        weights_bytes: bytes of all weights in memory.
        kv_bytes: bytes of the key/value cache at `context` tokens, in the runtime's own type.
        repack_bytes: bytes of weights that the runtime would copy into another layout at load, were all of them on the
            processor (`runtimes.llamacpp_repack`); the mapped file stays beside them.
        threads: CPU threads (default: the profile's).
        context: tokens the cache is made for.
        file_bytes: size of the file (default: `weights_bytes`).
        depth: tokens in the cache while decoding, on average (default: as llama-bench's tg128).
        parameters, quantisation: for the prefill; without them it is None. A quantisation whose kernel the profile
            has a figure for decodes by it.
        types: bytes of weights read for one token, by tensor type (see `kernel_share`).
        vocab: tokens of the vocabulary, for the time to open the file.
        head_bytes: bytes of the head among `bytes_per_token`, for a GPU that has no room for all.
        gpu_memory_mib: the most to take of a GPU's own memory; default: what of it is usable.

    Raises:
        BadInput: a number out of range, or the profile has no figure for `runtime`.
    """
    numbers = (n_layers, weights_bytes, kv_bytes, repack_bytes, depth)
    if not bytes_per_token > 0 or min(numbers) < 0 or context < 1 or (threads is not None and threads < 1):
        raise BadInput("a cost needs positive bytes a token, a context and threads of at least 1, and no negative size")
    backend = profile.backend_for(runtime)
    if backend is None or runtime not in OVERHEAD_MIB:
        supported = [name for name in OVERHEAD_MIB if profile.backend_for(name) is not None]
        raise unknown(f"runtime on {profile.name}", runtime, supported)
    decode = profile.decode[backend]
    used = threads or profile.threads
    bandwidth = effective_bandwidth(profile, decode, backend, used)
    scale = profile.scale_for(runtime)
    share = (1.0, 1.0, 1.0) if scale is None else _interval(scale.decode)
    kernel = kernel_share(decode, runtime, quantisation, types)
    read = bytes_per_token + kv_bytes * min(depth, context) / context
    fixed, layer = _interval(decode.fixed_ms), _interval(decode.layer_ms)
    overhead = OVERHEAD_MIB[runtime]
    part = Split(ALL_LAYERS, n_layers, read, 1.0)  # all in one place
    if runtime == "llamacpp" and backend != "cpu" and profile.beside is not None:
        room = _room(profile, gpu_memory_mib)
        part = split(room, read=bytes_per_token, cache=kv_bytes, head=head_bytes, n_layers=n_layers)
    rest = (0.0, 0.0, 0.0)
    if part.share < 1:
        slower = kernel_share(profile.decode["cpu"], runtime, quantisation, types)
        rest = _seconds_beside(profile, read * (1 - part.share) / slower, n_layers - part.layers)

    def seconds(gbs: float, efficiency: float, index: int) -> float:
        here = read * part.share / (gbs * efficiency * kernel * 1e9) + (fixed[index] + part.layers * layer[index]) / 1e3
        return here + rest[index]

    decode_tps = Prediction(
        value=1 / seconds(bandwidth.value, share[1], 1),
        low=1 / seconds(bandwidth.low, share[0], 2),
        high=1 / seconds(bandwidth.high, share[2], 0),
    )
    prefill = None
    rates = profile.prefill.get(backend, {}) if runtime == "llamacpp" else {}
    if parameters and quantisation in rates and part.share == 1:
        rate = rates[quantisation]
        cores = min(1.0, used / profile.threads) if backend == "cpu" else 1.0
        each = cores / (parameters / 1e9)
        prefill = Prediction(rate.value * each, rate.low * each, rate.high * each)
    size = weights_bytes if file_bytes is None else file_bytes
    copied = repack_bytes * (1.0 if backend == "cpu" else 1 - part.share)  # a GPU has no such copies
    held = (weights_bytes + kv_bytes + copied) / MIB
    left = None
    if part.share < 1:
        held, left = part.gpu_bytes / MIB, held - part.gpu_bytes / MIB
    return Cost(
        decode_tps=decode_tps,
        prefill_tps=prefill,
        load_s=_load(profile.load, size, vocab) if profile.load and runtime == "llamacpp" else None,
        memory_mib=_with_overhead(held, overhead),
        file_mib=size / MIB,
        runtime=runtime,
        backend=backend,
        threads=used,
        context=context,
        gpu_layers=part.gpu_layers if backend != "cpu" and runtime == "llamacpp" else None,
        beside_mib=None if left is None else _with_overhead(left, overhead),
    )


def _with_overhead(held_mib: float, overhead: Figure) -> Prediction:
    return Prediction(held_mib + overhead.value, held_mib + overhead.low, held_mib + overhead.high)


def _room(profile: DeviceProfile, gpu_memory_mib: float | None) -> float:
    """Bytes that a GPU's own memory has for weights and cache."""
    most = min(profile.usable_memory_mib, gpu_memory_mib or math.inf)
    return max(0.0, most - OVERHEAD_MIB["llamacpp"].value) * MIB


def _seconds_beside(profile: DeviceProfile, read: float, n_layers: int) -> tuple[float, float, float]:
    """Time that the processor takes for `n_layers` layers of `read` bytes together: (shortest, usual, longest)."""
    decode = profile.decode["cpu"]
    shortest, usual, longest = (
        read / (gbs * 1e9) + n_layers * ms / 1e3
        for gbs, ms in zip(reversed(_interval(decode.gbs)), _interval(decode.layer_ms), strict=True)
    )
    return shortest, usual, longest


def _load(load: Load, size: int, vocab: int) -> Prediction:
    slow, usual, fast = (size / rate / 1e9 for rate in _interval(load.gbs))
    fixed, token = _interval(load.fixed_ms), _interval(load.token_us)
    rest = [ms / 1e3 + vocab * us / 1e6 for ms, us in zip(fixed, token, strict=True)]
    return Prediction(usual + rest[1], fast + rest[0], slow + rest[2])


def bytes_allowed(
    profile: DeviceProfile,
    runtime: str,
    n_layers: int,
    tokens_per_s: float,
    quantisation: str | None = None,
    types: Mapping[str, int] | None = None,
    gpu_memory_mib: float | None = None,
) -> float:
    """Bytes (weights and cache) that `runtime` can read for one token at a speed, by the middle of the figures.

    The inverse of `predict`: negative where the fixed terms alone take longer than that. What a GPU has no room for is
    counted at the processor's speed; what its layers cost beyond their bytes is not.

    Raises:
        BadInput: the profile has no figure for `runtime`.
    """
    backend = profile.backend_for(runtime)
    if backend is None:
        raise unknown(f"runtime on {profile.name}", runtime, [n for n in OVERHEAD_MIB if profile.backend_for(n)])
    decode, scale = profile.decode[backend], profile.scale_for(runtime)
    fixed_ms = _interval(decode.fixed_ms)[1] + n_layers * _interval(decode.layer_ms)[1]
    share = (1.0 if scale is None else scale.decode.value) * kernel_share(decode, runtime, quantisation, types)
    seconds = 1 / tokens_per_s - fixed_ms / 1e3
    read = seconds * decode.gbs.value * share * 1e9
    if runtime != "llamacpp" or profile.beside is None or read <= (room := _room(profile, gpu_memory_mib)):
        return read
    slow = profile.decode["cpu"]
    left = (read - room) / read * seconds
    return room + left * slow.gbs.value * kernel_share(slow, runtime, quantisation, types) * 1e9


def judge(cost: Cost, budget: Budget, profile: DeviceProfile, *, hopeful: bool = False) -> list[str]:
    """Why the model does not fit: one reason a limit it breaks, each naming what it lacks; empty if it fits.

    Predicted values are judged by their middle or, `hopeful`, by the better end of their interval: what breaks a limit
    even so cannot fit. The device's own memory is always a limit.
    """
    reasons = []
    speed = cost.decode_tps.high if hopeful else cost.decode_tps.value
    held = cost.memory_mib.low if hopeful else cost.memory_mib.value
    if budget.min_tokens_per_s is not None and speed < budget.min_tokens_per_s:
        reasons.append(f"needs {budget.min_tokens_per_s:.4g} tokens/s, predicted {cost.decode_tps}")
    where = profile.beside if profile.beside and cost.backend == "cpu" else profile.memory
    memory, usable = cost.memory_mib, where.usable_mib
    narrower = budget.max_memory_mib is not None and budget.max_memory_mib < usable  # than the device's own limit
    if budget.max_memory_mib is not None and narrower and held > budget.max_memory_mib:
        reasons.append(f"memory at most {budget.max_memory_mib:.0f} MiB, predicted {memory}")
    beside = profile.beside
    if beside and cost.beside_mib and (cost.beside_mib.low if hopeful else cost.beside_mib.value) > beside.usable_mib:
        reasons.append(f"the machine beside the GPU holds {beside.usable_mib:.0f} MiB, predicted {cost.beside_mib}")
    if not narrower and held > usable:
        reasons.append(f"{profile.name} holds {usable:.0f} MiB without swapping, predicted {memory}")
    if budget.max_file_mib is not None and cost.file_mib > budget.max_file_mib:
        reasons.append(f"file at most {budget.max_file_mib:.4g} MiB, predicted {cost.file_mib:.1f}")
    return reasons
