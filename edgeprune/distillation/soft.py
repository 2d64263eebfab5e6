"""`soft`: embeddings that no text has, with soft labels, made by training through training.

The first generation of dataset distillation (Wang et al. 2018; soft labels: Sucholutsky & Schonlau 2019): what a
learner is trained on is itself a parameter. A few steps of gradient descent on it are unrolled, the learner they lead
to is judged on real texts, and that loss is differentiated through the steps:

    θ_{k+1} = θ_k - η ∇_θ CE(softmax(y), f_θ_k(x)),    min over x, y, η of CE(labels, f_θ_K(real)).

The result trains one model only, the one it was made with, and cannot be read; it is the control for text that can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from edgeprune.attention import set_attention
from edgeprune.distillation.base import Order
from edgeprune.errors import BadInput
from edgeprune.families import family_for
from edgeprune.files import atomic_file
from edgeprune.runtimes.pytorch import bos_of, load_model, load_tokenizer

Parameters = dict[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a layer


class Learner(Protocol):
    """A classifier that reads embeddings."""

    def start(self, generator: torch.Generator) -> Parameters:
        """What is trained, before training."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, (n, length) -> (n, length, hidden)."""
        ...

    def features(self, embeddings: Tensor) -> Any:
        """What the parameters read of embeddings, (n, length, hidden): the same in all steps of training."""
        ...

    def logits(self, parameters: Parameters, features: Any, mask: Tensor) -> Tensor:
        """Logits, (n, classes), of features of embeddings where `mask`, (n, length), is 1."""
        ...


@dataclass(frozen=True)
class SoftSettings:
    """How soft data are made.

    Attributes:
        length: embeddings of one datum.
        steps: of optimising the data.
        inner: steps of training that are unrolled.
        rate: of the data, for Adam.
        inner_rate: where the learned rate of training starts.
        batch: real texts that a learner is judged on in one step.
    """

    length: int = 16
    steps: int = 60
    inner: int = 5
    rate: float = 0.02
    inner_rate: float = 0.1
    batch: int = 32


@dataclass(frozen=True)
class SoftSet:
    """Synthetic data: embeddings (n, length, hidden), logits of their labels (n, classes), the rate to train with."""

    embeddings: Tensor
    labels: Tensor
    rate: float

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        with atomic_file(path) as temporary:
            save_file(
                {"embeddings": self.embeddings, "labels": self.labels, "rate": torch.tensor([self.rate])}, temporary
            )

    @classmethod
    def load(cls, path: Path) -> SoftSet:
        """Read what `save` wrote.

        Raises:
            BadInput: no such file.
        """
        try:
            found = load_file(path)
            return cls(found["embeddings"], found["labels"], float(found["rate"][0]))
        except (OSError, SafetensorError, KeyError) as error:
            raise BadInput(f"not a set of soft data ({error})", where=path) from error


def train(learner: Learner, data: SoftSet, steps: int, generator: torch.Generator) -> Parameters:
    """The learner's parameters after `steps` of gradient descent on soft data."""
    return _trained(learner, learner.start(generator), data.embeddings, data.labels, torch.tensor(data.rate), steps)


def _trained(
    learner: Learner, parameters: Parameters, embeddings: Tensor, labels: Tensor, rate: Tensor, steps: int
) -> Parameters:
    mask = torch.ones(embeddings.shape[:2])
    unrolled = embeddings.requires_grad or labels.requires_grad
    features = learner.features(embeddings)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(learner.logits(parameters, features, mask), labels.softmax(-1))
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=unrolled)
        parameters = {
            name: value - rate * gradient if unrolled else (value - rate * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
    return parameters


def optimise(
    learner: Learner,
    texts: Sequence[Tensor],
    labels: Tensor,
    per_class: int,
    settings: SoftSettings,
    *,
    seed: int,
    say: Callable[[int, int], None] | None = None,
) -> SoftSet:
    """Soft data for a learner.

    Args:
        learner: what is trained on them.
        texts: token ids of real texts, (length,) each.
        labels: their classes, (n,).
        per_class: data a class.
        settings: how.
        seed: of the start and of the order of real texts.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    chosen = [i for c in range(classes) for i in _drawn((labels == c).nonzero()[:, 0], per_class, generator).tolist()]
    ids, _ = padded([texts[i] for i in chosen], settings.length)
    embeddings = learner.embed(ids).detach().clone().requires_grad_()
    own = torch.nn.functional.one_hot(labels[chosen], classes).float()
    soft = (4 * own).requires_grad_()  # a softmax that is nearly, not wholly, certain
    log_rate = torch.tensor(settings.inner_rate).log().requires_grad_()
    groups: list[dict[str, Any]] = [
        {"params": [embeddings], "lr": settings.rate * float(embeddings.detach().std())},
        {"params": [soft, log_rate]},
    ]
    optimizer = torch.optim.Adam(groups, lr=settings.rate)
    for step in range(settings.steps):
        rows = torch.randint(len(texts), (settings.batch,), generator=generator)
        real, mask = padded([texts[int(i)] for i in rows], max(len(texts[int(i)]) for i in rows))
        start = learner.start(generator)
        after = _trained(learner, start, embeddings, soft, log_rate.exp(), settings.inner)
        features = learner.features(learner.embed(real))
        loss = torch.nn.functional.cross_entropy(learner.logits(after, features, mask), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([embeddings, soft, log_rate], 1.0)
        optimizer.step()
        if say:
            say(step + 1, settings.steps)
    return SoftSet(embeddings.detach(), soft.detach(), float(log_rate.detach().exp()))


def _drawn(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return members[torch.randperm(len(members), generator=generator)[:count]]


def padded(texts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Token ids cut or filled to (n, length), and where they are real: (n, length)."""
    ids, mask = torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text[:length]
        mask[row, : len(text)] = 1
    return ids, mask


def make(order: Order) -> SoftSet:
    """Soft data for the dense model with a classifier on top.

    Raises:
        BadInput: the source has no labels.
    """
    pool = order.pool
    if pool.labels is None or order.quota.count is None:
        raise BadInput("soft data are for texts with labels", remedy="use --per-class and --label-field")
    settings = SoftSettings()
    bos = bos_of(load_tokenizer(order.model))
    first = [] if bos is None else [bos]
    room = 4 * settings.length - len(first)
    texts = [torch.tensor([*first, *pool.ids(i)[:room].tolist()]) for i in range(len(pool))]
    learner = DecoderLearner(load_model(order.model), len(pool.classes))
    labels = torch.from_numpy(pool.labels)

    def say(done: int, total: int) -> None:
        order.say("optimising soft data", done, total)

    return optimise(learner, texts, labels, order.quota.count, settings, seed=order.seed, say=say)


class DecoderLearner:
    """A causal language model with a linear classifier on its mean last hidden state; its last layers are trained.

    Args:
        model: of transformers.
        classes: of the texts.
        depth: last layers that are trained beside the classifier, one at least.
    """

    def __init__(self, model: Any, classes: int, depth: int = 1) -> None:
        # Only the plain attention can be differentiated twice.
        set_attention(model, "eager")
        self._body = model.get_decoder().requires_grad_(False)
        self._table = model.get_input_embeddings()
        self._classes, self._hidden = classes, int(model.config.get_text_config().hidden_size)
        family = family_for(model.config.model_type)
        layers = model.get_submodule(family.layers)
        self._layers = {str(i): layers[i] for i in range(len(layers) - depth, len(layers))}
        self._norm = model.get_submodule(family.final_norm)

    def start(self, generator: torch.Generator) -> Parameters:
        """The model's own layers and a small random classifier."""
        weight = 0.02 * torch.randn(self._classes, self._hidden, generator=generator)
        found = {"head.weight": weight, "head.bias": torch.zeros(self._classes)}
        for index, layer in self._layers.items():
            found |= {f"{index}.{name}": value for name, value in layer.named_parameters()}
        return {name: value.detach().clone().requires_grad_() for name, value in found.items()}

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        found: Tensor = self._table(ids)
        return found.detach()

    def features(self, embeddings: Tensor) -> list[Call]:
        """What the trained layers are called with; the first call has the hidden states before them all."""
        calls: list[Call] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
            for layer in self._layers.values()
        ]
        try:
            self._body(inputs_embeds=embeddings, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def logits(self, parameters: Parameters, features: list[Call], mask: Tensor) -> Tensor:
        """The classifier on the mean state, each brought to unit mean square."""
        hidden: Tensor = features[0][0][0]
        for (index, layer), (_, call) in zip(self._layers.items(), features, strict=True):
            stem = f"{index}."
            own = {name.removeprefix(stem): value for name, value in parameters.items() if name.startswith(stem)}
            after = functional_call(layer, own, (hidden,), call)
            hidden = after[0] if isinstance(after, tuple) else after
        hidden = self._norm(hidden)
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        mean = mean / mean.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
        return torch.nn.functional.linear(mean, parameters["head.weight"], parameters["head.bias"])
