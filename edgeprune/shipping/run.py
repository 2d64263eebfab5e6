"""A finished run of `fit`: its record, its bundles, and the checkpoints they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import CHECKPOINTS
from edgeprune.bundle import SCHEMA_VERSION as BUNDLE_SCHEMA
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.files import read_json
from edgeprune.models import checkpoint_folder, resolve
from edgeprune.record import SCHEMA_VERSION as RECORD_SCHEMA
from edgeprune.record import TRIALS
from edgeprune.sums import changed

Say = Callable[[str], None]

# What to add to `fit` for a run to have a bundle of a runtime.
_QUANT = {"llamacpp": "Q4_0", "onnxruntime": "int4"}


@dataclass(frozen=True)
class Bundle:
    """A folder with a measured model file: `best`, or the best of another runtime.

    Attributes:
        folder: where it is.
        facts: what its bundle.json says.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def runtime(self) -> str:
        """The runtime that its file was measured in."""
        return str(self.facts["runtime"])

    @property
    def model(self) -> Path:
        """The model file."""
        return self.folder / str(self.facts["model_file"])

    @property
    def eos(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return [int(token) for token in self.facts["eos_token_ids"]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: what `fit --out` named.
        record: its fit.json.
        model: where the dense model is now, as `models.resolve` takes it.
    """

    folder: Path
    record: Mapping[str, Any]
    model: str

    @classmethod
    def open(cls, folder: Path, model: str | None = None) -> Run:
        """Read a run; `model` says where the dense model is, if no longer where the record says.

        Raises:
            BadInput: no run, one that did not finish, or one of another version.
        """
        if not (folder / "fit.json").is_file():
            unfinished = (folder / TRIALS).is_file()
            raise BadInput(
                "this run did not finish" if unfinished else "no fit.json, so no run",
                where=folder,
                remedy="run `edgeprune fit` again" if unfinished else "give the folder that `edgeprune fit` wrote",
            )
        record, again = read_json(folder / "fit.json"), "run `edgeprune fit` again"
        if record.get("schema_version") != RECORD_SCHEMA:
            raise BadInput(
                f"a record of version {record.get('schema_version')!r}, this edgeprune reads {RECORD_SCHEMA}",
                where=folder / "fit.json",
                remedy=again,
            )
        try:
            return cls(folder, record, model or str(record["model"].get("path") or record["model"]["name"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput("does not say of which model it is", where=folder / "fit.json", remedy=again) from error

    def bundle(self, runtime: str | None = None) -> Bundle:
        """What was chosen, or the best for a runtime; its files are the ones that were measured.

        Raises:
            BadInput: the run has none for that runtime, or its files were changed since.
        """
        for folder in (self.folder / "best", *sorted(self.folder.glob("best-*"))):
            if not (folder / "bundle.json").is_file():
                continue
            facts = read_json(folder / "bundle.json")
            if runtime is not None and facts.get("runtime") != runtime:
                continue
            if facts.get("schema_version") != BUNDLE_SCHEMA or "checkpoint" not in facts:
                raise BadInput("written by another version", where=folder, remedy="run `edgeprune fit` again")
            if differences := changed(folder):
                raise BadInput(
                    f"not what was measured: {'; '.join(differences[:3])}", where=folder, remedy="run fit again"
                )
            return Bundle(folder, facts)
        raise BadInput(
            f"nothing in it runs on {runtime}",
            where=self.folder,
            remedy=f"run fit with a quantisation that does (--quant {_QUANT.get(str(runtime), '…')})",
        )

    def dense(self, say: Say | None = None) -> Path:
        """The dense model's checkpoint.

        Raises:
            BadInput: it is no longer there, or another one.
        """
        try:
            source = resolve(self.model, say=say)
        except BadInput as error:
            told = f"the dense model cannot be had ({error.what})"
            raise BadInput(told, where=self.model, remedy="say with --model where it is") from error
        folder = checkpoint_folder(source, say=say)
        if Checkpoint(folder).hash() != self.record["model"]["sha256"]:
            raise BadInput("not the model that was fitted", where=self.model, remedy="name that one with --model")
        return folder

    def checkpoint(self, bundle: Bundle, say: Say | None = None) -> Path:
        """The checkpoint that a bundle's file was exported from.

        Raises:
            BadInput: it is no longer there.
        """
        name = bundle.facts["checkpoint"]
        if name is None:
            return self.dense(say)
        folder = self.folder / CHECKPOINTS / Path(str(name)).name
        if not folder.is_dir():
            raise BadInput("the pruned weights are no longer there", where=folder, remedy="run `edgeprune fit` again")
        return folder
