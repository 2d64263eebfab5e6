"""What the writer of every target gets and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, EdgepruneError, unknown
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.models import copy_files
from edgeprune.quality import evaluate
from edgeprune.shipping.run import Bundle, Run, Say

BUNDLE_JSON = "bundle.json"
TIMEOUT_S = 1800.0  # of measuring a file


@dataclass(frozen=True)
class Entry:
    """Something in the written folder that a runtime loads.

    Attributes:
        path: relative to the folder.
        runtime: which one.
    """

    path: str
    runtime: str


@dataclass(frozen=True)
class Job:
    """One shipment.

    Attributes:
        run: the run it comes from.
        bundle: the measured bundle that it is, or is made from the weights of.
        out: the folder to write into; it becomes the target's when all is well.
        options: what followed the target's name, by commas: "q4" of "transformers.js:q4".
        threads: of runtimes here.
        say: told what is being done.
    """

    run: Run
    bundle: Bundle
    out: Path
    options: tuple[str, ...] = ()
    threads: int = 1
    say: Say = field(default=lambda _text: None)

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint that the bundle's file was exported from."""
        return self.run.checkpoint(self.bundle, self.say)

    def copy(self, *names: str, source: Path | None = None) -> list[str]:
        """Copy files of the bundle, or of another folder, of those names that are there; their names."""
        return copy_files(source or self.bundle.folder, self.out, names)

    def write_bundle_json(self, model_file: str, **more: Any) -> None:
        """Write what an app has to know, with the name that the model file has in this target.

        Another runtime's or quantisation's file is not the measured one: of its figures only those in `more` are told.
        """
        facts = {**self.bundle.facts, "model_file": model_file, **more}
        if any(facts[key] != self.bundle.facts[key] for key in ("runtime", "quantisation")):
            facts |= {"predicted": None, "memory_need_mib": None, "settings": {}, "measured": more.get("measured")}
        write_json(self.out / BUNDLE_JSON, facts)

    def graph_facts(self, path: str, runtime: str) -> dict[str, Any]:
        """What is known of a file made here: its bytes, and its quality where the run's reference is still there."""
        file = self.out / path
        size = sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*"))
        reference = cache_dir() / "references" / str(self.run.record["held_out"]["reference"])
        facts: dict[str, Any] = {"file": path, "bytes": size, "measured": None}
        if not (reference / "reference.json").is_file() or self.bundle.facts["tokens_counted_on"]:
            return facts
        self.say(f"measuring {file.name}")
        try:
            quality = evaluate(file, reference, runtime=runtime, threads=self.threads, timeout_s=TIMEOUT_S)
        except EdgepruneError as error:
            self.say(f"{file.name} could not be measured: {error}")
            return facts
        kl, top1 = quality.kl_nats, quality.top1
        measured = {
            "on": quality.measured_on.machine,
            "runtime": quality.measured_on.runtime,
            "kl_nats": [kl.mean, kl.low, kl.high],
            "top1": [top1.mean, top1.low, top1.high],
            "bits_per_byte": quality.bits_per_byte,
        }
        return facts | {"measured": measured}

    def choose(self, known: Sequence[str]) -> tuple[str, ...]:
        """The options asked for, which must be among `known`; without any, all of them.

        Raises:
            BadInput: an option is unknown.
        """
        if self.options and not known:
            raise BadInput(f"this target takes no options, found {', '.join(self.options)}")
        for option in self.options:
            if option not in known:
                raise unknown("option of this target", option, known)
        return self.options or tuple(known)

    def option(self, default: str) -> str:
        """The one option asked for; `default` without any.

        Raises:
            BadInput: several.
        """
        if len(self.options) > 1:
            raise BadInput(f"one kind of file goes into one folder, found {', '.join(self.options)}")
        return self.options[0] if self.options else default


def generation_facts(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's generation_config.json, or its config's special tokens."""
    path = checkpoint / "generation_config.json"
    if path.is_file():
        return read_json(path)
    config = read_json(checkpoint / "config.json")
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
