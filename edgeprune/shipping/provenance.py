"""Where a shipped model comes from: weights, plan, data, versions, and the command that makes it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from edgeprune.files import write_json, write_text
from edgeprune.models import copy_files, licences, public_name, terms
from edgeprune.shipping.run import Bundle, Run

PROVENANCE = "provenance.json"
SCHEMA = 1


def provenance(run: Run, bundle: Bundle, target: str) -> dict[str, Any]:
    """Everything the weights of a bundle depend on; the same for the same run."""
    record, facts = run.record, bundle.facts
    return {
        "schema_version": SCHEMA,
        "target": target,
        "base_model": {
            "name": public_name(str(record["model"]["name"])),
            **{key: record["model"][key] for key in ("sha256", "parameters")},
            "licence": facts["licence"],
        },
        "plan": facts["plan"],
        "quantisation": facts["quantisation"],
        "data": {
            # Text that the model wrote is under no other terms than the model.
            "calibration": _data(record["calibration"]),
            "recovery": {"seconds": facts["plan"]["recovery_s"], **_data(record["calibration"])}
            if facts["plan"]["recovery_s"]
            else None,
            "tokens_counted_on": facts["tokens_counted_on"],
            "judged_on": facts["judged_on"],
        },
        "made_by": record["environment"],
        "command": _without_places(record["commands"]["again"]),
    }


def _without_places(command: str) -> str:
    """A command without folders and addresses of the machine it was given on, which are nobody else's business."""
    words = [
        "ssh://…" if "://" in word else Path(word).name if word[:1] in "./~" or Path(word).exists() else word
        for word in shlex.split(command)
    ]
    return shlex.join(words)


def _data(source: dict[str, Any]) -> dict[str, Any]:
    from edgeprune.calibration import SELF_GENERATED

    own = str(source["source"]).startswith(SELF_GENERATED)
    return {
        **source,
        "source": source["source"] if own else public_name(str(source["source"])),
        "licence": "as the base model's: it wrote the text" if own else source.get("licence") or "not stated",
    }


def write_licence(run: Run, bundle: Bundle, out: Path) -> None:
    """The base model's licence file where it came with one, else a note that names the licence."""
    licence = bundle.facts["licence"]
    copy_files(bundle.folder, out, terms(bundle.folder))
    if licences(out):
        return
    named = f"under the licence {licence!r}" if licence else "and its files do not say under which licence"
    write_text(
        out / "LICENSE",
        f"This model was made from {public_name(str(run.record['model']['name']))}, published {named}.\n"
        "The terms of that model go on to apply to this one.\n",
    )


def write_provenance(run: Run, bundle: Bundle, target: str, out: Path) -> None:
    """Write provenance.json and the licence into a target's folder."""
    write_json(out / PROVENANCE, provenance(run, bundle, target))
    write_licence(run, bundle, out)
