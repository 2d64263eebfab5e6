"""The bundle: the folder that ships. Model file, tokenizer, what an app must know to run it, and hashes."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.at_hand import in_gpu_memory, peak_mib
from edgeprune.candidates import Candidate
from edgeprune.checkpoint import GGUF_TOKENIZER
from edgeprune.files import atomic_folder, read_json, write_json, write_text
from edgeprune.models import copy_companions, copy_files, public_name, stated_licence, terms
from edgeprune.plan import PrunePlan
from edgeprune.quality import CrossQuality, Quality, TextQuality
from edgeprune.record import Trial, environment
from edgeprune.report_page import MIB, PROMPT
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.tuning import Tuned
from edgeprune.shape import ModelShape
from edgeprune.sums import write_sums
from edgeprune.vocabulary_plan import PLAN_FILE as VOCABULARY_PLAN
from edgeprune.vocabulary_plan import VocabularyPlan

if TYPE_CHECKING:
    from edgeprune.fitting import FitResult

SCHEMA_VERSION = 1
CHECKPOINTS = "checkpoints"  # in a run's folder: the pruned weights that its bundles were made of


@dataclass(frozen=True)
class Made:
    """What was exported of a candidate, and where it came from.

    Attributes:
        exported: a file or a folder.
        source: the dense model's folder.
        companions: the folder with its tokenizer: the dense one's, or one without the tokens that went.
        plan: what it keeps of the layers.
        vocabulary: which tokens it keeps, where some went.
        checkpoint: the folder in `CHECKPOINTS` with its weights; None where they are the dense model's.
    """

    exported: Path
    source: Path
    companions: Path
    plan: PrunePlan
    vocabulary: VocabularyPlan | None = None
    checkpoint: str | None = None

    def eos(self, shape: ModelShape) -> list[int]:
        """Ids of the tokens that end an answer: those of `shape`, the dense model's, as numbered now."""
        kept = None if self.vocabulary is None else self.vocabulary.kept
        return [token if kept is None else kept.index(token) for token in shape.eos]


def chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder, of several the default one, verbatim; it is never rendered here."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several by name, "tool_use" beside "default"
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _stop_tokens(source: Path, ids: Sequence[int]) -> list[str]:
    """Text of the tokens that end an answer: the tokenizer's own, and those of `ids` that it has as added ones."""
    settings = source / "tokenizer_config.json"
    token = read_json(settings).get("eos_token") if settings.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    path = source / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.is_file() else []
    texts = [each["content"] for each in added if each["id"] in ids]
    return list(dict.fromkeys([*([token] if isinstance(token, str) else []), *texts]))


def _threads(candidate: Candidate, trial: Trial) -> int:
    """Those that its speed was measured with, or else is predicted for."""
    return int(next((record["n_threads"] for record in trial.speed.values()), candidate.cost.threads))


def _bundle_json(
    result: FitResult, candidate: Candidate, trial: Trial, made: Made, model_file: str, tuned: Tuned | None
) -> dict[str, Any]:
    profile, budget = result.proposal.profile, result.proposal.budget
    template = chat_template(made.source)
    assert trial.quality is not None
    peak = peak_mib(trial, dedicated=in_gpu_memory(candidate, profile))
    return {
        "schema_version": SCHEMA_VERSION,
        "model_file": model_file,
        "runtime": candidate.target.runtime,
        "quantisation": candidate.target.quantisation,
        "device": profile.name,
        "budget": budget.model_dump(mode="json"),
        "n_ctx": budget.context,
        "threads": _threads(candidate, trial) if tuned is None else tuned.best.threads,
        "settings": candidate.settings if tuned is None else dict(tuned.best.settings),
        "chat_template": template,
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "stop": _stop_tokens(made.source, result.proposal.shape.eos),
        "eos_token_ids": made.eos(result.proposal.shape),
        "memory_need_mib": round(max(candidate.cost.memory_mib.high, peak or 0.0), 1),
        "predicted": {
            "on": profile.name,
            "decode_tokens_per_s": asdict(candidate.cost.decode_tps),
            "prefill_tokens_per_s": None if candidate.cost.prefill_tps is None else asdict(candidate.cost.prefill_tps),
            "memory_mib": asdict(candidate.cost.memory_mib),
        },
        "measured": {
            "on": trial.quality.measured_on.machine,
            **_beside_dense(trial.quality),
            "perplexity": trial.quality.perplexity,
            "bits_per_byte": trial.quality.bits_per_byte,
            "speed": trial.speed,
            "tuning": None if tuned is None else tuned.to_json(),
        },
        "judged_on": {"source": result.judged_on.source, "scripts": dict(result.judged_on.scripts)},
        "tokens_counted_on": None if made.vocabulary is None else made.vocabulary.counted_on(),
        "plan": candidate.to_json()["plan"],
        "checkpoint": made.checkpoint,
        "licence": _licence(made.source),
        "environment": environment(),
    }


def _beside_dense(quality: TextQuality) -> dict[str, Any]:
    """The figures of a file that compare it with the dense model; None for those that it has not."""
    return {
        "kl_nats": asdict(quality.kl_nats) if isinstance(quality, Quality) else None,
        "top1": asdict(quality.top1) if isinstance(quality, Quality) else None,
        "loss_over_dense_nats": asdict(quality.over_nats) if isinstance(quality, CrossQuality) else None,
    }


def _measured_lines(quality: TextQuality) -> list[str]:
    """Rows of the model card's table on quality."""

    def row(name: str, mean: str, interval: str = "") -> str:
        return f"| {name} | {mean} | {interval} | measured |"

    lines = []
    if isinstance(quality, Quality):
        kl, top1 = quality.kl_nats, quality.top1
        lines.append(row("KL(dense to this), nats a token", f"{kl.mean:.4f}", f"{kl.low:.4f} to {kl.high:.4f}"))
        lines.append(row("top-1 agreement with dense", f"{top1.mean:.3f}", f"{top1.low:.3f} to {top1.high:.3f}"))
        lines.append(row("perplexity on the held-out text", f"{quality.perplexity:.2f}"))
    elif isinstance(quality, CrossQuality):
        over = quality.over_nats
        lines.append(
            row("loss over dense, nats a dense token", f"{over.mean:.4f}", f"{over.low:.4f} to {over.high:.4f}")
        )
        lines += [
            "| KL(dense to this), top-1 agreement, perplexity | – | | other tokens than dense |",
        ]
    lines.append(row("bits per byte on the held-out text", f"{quality.bits_per_byte:.4f}"))
    return lines


def _model_card(result: FitResult, candidate: Candidate, trial: Trial, made: Made, bundle: dict[str, Any]) -> str:
    quality = trial.quality
    assert quality is not None
    proposal = result.proposal
    this, dense = _spans(candidate.shape), _spans(proposal.shape)
    licence, name = _licence(made.source), public_name(proposal.model)
    vocabulary = made.vocabulary
    lines = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "tags: [edgeprune, pruned]",
        "---",
        f"# {name} for {proposal.profile.name}",
        "",
        f"{candidate}. Made by edgeprune {bundle['environment']['edgeprune']} from `{name}`"
        + (f" (licence: {licence}; the base model's terms go on to apply)." if licence else "."),
        "",
        "| | dense | this model |",
        "|---|---|---|",
        f"| parameters | {proposal.shape.parameters:,} | {candidate.shape.parameters:,} |",
        f"| tokens in the vocabulary | {proposal.shape.vocab:,} | {candidate.shape.vocab:,} |",
        f"| query / key-value heads a layer | {dense['heads']} / {dense['kv_heads']} | "
        f"{this['heads']} / {this['kv_heads']} |",
        f"| MLP neurons a layer | {dense['neurons']} | {this['neurons']} |",
        "",
        "| figure | value | interval | kind |",
        "|---|---|---|---|",
        _row("decode, tokens/s", candidate.cost.decode_tps, f"predicted for {proposal.profile.name}"),
        _row("memory, MiB", candidate.cost.memory_mib, f"predicted for {proposal.profile.name}"),
        *_first_token(candidate, proposal.profile.name),
        *_speed_lines(trial),
        f"| file, MiB | {sum(file['bytes'] for file in trial.files.values()) / MIB:.1f} | | measured |",
        *_measured_lines(quality),
        "",
        f"Measured on {quality.measured_on.machine}, in {quality.measured_on.runtime}, over {quality.n_tokens} tokens.",
        f"Held-out text: {result.judged_on}.",
        *([f"The tokens to keep were {vocabulary.counted_on()}; other uses read more tokens."] if vocabulary else []),
        "Intervals: 90 % of what is predicted, whose middle decides whether a model fits; 95 % of what is measured.",
        "",
    ]
    return "\n".join(lines)


def _first_token(candidate: Candidate, device: str) -> list[str]:
    """The model card's row on the time to the first token, where the profile tells it."""
    speed = candidate.cost.prefill_tps
    if speed is None:
        return []
    value, low, high = PROMPT / speed.value, PROMPT / speed.high, PROMPT / speed.low
    return [f"| first token after {PROMPT}, s | {value:.2f} | {low:.2f} to {high:.2f} | predicted for {device} |"]


def _speed_lines(trial: Trial) -> list[str]:
    """Rows of the model card's table on speed that was measured on the device."""
    return [
        f"| {test}, tokens/s | {speed['median_ts']:.1f} | {speed['low_ts']:.1f} to {speed['high_ts']:.1f} | measured |"
        for test, speed in trial.speed.items()
    ]


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
        # It is text from elsewhere, and goes into files that have a syntax.
        if isinstance(value, str) and re.fullmatch(r"[\w .+()/-]{1,100}", value):
            return value
    return stated_licence(source)


def write_bundle(
    result: FitResult,
    candidate: Candidate,
    trial: Trial,
    made: Made,
    out: Path,
    tuned: Tuned | None = None,
) -> None:
    """Write the folder `out` (replaced when whole) around what was exported: a file or a folder.

    Threads and settings are those that `tuned` found on the device; without it the profile's and the runtime's own.

    Raises:
        BadInput: the disk is full.
    """
    exported = made.exported
    with atomic_folder(out) as temporary:
        if exported.is_dir():
            shutil.copytree(exported, temporary, dirs_exist_ok=True)
            model_file = "model.onnx"
            copy_files(made.companions, temporary, terms(made.companions))
        else:
            model_file = f"model{exported.suffix}"
            shutil.copyfile(exported, temporary / model_file)
            copy_companions(made.companions, temporary)
            (temporary / GGUF_TOKENIZER).unlink(missing_ok=True)  # it is inside the model file already
        bundle = _bundle_json(result, candidate, trial, made, model_file, tuned)
        write_json(temporary / "bundle.json", bundle)
        made.plan.save(temporary / "prune_plan.json")
        if made.vocabulary is not None:
            made.vocabulary.save(temporary / VOCABULARY_PLAN)
        write_text(temporary / "MODEL_CARD.md", _model_card(result, candidate, trial, made, bundle))
        write_sums(temporary)
