"""Target `huggingface`: safetensors, config, tokenizer and model card, as a repository of the hub has them."""

from __future__ import annotations

from pathlib import Path

from edgeprune.checkpoint import GGUF_TOKENIZER, WEIGHTS, Checkpoint
from edgeprune.errors import BadInput, missing_extra
from edgeprune.fetch import DEMO_MODELS
from edgeprune.files import read_json, write_json, write_text
from edgeprune.models import CARD, CODE_KEYS, HUB_ID, companions
from edgeprune.per_layer import KEY
from edgeprune.shipping.job import Entry, Job


def write(job: Job) -> list[Entry]:
    """The checkpoint that the measured file was made of, and its model card."""
    source = job.checkpoint
    config = {key: value for key, value in read_json(source / "config.json").items() if key not in CODE_KEYS}
    write_json(job.out / "config.json", config)
    weights = [path.name for path in Checkpoint(source).files]
    job.copy(*weights, f"{WEIGHTS}.index.json", *companions(source), source=source)
    (job.out / GGUF_TOKENIZER).unlink(missing_ok=True)  # for edgeprune alone; tokenizer.json says the same
    job.copy("prune_plan.json")
    job.write_bundle_json(".", runtime="pytorch", quantisation=None)
    write_text(job.out / CARD, _card(job, per_layer=KEY in config))
    return [Entry(".", "pytorch")]


def _card(job: Job, *, per_layer: bool) -> str:
    """The bundle's model card, with what the hub reads at its head and what differs for the weights unquantised."""
    text = (job.bundle.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    head, _, body = text.removeprefix("---\n").partition("---\n")
    head += "library_name: transformers\npipeline_tag: text-generation\n"
    name = str(job.run.record["model"]["name"])
    base = DEMO_MODELS[name].hub_id if name in DEMO_MODELS else name
    if HUB_ID.fullmatch(base) and not Path(base).exists():  # a folder here tells others nothing
        head += f"base_model: {base}\n"
    notes = [
        f"These are the weights unquantised. The figures above are of {job.bundle.facts['model_file']}, "
        f"{job.bundle.facts['quantisation']}, which was made of them.",
    ]
    if per_layer:
        notes.append(
            "Layers differ in width (`per_layer_config`), which stock `from_pretrained` does not build yet:\n\n"
            "```python\nfrom edgeprune import load_checkpoint\n\nmodel = load_checkpoint(folder)\n```"
        )
    return f"---\n{head}---\n{body.rstrip()}\n\n" + "\n\n".join(notes) + "\n"


def push(folder: Path, repository: str) -> str:
    """Upload a shipped folder to a repository of the hub, made private if it is new; its address.

    Raises:
        BadInput: no login, or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise missing_extra("huggingface_hub", "prune") from error
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        # Files of an earlier upload, under other names, would be loaded before these.
        stale = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "SHA256SUMS"]
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="edgeprune ship", delete_patterns=stale
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise BadInput(
            f"the hub did not take it ({line})",
            where=repository,
            remedy="log in with `hf auth login`, and check the name",
        ) from error
    return f"https://huggingface.co/{repository}"
