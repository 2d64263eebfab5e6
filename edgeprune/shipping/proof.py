"""The proof that a shipped file loads and says what it should: a stored prompt and the tokens that followed it.

The tokens are chosen greedily by the file itself, in its runtime, when it is shipped. Later the same prompt and answer
are fed to the file again, token by token, and each of its choices is compared. Another instruction set rounds the
activations of a quantised file otherwise, so elsewhere a few choices may differ; where the file was shipped none may.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import read_json, write_json
from edgeprune.host import gather
from edgeprune.recognise import recognise
from edgeprune.reference import machine
from edgeprune.runtimes.isolate import run_isolated
from edgeprune.samples import ask
from edgeprune.shipping.job import Entry

PROOF = "proof.json"
SCHEMA = 1
QUESTION = "Name the capital of France and one thing to see there."
N_TOKENS = 24
TIMEOUT_S = 600.0
LEAST_ELSEWHERE = 0.75  # share of equal choices on another processor
_PACKAGES = {
    "llamacpp": "llama-cpp-python",
    "onnxruntime": "onnxruntime",
    "executorch": "executorch",
    "pytorch": "torch",
}


@dataclass(frozen=True)
class Proof:
    """What one file of a bundle said when it was shipped.

    Attributes:
        path: of the file, or of the folder that a runtime loads, relative to the bundle.
        runtime: what loaded it.
        build: the runtime's package and version.
        machine: where.
        prompt: the text, special tokens spelled out.
        prompt_tokens: its tokens, as many as the context holds beside the answer.
        tokens: those that followed, greedily.
        text: what they say.
    """

    path: str
    runtime: str
    build: str
    machine: str
    prompt: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Verdict:
    """Whether a file still says what it said: how many of its choices are the stored ones."""

    path: str
    equal: int
    total: int
    here: bool  # the same processor and runtime as when it was shipped

    @property
    def ok(self) -> bool:
        """All choices where it was shipped; elsewhere most of them."""
        return self.equal == self.total if self.here else self.equal >= LEAST_ELSEWHERE * self.total


def build(runtime: str) -> str:
    """Package and version of a runtime."""
    package = _PACKAGES[runtime]
    return f"{package} {importlib.metadata.version(package)}"


def _processor() -> str:
    """What tokens may depend on beside the build: virtual machines give processors of many kinds one name."""
    return f"{machine()} ({' '.join(recognise(gather()).isa)})"


def prove(folder: Path, entry: Entry, prompt: str, *, n_ctx: int, stop: Sequence[int], threads: int) -> Proof:
    """Load an entry of a folder in its runtime and let it answer, in a context of at most `n_ctx` tokens.

    Raises:
        BadInput, StageFailed: it does not load, or says nothing.
    """
    path = folder / entry.path
    (found,) = ask(path, entry.runtime, [prompt], n_new=N_TOKENS, n_ctx=n_ctx, stop=stop, threads=threads)
    return Proof(
        entry.path,
        entry.runtime,
        build(entry.runtime),
        _processor(),
        prompt,
        tuple(found["prompt_tokens"]),
        tuple(found["tokens"]),
        found["text"],
    )


def write_proofs(folder: Path, proofs: Sequence[Proof]) -> None:
    """Store proofs beside what they are of."""
    write_json(folder / PROOF, {"schema_version": SCHEMA, "proofs": [asdict(proof) for proof in proofs]})


def _proof(value: dict[str, Any]) -> Proof:
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    proof = Proof(**fields)
    texts = (proof.path, proof.runtime, proof.build, proof.machine, proof.prompt, proof.text)
    if not all(isinstance(each, str) for each in texts):
        raise TypeError("a field that should be text is none")
    if not all(
        isinstance(each, tuple) and all(type(i) is int for i in each) for each in (proof.prompt_tokens, proof.tokens)
    ):
        raise TypeError("a field that should list tokens does not")
    if not proof.tokens:
        raise TypeError("an answer of no tokens proves nothing")
    return proof


def read_proofs(folder: Path) -> list[Proof]:
    """The proofs of a bundle.

    Raises:
        BadInput: there are none, they are unreadable, or name something outside of the folder.
    """
    if not (folder / PROOF).is_file():
        raise BadInput(f"no {PROOF}", where=folder, remedy="give a folder that `edgeprune ship` wrote")
    record = read_json(folder / PROOF)
    try:
        if record["schema_version"] != SCHEMA:
            raise BadInput("proofs of another version", where=folder / PROOF)
        proofs = [_proof(item) for item in record["proofs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"not the proofs of a bundle ({error})", where=folder / PROOF) from error
    for proof in proofs:
        if Path(proof.path).is_absolute() or ".." in Path(proof.path).parts:
            raise BadInput(f"names {proof.path!r}, outside the folder", where=folder / PROOF)
    return proofs


def check(folder: Path, proof: Proof, threads: int) -> Verdict:
    """Let a file of a bundle choose again, after the stored prompt and tokens.

    Raises:
        BadInput, StageFailed: it does not load.
    """
    path = folder / proof.path
    arguments = {
        "path": str(path),
        "runtime": proof.runtime,
        "prompt_tokens": list(proof.prompt_tokens),
        "tokens": list(proof.tokens),
        "threads": threads,
    }
    done = run_isolated("edgeprune.samples:choices", arguments, timeout_s=TIMEOUT_S)
    if done.status != "ok":
        raise StageFailed(f"{done.status}: {done.reason}", where=path)
    found = done.value
    here = (proof.machine, proof.build) == (_processor(), build(proof.runtime))
    equal = sum(a == b for a, b in zip(found, proof.tokens, strict=True))
    return Verdict(proof.path, equal, len(proof.tokens), here)
