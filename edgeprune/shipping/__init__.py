"""From a run to a folder that a target's own loader opens unchanged, and the proof that it does.

A new target is one module with a function `write(job)` and one entry in `TARGETS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.cores import available_cores
from edgeprune.errors import unknown
from edgeprune.files import atomic_folder, read_json, result_folder, write_text
from edgeprune.samples import prompts_for
from edgeprune.shipping.job import BUNDLE_JSON, Entry, Job
from edgeprune.shipping.proof import QUESTION, Verdict, check, prove, read_proofs, write_proofs
from edgeprune.shipping.provenance import PROVENANCE, write_provenance
from edgeprune.shipping.run import Bundle, Run, Say
from edgeprune.sums import changed, write_sums

FOLDER = "ship"  # in the run's folder, where nothing else is said
CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class Target:
    """Where a model can be shipped to.

    Attributes:
        module: in this package; imported when it is shipped to, for some need torch.
        about: one line on what it is for.
        runtime: whose measured file it needs; None: the chosen one's, whatever it is.
        options: what may follow its name.
        function: of the module: writes the folder, and says what in it can be loaded.
    """

    module: str
    about: str
    runtime: str | None = None
    options: tuple[str, ...] = ()
    function: str = "write"

    @property
    def write(self) -> Callable[[Job], list[Entry]]:
        """The function that writes the folder."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        function: Callable[[Job], list[Entry]] = getattr(module, self.function)
        return function


TARGETS: dict[str, Target] = {
    "gguf": Target("to_gguf", "a GGUF file and its settings, for anything built on llama.cpp", "llamacpp"),
    "ollama": Target("to_ollama", "a Modelfile and its GGUF file: ollama create NAME -f Modelfile", "llamacpp"),
    "onnxruntime-genai": Target("to_genai", "a folder for onnxruntime-genai's Model()", "onnxruntime"),
    "transformers.js": Target(
        "to_transformers_js", "graphs for the browser and Node, with a page", options=("q4", "q8", "fp16")
    ),
    "huggingface": Target("to_huggingface", "safetensors and a model card, for transformers and the hub"),
    "android": Target(
        "to_mobile", "assets and a loader for an Android app", "llamacpp", ("gguf", "onnx"), "write_android"
    ),
    "ios": Target("to_mobile", "resources and a loader for an iOS app", "llamacpp", ("gguf", "onnx"), "write_ios"),
    "executorch": Target("to_executorch", "a program for ExecuTorch's text runner", options=("int4", "int8")),
}


def needed_runtime(to: str) -> str | None:
    """The runtime whose measured file a target with its options needs; None: that of the chosen one, whatever it is."""
    name, _, options = to.partition(":")
    # A graph for an app is made of the weights of what was chosen, whatever runs that.
    return None if options == "onnx" else TARGETS[name].runtime


def ship(
    run: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    threads: int | None = None,
    say: Say | None = None,
) -> Path:
    """Write what a run chose for a target, load it there in a process of its own, and store what it said.

    The folder appears when all of that went well; the same run gives the same bytes.

    Args:
        run: the folder that `fit` wrote.
        to: a name in `TARGETS`, and its options after a colon: "transformers.js:q4".
        out: folder to write; default: `ship/TARGET` in the run's.
        model: where the dense model is, if no longer where the run has it from.
        threads: of runtimes here; default: all cores.
        say: told what is being done.

    Raises:
        BadInput: an unknown target or option, no run, or a run that lacks what the target needs.
        StageFailed: what was written does not load.
    """
    name, _, options = to.partition(":")
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    target = TARGETS[name]
    say = say or (lambda _text: None)
    opened = Run.open(Path(run), model)
    bundle = opened.bundle(needed_runtime(to))
    out = result_folder(Path(out) if out is not None else opened.folder / FOLDER / name, PROVENANCE)
    threads = threads or available_cores()
    with atomic_folder(out) as temporary:
        wanted = tuple(word.strip() for word in options.split(",") if word.strip())
        job = Job(opened, bundle, temporary, wanted, threads, say)
        job.choose(target.options)
        entries = target.write(job)
        if not (temporary / "README.md").exists():
            write_text(temporary / CARD, _card(bundle, temporary))
        write_provenance(opened, bundle, name, temporary)
        say(f"proving {name}")
        _write_proofs(temporary, bundle, entries, threads)
        write_sums(temporary)
    return out


def _card(bundle: Bundle, folder: Path) -> str:
    """The bundle's model card, and whose figures it has where the files in `folder` are others."""
    card = (bundle.folder / CARD).read_text(encoding="utf-8")
    facts = bundle.facts
    written = [read_json(path) for path in folder.rglob(BUNDLE_JSON)]
    if all(found[key] == facts[key] for found in written for key in ("runtime", "quantisation")):
        return card
    return (
        f"{card.rstrip()}\n\nThe figures above are of {facts['model_file']}, {facts['quantisation']} on "
        f"{facts['runtime']}. The files here were made of the same weights in another form; what was measured of "
        "them is in bundle.json.\n"
    )


def _write_proofs(folder: Path, bundle: Bundle, entries: Sequence[Entry], threads: int) -> None:
    (prompt,) = prompts_for(bundle.folder, [QUESTION])
    n_ctx = int(bundle.facts["n_ctx"])
    write_proofs(
        folder, [prove(folder, entry, prompt, n_ctx=n_ctx, stop=bundle.eos, threads=threads) for entry in entries]
    )


@dataclass(frozen=True)
class Verification:
    """What was found of a bundle.

    Attributes:
        changed: a line for each file that is not as it was written.
        verdicts: of each file that a runtime loads; empty where files were changed, which are not loaded then.
    """

    changed: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was changed and every file says what it said."""
        return not self.changed and all(verdict.ok for verdict in self.verdicts)


def verify(bundle: str | Path, *, threads: int | None = None, say: Say | None = None) -> Verification:
    """Compare a shipped folder with its hashes, load each of its files in a process of its own, and let it answer.

    Raises:
        BadInput: not a folder that `ship` wrote.
        StageFailed: a file does not load.
    """
    folder = Path(bundle)
    if differences := changed(folder):
        return Verification(tuple(differences), ())
    verdicts = []
    for proof in read_proofs(folder):
        if say:
            say(f"loading {proof.path} in {proof.runtime}")
        verdicts.append(check(folder, proof, threads or available_cores()))
    return Verification((), tuple(verdicts))
