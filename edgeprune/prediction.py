"""`predict`: speed, first token and memory of a model on a device, of a file, a checkpoint or bare numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.candidates import cost_of, usable_targets
from edgeprune.checkpoint import Checkpoint
from edgeprune.cost import DEFAULT_DEPTH, MIB, Cost, Prediction, bytes_read_per_token, judge, predict
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import BadInput
from edgeprune.export.gguf_mixtures import QUANTISATIONS
from edgeprune.export.gguf_mixtures import quantisation as known_mixture
from edgeprune.export.gguf_types import recipe
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp_repack import repacked_bytes
from edgeprune.targets import target_for

MULTIPLE = 32  # of all widths, where they are not known
KV_SHARE = 0.25  # of the hidden size, where only the size of a model is known: four query heads to a key/value head


@dataclass(frozen=True)
class DevicePrediction:
    """What a model is predicted to do on a device. Speeds in tokens/s; `ttft_s` is the prompt and the first token."""

    device: str
    model: str
    quantisation: str
    cost: Cost
    prompt: int
    ttft_s: Prediction | None  # None where the profile has no figure for the prompt
    reasons: tuple[str, ...]  # why it does not fit; empty if it does
    assumed: tuple[str, ...] = ()  # what was not known of the model

    def to_json(self) -> dict[str, Any]:
        """Flat, one key a number; null where the profile has no figure."""
        record: dict[str, Any] = {"device": self.device, "model": self.model, "quantisation": self.quantisation}
        cost = self.cost
        record |= {"runtime": cost.runtime, "backend": cost.backend, "threads": cost.threads, "context": cost.context}
        for name, unit, found in (
            ("tg", "tps", cost.decode_tps),
            ("pp", "tps", cost.prefill_tps),
            ("ttft", "s", self.ttft_s),
            ("load", "s", cost.load_s),
            ("peak", "mib", cost.memory_mib),
            ("beside", "mib", cost.beside_mib),
        ):
            record[f"{name}_{unit}"] = None if found is None else found.value
            record[f"{name}_low"] = None if found is None else found.low
            record[f"{name}_high"] = None if found is None else found.high
        fits = not self.reasons
        reason = "; ".join(self.reasons) or None
        return record | {
            "gpu_layers": cost.gpu_layers,
            "prompt": self.prompt,
            "fits": fits,
            "reason": reason,
            "assumed": self.assumed,
            "kind": "predicted",
        }


def predict_file(
    path: Path,
    profile: DeviceProfile,
    *,
    quantisation: str | None = None,
    threads: int | None = None,
    context: int = 2048,
    prompt: int = 512,
    depth: int = DEFAULT_DEPTH,
) -> DevicePrediction:
    """Of a GGUF file as it is, or of what a checkpoint folder becomes with a quantisation.

    Args:
        prompt: tokens before the first one is generated.
        depth: tokens in the cache while decoding, on average; default: as llama-bench's tg128.

    Raises:
        BadInput: a broken file, a folder without `quantisation`, or a quantisation for a file that has one.
    """
    budget = Budget.of(profile, context=context)
    if not path.exists():
        raise BadInput("no such file or folder", where=path)
    if path.is_file():
        if quantisation:
            raise BadInput("a file has its quantisation already", where=path, remedy="leave --quant out")
        cost, name = _cost_of_file(GgufFile(path), profile, threads, context, depth)
    else:
        if not quantisation:
            raise BadInput("a checkpoint has no quantisation yet", where=path, remedy="add --quant Q4_0")
        target = usable_targets([target_for(quantisation)], profile)[0]
        cost, name = (
            cost_of(Checkpoint(path).shape, target, profile, budget, threads=threads, depth=depth),
            quantisation,
        )
    return _prediction(profile, str(path), name, cost, prompt, budget)


def predict_size(
    parameters: float,
    layers: int,
    quantisation: str,
    profile: DeviceProfile,
    *,
    size_mib: float | None = None,
    threads: int | None = None,
    context: int = 2048,
    prompt: int = 512,
    depth: int = DEFAULT_DEPTH,
) -> DevicePrediction:
    """Of a model in llama.cpp of which only the size is known: all weights are taken to be read for each token.

    Args:
        size_mib: of the file; default: parameters times the bits of the quantisation's base type.

    Raises:
        BadInput: an unknown quantisation, or a number out of range.
    """
    if not (1e5 <= parameters <= 1e13 and 1 <= layers <= 10_000 and (size_mib is None or 0 < size_mib < 1e9)):
        raise BadInput("a model needs 1e5 to 1e13 parameters, 1 to 10000 layers and a size above 0")
    wish = recipe(quantisation)
    if wish.types and size_mib is None:
        remedy = f"give {wish.kind}, or the file's size with --size-mib"
        raise BadInput(f"{quantisation}: no size is known of tensors' own types", where="--quant", remedy=remedy)
    quantisation = wish.kind  # an importance matrix alters no size
    bits = known_mixture(quantisation).bits
    size = round(parameters * bits / 8 if size_mib is None else size_mib * MIB)
    hidden = (parameters / (12 * layers)) ** 0.5  # attention 4 h², MLP 8 h², a layer
    kv_bytes = round(2 * layers * KV_SHARE * hidden * context * 2)
    whole = ("blk.all", QUANTISATIONS[quantisation].base, (MULTIPLE, MULTIPLE), size)  # every width is one of it
    repacked = repacked_bytes([whole], profile.cpu.isa, tied=False)
    cost = predict(
        profile,
        runtime="llamacpp",
        bytes_per_token=size,
        n_layers=layers,
        weights_bytes=size,
        kv_bytes=kv_bytes,
        repack_bytes=repacked,
        threads=threads,
        context=context,
        parameters=round(parameters),
        quantisation=quantisation,
        depth=depth,
    )
    assumed = ["all weights are read for each token", f"a cache of {kv_bytes / MIB:.0f} MiB at {context} tokens"]
    if size_mib is None:
        assumed.append(f"{bits:.3g} bits a weight")
    budget = Budget.of(profile, context=context)
    return _prediction(profile, f"{parameters / 1e9:.3g} B", quantisation, cost, prompt, budget, tuple(assumed))


def _most_heads(file: GgufFile) -> int:
    """Query heads of the widest layer; raises `BadInput` where no layer has any."""
    if most := max((layer.heads for layer in file.widths()), default=0):
        return most
    raise BadInput("no layer has attention", where=file.path, remedy="not supported")


def _cost_of_file(
    file: GgufFile, profile: DeviceProfile, threads: int | None, context: int, depth: int
) -> tuple[Cost, str]:
    parts = file.bytes_by_part()
    tied = "output.weight" not in file.tensors
    embedding = file.tensor("token_embd.weight").shape
    if len(embedding) != 2:
        raise BadInput(f"token_embd.weight has shape {embedding}", where=file.path, remedy="download the file again")
    name = quantisation_of(file)
    head_dim = file.get(f"{file.architecture}.attention.key_length", int) or embedding[1] // _most_heads(file)
    kv_values = sum(2 * layer.kv_heads * head_dim for layer in file.widths())
    each = ((tensor.name, tensor.type, tensor.shape, tensor.n_bytes) for tensor in file.tensors.values())
    repacked = repacked_bytes(each, profile.cpu.isa, tied=tied)
    cost = predict(
        profile,
        runtime="llamacpp",
        bytes_per_token=bytes_read_per_token(parts, tied=tied, vocab=embedding[0]),
        n_layers=len(file.widths()),
        weights_bytes=sum(parts.values()),
        kv_bytes=kv_values * context * 2,
        repack_bytes=repacked,
        threads=threads,
        context=context,
        file_bytes=file.path.stat().st_size,
        parameters=file.parameters,
        quantisation=name,
        types=file.bytes_by_type(lambda tensor: len(tensor.shape) > 1 and (tied or tensor.name != "token_embd.weight")),
        vocab=embedding[0],
        depth=depth,
        head_bytes=parts["embedding" if tied else "head"],
    )
    return cost, name


def quantisation_of(file: GgufFile) -> str:
    """The mixture that a file names, else the type that most of its bytes have."""
    named = file.get("general.file_type", int)
    heaviest = max(file.bytes_by_type().items(), key=lambda item: item[1])[0]
    return next((each.name for each in QUANTISATIONS.values() if each.file_type == named), heaviest)


def _prediction(
    profile: DeviceProfile,
    model: str,
    quantisation: str,
    cost: Cost,
    prompt: int,
    budget: Budget,
    assumed: tuple[str, ...] = (),
) -> DevicePrediction:
    first, prefill = None, cost.prefill_tps
    if prefill is not None:
        decode = cost.decode_tps
        first = Prediction(
            prompt / prefill.value + 1 / decode.value,
            prompt / prefill.high + 1 / decode.high,
            prompt / prefill.low + 1 / decode.low,
        )
    memory_only = budget.model_copy(update={"min_tokens_per_s": None, "max_memory_mib": None})
    reasons = tuple(judge(cost, memory_only, profile))
    return DevicePrediction(profile.name, model, quantisation, cost, prompt, first, reasons, assumed)
