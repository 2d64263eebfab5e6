"""The bundle: the folder that ships. Model file, tokenizer, what an app must know to run it, and hashes."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.candidates import Candidate
from edgeprune.checkpoint import GGUF_TOKENIZER
from edgeprune.files import atomic_folder, read_json, sha256, write_json, write_text
from edgeprune.models import copy_companions
from edgeprune.plan import PrunePlan
from edgeprune.record import Trial, environment
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.shape import ModelShape

if TYPE_CHECKING:
    from edgeprune.fitting import FitResult

SCHEMA_VERSION = 1


def chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder, verbatim; it is never rendered here."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def _stop_tokens(source: Path) -> list[str]:
    """Text of the tokens that end an answer."""
    settings = source / "tokenizer_config.json"
    token = read_json(settings).get("eos_token") if settings.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    return [token] if isinstance(token, str) else []


def _bundle_json(
    result: FitResult, candidate: Candidate, trial: Trial, source: Path, model_file: str
) -> dict[str, Any]:
    profile, budget = result.proposal.profile, result.proposal.budget
    template = chat_template(source)
    assert trial.quality is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "model_file": model_file,
        "runtime": candidate.target.runtime,
        "quantisation": candidate.target.quantisation,
        "device": profile.name,
        "budget": budget.model_dump(mode="json"),
        "n_ctx": budget.context,
        "threads": candidate.cost.threads,
        "chat_template": template,
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "stop": _stop_tokens(source),
        "eos_token_ids": list(candidate.shape.eos),
        "memory_need_mib": round(candidate.cost.memory_mib.high, 1),
        "predicted": {
            "on": profile.name,
            "decode_tokens_per_s": asdict(candidate.cost.decode_tps),
            "prefill_tokens_per_s": None if candidate.cost.prefill_tps is None else asdict(candidate.cost.prefill_tps),
            "memory_mib": asdict(candidate.cost.memory_mib),
        },
        "measured": {
            "on": trial.quality.measured_on.machine,
            "kl_nats": asdict(trial.quality.kl_nats),
            "top1": asdict(trial.quality.top1),
            "perplexity": trial.quality.perplexity,
            "bits_per_byte": trial.quality.bits_per_byte,
            "speed": trial.speed,
        },
        "plan": candidate.to_json()["plan"],
        "environment": environment(),
    }


def _model_card(result: FitResult, candidate: Candidate, trial: Trial, source: Path, bundle: dict[str, Any]) -> str:
    quality = trial.quality
    assert quality is not None
    proposal = result.proposal
    this, dense = _spans(candidate.shape), _spans(proposal.shape)
    kl, top1 = quality.kl_nats, quality.top1
    licence = _licence(source)
    lines = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "tags: [edgeprune, pruned]",
        "---",
        f"# {proposal.model} for {proposal.profile.name}",
        "",
        f"{candidate}. Made by edgeprune {bundle['environment']['edgeprune']} from `{proposal.model}`"
        + (f" (licence: {licence}; the base model's terms go on to apply)." if licence else "."),
        "",
        "| | dense | this model |",
        "|---|---|---|",
        f"| parameters | {proposal.shape.parameters:,} | {candidate.shape.parameters:,} |",
        f"| query / key-value heads a layer | {dense['heads']} / {dense['kv_heads']} | "
        f"{this['heads']} / {this['kv_heads']} |",
        f"| MLP neurons a layer | {dense['neurons']} | {this['neurons']} |",
        "",
        "| figure | value | 95 % interval | kind |",
        "|---|---|---|---|",
        _row("decode, tokens/s", candidate.cost.decode_tps, f"predicted for {proposal.profile.name}"),
        _row("memory, MiB", candidate.cost.memory_mib, f"predicted for {proposal.profile.name}"),
        f"| KL(dense to this), nats a token | {kl.mean:.4f} | {kl.low:.4f} to {kl.high:.4f} | measured |",
        f"| top-1 agreement with dense | {top1.mean:.3f} | {top1.low:.3f} to {top1.high:.3f} | measured |",
        f"| perplexity on the held-out text | {quality.perplexity:.2f} | | measured |",
        f"| bits per byte on the held-out text | {quality.bits_per_byte:.4f} | | measured |",
        "",
        f"Measured on {quality.measured_on.machine}, in {quality.measured_on.runtime}, over {quality.n_tokens} tokens.",
        "The interval of a prediction is the profile's; the middle of it decides whether a model fits.",
        "",
    ]
    return "\n".join(lines)


def _spans(shape: ModelShape) -> dict[str, str]:
    """Widths of a layer in words: "9", or "3 to 9" where layers differ."""
    widths = shape.widths()
    return {name: f"{min(w)} to {max(w)}" if isinstance(w, list) else str(w) for name, w in widths.items()}


def _row(name: str, prediction: Any, kind: str) -> str:
    return f"| {name} | {prediction.value:.1f} | {prediction.low:.1f} to {prediction.high:.1f} | {kind} |"


def _licence(source: Path) -> str | None:
    """The licence a GGUF tokenizer or a model card in the source names."""
    if (source / GGUF_TOKENIZER).is_file():
        value = GgufFile(source / GGUF_TOKENIZER).metadata.get("general.license")
        if isinstance(value, str):
            return value
    card = source / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    return None


def write_bundle(
    result: FitResult,
    candidate: Candidate,
    trial: Trial,
    exported: Path,
    plan: PrunePlan,
    source: Path,
    out: Path,
) -> None:
    """Write the folder `out` (replaced when whole) around what was exported: a file or a folder.

    Raises:
        BadInput: the disk is full.
    """
    with atomic_folder(out) as temporary:
        if exported.is_dir():
            shutil.copytree(exported, temporary, dirs_exist_ok=True)
            model_file = "model.onnx"
        else:
            model_file = f"model{exported.suffix}"
            shutil.copyfile(exported, temporary / model_file)
            copy_companions(source, temporary)
            (temporary / GGUF_TOKENIZER).unlink(missing_ok=True)  # it is inside the model file already
        bundle = _bundle_json(result, candidate, trial, source, model_file)
        write_json(temporary / "bundle.json", bundle)
        plan.save(temporary / "prune_plan.json")
        write_text(temporary / "MODEL_CARD.md", _model_card(result, candidate, trial, source, bundle))
        sums = [f"{sha256(p)}  {p.relative_to(temporary)}" for p in sorted(temporary.rglob("*")) if p.is_file()]
        write_text(temporary / "SHA256SUMS", "\n".join(sums) + "\n")
