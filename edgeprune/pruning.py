"""`prune`: importance, plan, compensation, surgery as one call; each leaves an artefact that is reused."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from edgeprune.allocation import Options, allocate_parameters
from edgeprune.blocks import LayeredModel
from edgeprune.calibration import TextSet, retokenized, text_set, too_few
from edgeprune.checkpoint import Checkpoint
from edgeprune.compensated import Origin, prune_compensated
from edgeprune.corpus import corpus as read_corpus
from edgeprune.corpus import text_path
from edgeprune.damage import SCHEMA_VERSION as DAMAGE_SCHEMA
from edgeprune.damage import DamageTable, measure_damage
from edgeprune.energy import energy_scores
from edgeprune.errors import BadInput, NothingFits, unknown
from edgeprune.files import cache_dir, result_folder
from edgeprune.importance import Scores, amp_scores, random_scores, reversed_scores
from edgeprune.layerwise import Compensation, packed
from edgeprune.memory import keep_freed_memory
from edgeprune.models import Model, load
from edgeprune.plan import SCOPES, PrunePlan, Scope, scopes_of, uniform_plan
from edgeprune.precision import fast_dtype
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.search import METHOD as OBS
from edgeprune.search import uniform_widths
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.surgery import PLAN_FILE, prune_checkpoint
from edgeprune.vocabulary_damage import VocabularyOption, measure_vocabulary, with_vocabulary

# AMP calibrates on 50 instruction prompts. Least squares wants more: twice the text took the KL of 10 % pruned neurons
# from 0.248 to 0.217 (32k to 65k tokens, SmolLM2-135M).
CALIBRATION_TEXTS = 128  # that the model writes: two minutes on 2 cores
GIVEN_TEXTS = 512  # of a file or data set, which cost nothing to write
CALIBRATION_LENGTH = 256
WINDOW = 512  # tokens; the calibration texts are packed into such windows for compensation
_LEAST_WINDOWS = 8
JUDGED_TEXTS = 16  # windows of calibration text that vocabularies are judged on; they solve for nothing there
TABLE_WINDOWS = 48  # for the table's second moments: its differences show with less text than the final weights need
JUDGED_WINDOWS = 2  # of them are kept from the second moments, to measure the damage table on
# Of all parameters, from which on a vocabulary is worth a look before layers are narrowed: SmolLM2-135M 21 %, whose
# tokens cost about as much as its layers; Gemma 3 270M 63 %, half of which costs 0.02 nats of English.
LARGE_VOCABULARY = 0.25

Progress = Callable[[str, int, int], None]

# Methods by scores, AMP's or the energies, which need no compensation: from those scores to the method's own.
METHODS: dict[str, Callable[[Scores, int], Scores]] = {
    "amp": lambda scores, _seed: scores,
    "energy": lambda scores, _seed: scores,
    "random": random_scores,
    "reversed": lambda scores, _seed: reversed_scores(scores),
}
AMP, ENERGY = "amp", "energy"
PRUNERS = (OBS, *METHODS)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def cached_scores(model: Model, texts: TextSet, kind: str = AMP, *, progress: Progress | None = None) -> Scores:
    """Scores of `model` on `texts`, AMP's or the energies, computed once for each pair of model and text."""
    key = hashlib.sha256(json.dumps([kind, model.hash, texts.hash]).encode()).hexdigest()[:24]
    folder = cache_dir() / "scores" / key
    if (folder / "scores.json").exists():
        return Scores.load(folder)
    stage = _stage(progress, "scoring heads and neurons")
    if kind == ENERGY:
        layered = LayeredModel(Checkpoint(model.folder), dtype=fast_dtype())
        scores = energy_scores(layered, windows_of(texts), model_hash=model.hash, progress=stage)
    else:
        scores = amp_scores(model, texts.begun, progress=stage)
    scores.save(folder)
    return scores


def windows_of(texts: TextSet) -> torch.Tensor:
    """Calibration text as windows, (windows, length): of `WINDOW` tokens, shorter where the text is short."""
    least = 1 if texts.bos is None else 2
    return packed(texts.ids, max(least, min(WINDOW, texts.tokens // _LEAST_WINDOWS)), texts.bos)


def cached_damage(source: Path, model_hash: str, texts: TextSet, *, progress: Progress | None = None) -> DamageTable:
    """The damage table of the model in `source`, measured once for each pair of model and text."""
    dtype, how = fast_dtype(), Compensation.for_tokens(texts.tokens)
    depends = [
        DAMAGE_SCHEMA,
        model_hash,
        texts.hash,
        asdict(how),
        str(dtype),
        WINDOW,
        JUDGED_WINDOWS,
        TABLE_WINDOWS,
    ]
    path = cache_dir() / "damage" / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]}.json"
    if path.exists():
        return DamageTable.load(path)
    ids = windows_of(texts)
    keep_freed_memory()
    table = measure_damage(
        LayeredModel(Checkpoint(source), dtype=dtype),
        ids[JUDGED_WINDOWS : JUDGED_WINDOWS + TABLE_WINDOWS],
        ids[:JUDGED_WINDOWS],
        how,
        model_hash=model_hash,
        text_hash=texts.hash,
        partial=(partial := path.with_suffix(".partial.json")),
        progress=_stage(progress, "measuring what each layer can lose"),
    )
    table.save(path)
    partial.unlink(missing_ok=True)
    return table


def vocabulary_damage(
    source: Path, model_hash: str, texts: TextSet, corpus: Sequence[Path], *, progress: Progress | None = None
) -> tuple[VocabularyOption, ...]:
    """What smaller vocabularies cost the model in `source` on windows of its calibration text; cached.

    Args:
        source: the dense model's folder.
        model_hash: its identity.
        texts: calibration text.
        corpus: text on which tokens are counted.

    Raises:
        BadInput: no corpus, or a tokenizer whose vocabulary cannot be pruned.
    """
    tokenizer = load_tokenizer(source)
    judged = [tokenizer.decode(window) for window in windows_of(replace(texts, bos=None))[:JUDGED_TEXTS]]
    return measure_vocabulary(source, model_hash, corpus, judged, progress=progress)


def tell_of_vocabulary(shape: ModelShape, corpus: Sequence[Path], progress: Progress | None) -> None:
    """Tell who prunes a model with a large vocabulary without a corpus what one would give."""
    share = shape.embedding_parameters / shape.parameters
    if progress and not corpus and share >= LARGE_VOCABULARY:
        progress(
            f"{share:.0%} of this model is vocabulary: --corpus TEXTS lets tokens go that no text of yours uses", 0, 0
        )


def check_corpus(corpus: Sequence[str | Path], method: str) -> None:
    """Raise `BadInput` for a corpus that `method` would not look at."""
    if corpus and method != OBS:
        raise BadInput(
            f"method {method} leaves the vocabulary as it is", where="--corpus", remedy=f"use {OBS}, or leave it out"
        )


def plan_for(shape: ModelShape, scores: Scores, ratio: float, *, align: int = 1, scope: Scope = "both") -> PrunePlan:
    """The uniform plan of `scores` at `ratio`; no forward pass."""
    return uniform_plan(
        shape,
        [h.numpy() for h in scores.heads],
        [n.numpy() for n in scores.neurons],
        ratio,
        align=align,
        scope=scope,
        method=scores.method,
        model_hash=scores.model_hash,
        text_hash=scores.text_hash,
    )


def widths_for(
    table: DamageTable,
    shape: ModelShape,
    ratio: float,
    *,
    align: int,
    uniform: bool,
    vocabulary: Sequence[VocabularyOption] = (),
) -> tuple[tuple[LayerShape, ...], int]:
    """The widths, and the size of the vocabulary, of least predicted damage with `ratio` of all parameters gone.

    Args:
        vocabulary: sizes to choose among; none: it stays as it is.

    Raises:
        BadInput: a ratio out of range or reach.
    """
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"ratio {ratio} is not in [0, 1)")
    if ratio == 0.0:
        return shape.layers, shape.vocab
    try:
        if not uniform:
            return allocate_parameters(table, shape, ratio, Options(align, heads=not shape.fixed_heads), vocabulary)
        limit = (1 - ratio) * shape.parameters
        return uniform_widths(table, shape, align, lambda after: after.parameters <= limit, vocabulary)
    except NothingFits as error:
        raise BadInput(f"ratio {ratio:.3f} is out of reach: {error.what}", remedy="ask for less") from error


def prune(
    model: str | Path | Model,
    ratio: float,
    out: str | Path,
    *,
    method: str = OBS,
    uniform: bool = False,
    align: int = 32,
    scope: Scope = "both",
    corpus: Sequence[str | Path] = (),
    calibration: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PrunePlan:
    """Prune `model` by `ratio` of all its parameters and write a Hugging Face folder to `out`.

    Args:
        model: a hub id, a folder, a .gguf file, a demo name, or a loaded model.
        ratio: share of all parameters to remove, in [0, 1).
        out: the folder to write.
        method: "obs": the widths of every layer from the measured damage table, heads and neurons by Optimal Brain
            Surgeon, weights by least squares. "amp": the paper's method alone; "random" and "reversed": its controls;
            "energy": the same by activation energy with weighted tokens.
        uniform: "obs" gives all layers the same widths, so that stock transformers loads the result. The others always
            do.
        align: neurons kept in a layer are a multiple of this (32 suits Q4_0 and Q8_0, 256 the K types).
        scope: of the methods by scores: "both" removes heads and neurons in equal shares, as published; "mlp" neurons
            alone.
        corpus: text of what the model will be used for. With it "obs" may drop tokens of the vocabulary too, where that
            costs less than narrowing layers; the tokens to keep are counted on it.
        calibration: a text file or hub dataset; None lets the model write its own.
        seed: seed of self-generated text and of the random control.
        progress: called with (stage, done, total).

    Raises:
        BadInput: anything wrong with the arguments or the model, an `out` that holds something else than an earlier
            result, or a full disk.
        StageFailed: calibration text that does not determine the weights.
    """
    if method not in PRUNERS:
        raise unknown("method", method, PRUNERS)
    check_corpus(corpus, method)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if method == OBS and scope != "both":
        raise BadInput("obs finds the shares of heads and neurons itself", where="--scope", remedy="add --method amp")
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"ratio {ratio:g} is not in [0, 1)", where="--ratio", remedy="for example 0.2")
    if align < 1:
        raise BadInput(f"alignment {align} is not at least 1", where="--align", remedy="for example 32")
    paths = [Path(path).expanduser() for path in corpus]
    if paths:
        read_corpus(paths)  # that it is there
    if calibration is not None:
        text_path(calibration, "--calibration")  # likewise
    out = result_folder(Path(out), PLAN_FILE)
    if not isinstance(model, Model):
        model = load(model, say=None if progress is None else lambda text: progress(text, 0, 0))
    family = model.shape.family
    if scope not in scopes_of(model.shape) and progress:
        progress(
            f"family {family.name} keeps its heads (GGUF {family.gguf_arch} needs them all): neurons go alone", 0, 0
        )
    texts = text_set(
        model,
        calibration,
        count=CALIBRATION_TEXTS if calibration is None else GIVEN_TEXTS,
        length=CALIBRATION_LENGTH,
        seed=seed,
        progress=_stage(progress, "writing calibration text"),
    )
    if method == OBS:
        if progress and (caution := too_few(texts, model.shape)):
            progress(caution, 0, 0)
        source, shape, model_hash = model.folder, model.shape, model.hash
        del model  # layers are read one by one from here on
        return _prune_by_damage(
            source, shape, model_hash, texts, ratio, out, paths, align=align, uniform=uniform, progress=progress
        )
    scores = METHODS[method](cached_scores(model, texts, ENERGY if method == ENERGY else AMP, progress=progress), seed)
    plan = plan_for(model.shape, scores, ratio, align=align, scope=scope)
    prune_checkpoint(model.folder, plan, out, progress=_stage(progress, "writing the checkpoint"))
    return plan


def _prune_by_damage(
    source: Path,
    shape: ModelShape,
    model_hash: str,
    texts: TextSet,
    ratio: float,
    out: Path,
    corpus: Sequence[Path],
    *,
    align: int,
    uniform: bool,
    progress: Progress | None,
) -> PrunePlan:
    """Widths, and with a corpus the vocabulary, by measured damage; compensated on text as the new tokens have it."""
    tell_of_vocabulary(shape, corpus, progress)
    table = cached_damage(source, model_hash, texts, progress=progress)
    vocabulary: tuple[VocabularyOption, ...] = ()
    if corpus:
        vocabulary = vocabulary_damage(source, model_hash, texts, corpus, progress=progress)
    widths, size = widths_for(table, shape, ratio, align=align, uniform=uniform, vocabulary=vocabulary)
    origin = Origin(OBS, ratio, model_hash, texts.hash, shape.parameters)
    tokens = size if size != shape.vocab else None
    return write_pruned(source, texts, widths, tokens, corpus, out, origin=origin, progress=progress)


def write_pruned(
    source: Path,
    texts: TextSet,
    widths: Sequence[LayerShape],
    tokens: int | None,
    corpus: Sequence[Path],
    out: Path,
    *,
    origin: Origin,
    stage: str = "pruning and compensating layers",
    progress: Progress | None = None,
) -> PrunePlan:
    """Write the dense model in `source` with fewer tokens and narrower layers, compensated, to `out`.

    Args:
        source: the dense model's folder.
        texts: calibration text, in the dense model's tokens.
        widths: of each layer.
        tokens: how many to keep; None: all.
        corpus: text on which they are counted.
        out: the folder to write.
        origin: what the plan notes of where it came from.
        stage: its name in `progress`.

    Raises:
        BadInput: a corpus or a checkpoint that does not fit, or a full disk.
        StageFailed: calibration text that does not determine the weights.
    """
    done, how = _stage(progress, stage), Compensation.for_tokens(texts.tokens)
    if tokens is None:
        return prune_compensated(source, windows_of(texts), widths, how, out, origin=origin, progress=done)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.vocabulary.", dir=out.parent) as scratch:
        small = Path(scratch) / "small"
        with_vocabulary(source, corpus, tokens, small, progress=progress)
        # The layers are solved on text as the new tokens have it, for that is what they will read.
        ids = windows_of(retokenized(texts, load_tokenizer(small)))
        return prune_compensated(small, ids, widths, how, out, origin=origin, progress=done)
