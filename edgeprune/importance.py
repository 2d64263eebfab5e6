"""AMP importance: activations projected on the weights that read them (arXiv 2504.21174).

Pure tensor functions first, then one pass over the model that feeds them. Both statistics are sums over tokens, so
they are weighed by tokens and do not depend on how texts are batched; padding never counts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import atomic_folder, read_json, write_json
from edgeprune.models import Model
from edgeprune.shape import ModelShape

SCHEMA_VERSION = 1
_TOKENS_AT_ONCE = 4096  # tokens in one forward pass: enough to fill the matrix units, about 100 MB of activations

Progress = Callable[[int, int], None]


def head_l1(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Σ over tokens of ‖h_n W_n‖₁ for each head n (AMP eq. 8, before the division by the number of tokens).

    Args:
        x: input of the attention output projection, (tokens, heads · head_dim).
        weight: weight of that projection, (hidden, heads · head_dim).
        heads: number of query heads.

    Returns:
        (heads,), float64. One head's (tokens, hidden) product is in memory at a time.
    """
    slices = zip(x.chunk(heads, dim=1), weight.chunk(heads, dim=1), strict=True)
    # The sum over tokens runs in float64: thousands of float32 terms would otherwise depend on their order.
    sums = [(h @ w.T).abs_().sum(dim=1).sum(dtype=torch.float64) for h, w in slices]
    return torch.stack(sums)


def neuron_l1(a: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of |a_m| for each neuron m (AMP eq. 9, before the division by the number of tokens).

    Args:
        a: input of the MLP's down projection, (tokens, neurons).

    Returns:
        (neurons,), float64.
    """
    return a.abs().sum(dim=0, dtype=torch.float64)


@dataclass(frozen=True)
class Scores:
    """Importance of every head and neuron: larger stays longer."""

    heads: tuple[torch.Tensor, ...]  # a layer: (heads,), float64
    neurons: tuple[torch.Tensor, ...]  # a layer: (neurons,), float64
    method: str
    model_hash: str
    text_hash: str
    tokens: int

    def __post_init__(self) -> None:
        if not all(bool(each.isfinite().all()) for each in (*self.heads, *self.neurons)):
            raise StageFailed("the scores are not finite", remedy="the model's weights are damaged, or need float32")

    def save(self, folder: Path) -> None:
        """Write `scores.safetensors` and `scores.json` into `folder`, which is replaced."""
        tensors = {f"heads.{i}": t for i, t in enumerate(self.heads)}
        tensors |= {f"neurons.{i}": t for i, t in enumerate(self.neurons)}
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / "scores.safetensors")
            write_json(
                temporary / "scores.json",
                {
                    "schema_version": SCHEMA_VERSION,
                    "method": self.method,
                    "model_hash": self.model_hash,
                    "text_hash": self.text_hash,
                    "tokens": self.tokens,
                    "layers": len(self.heads),
                },
            )

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            BadInput: absent, broken, or of another schema.
        """
        record = read_json(folder / "scores.json")
        if record.get("schema_version") != SCHEMA_VERSION:
            raise BadInput("scores of another version", where=folder, remedy="delete the folder and score again")
        try:
            with safe_open(folder / "scores.safetensors", framework="pt") as file:
                heads = tuple(file.get_tensor(f"heads.{i}") for i in range(record["layers"]))
                neurons = tuple(file.get_tensor(f"neurons.{i}") for i in range(record["layers"]))
            return cls(heads, neurons, record["method"], record["model_hash"], record["text_hash"], record["tokens"])
        except Exception as error:  # safetensors raises its own Rust exceptions beside KeyError and OSError
            raise BadInput(
                f"broken scores ({error})", where=folder, remedy="delete the folder and score again"
            ) from error


def random_scores(scores: Scores, seed: int) -> Scores:
    """The control that keeps heads and neurons by chance; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.rand(t.shape, generator=generator, dtype=torch.float64) for t in tensors)

    return Scores(
        draw(scores.heads), draw(scores.neurons), f"random:{seed}", scores.model_hash, scores.text_hash, scores.tokens
    )


def reversed_scores(scores: Scores) -> Scores:
    """The control that removes what matters most."""
    return Scores(
        tuple(-t for t in scores.heads),
        tuple(-t for t in scores.neurons),
        f"{scores.method}:reversed",
        scores.model_hash,
        scores.text_hash,
        scores.tokens,
    )


def text_hash(texts: Sequence[torch.Tensor]) -> str:
    """SHA-256 over the token ids of the calibration texts, in their order."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(ids.numel().to_bytes(8, "little"))
        digest.update(ids.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def input_hooks(module: torch.nn.Module, visitors: dict[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """Call `visitors[name]` with the input of the submodule `name` at each forward pass; always removed at the end."""
    handles = []
    try:
        for name, visit in visitors.items():

            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], visit: Callable[..., None] = visit) -> None:
                visit(inputs[0])

            handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(texts: Sequence[torch.Tensor], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Texts, (length,) each, as padded batches of at most `tokens` tokens: ids and mask, both (texts, length).

    Texts of like length go together, so little is padded; padding is on the right, where it cannot be seen by a
    causal model.
    """
    ordered = sorted(texts, key=len, reverse=True)
    while ordered:
        rows = max(1, tokens // len(ordered[0]))
        group, ordered = ordered[:rows], ordered[rows:]
        ids = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True)
        lengths = torch.tensor([len(text) for text in group])
        yield ids, (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()


def _amp_visitors(
    module: torch.nn.Module,
    shape: ModelShape,
    heads: list[torch.Tensor],
    neurons: list[torch.Tensor],
    rows: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Callable[[torch.Tensor], None]]:
    """For each layer, what to do with the input of the output projection and of the down projection."""
    visitors: dict[str, Callable[[torch.Tensor], None]] = {}
    for index, layer in enumerate(shape.layers):

        def visit_neurons(a: torch.Tensor, i: int = index) -> None:
            neurons[i] += neuron_l1(rows(a))

        if layer.neurons:
            visitors[shape.family.in_layer(index, "down")] = visit_neurons
        if not layer.heads:
            continue
        output = shape.family.in_layer(index, "output")
        weight = module.get_submodule(output).weight
        assert isinstance(weight, torch.Tensor)

        def visit_heads(x: torch.Tensor, i: int = index, w: torch.Tensor = weight, n: int = layer.heads) -> None:
            heads[i] += head_l1(rows(x), w, n)

        visitors[output] = visit_heads
    return visitors


@torch.inference_mode()
def amp_scores(
    model: Model,
    texts: Sequence[torch.Tensor],
    *,
    tokens_at_once: int = _TOKENS_AT_ONCE,
    progress: Progress | None = None,
) -> Scores:
    """AMP scores of every head and neuron, in one forward pass over `texts` (token ids, (length,) each).

    Raises:
        BadInput: no tokens.
    """
    texts = [text for text in texts if len(text)]
    total = sum(len(text) for text in texts)
    if not total:
        raise BadInput("no calibration tokens", remedy="give a text that is not empty")
    shape = model.shape
    heads = [torch.zeros(layer.heads, dtype=torch.float64) for layer in shape.layers]
    neurons = [torch.zeros(layer.neurons, dtype=torch.float64) for layer in shape.layers]
    mask = torch.empty(0)

    def rows(x: torch.Tensor) -> torch.Tensor:  # (texts, length, width) -> (real tokens, width)
        return x.flatten(0, 1) if bool(mask.all()) else x[mask.bool()]

    # The body without its language-model head: logits are not needed, and are a fifth of a small model's work.
    body = model.module.get_submodule(shape.family.layers.rpartition(".")[0])
    done = 0
    with input_hooks(model.module, _amp_visitors(model.module, shape, heads, neurons, rows)):
        for ids, mask in batches(texts, tokens_at_once):
            body(input_ids=ids, attention_mask=mask, use_cache=False)
            done += int(mask.sum())
            if progress:
                progress(done, total)
    return Scores(
        tuple(h / total for h in heads),
        tuple(n / total for n in neurons),
        "amp",
        model.hash,
        text_hash(texts),
        total,
    )
