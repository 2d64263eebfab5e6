"""SliceGPT (arXiv 2401.15024): the hidden state, turned onto its principal components, loses the last of them.

Norms are folded into the matrices behind them (an RMSNorm without weights commutes with a rotation, theorem 1). Block
by block, the hidden state's covariance over the calibration text gives a rotation Q; the matrices that read the state
are multiplied by Q, those that write it by Qᵀ, and both are cut to `d` components. Since each block has a Q of its own,
the residual path needs an adapter Qᵀ_old Q_new, d × d, twice a layer. Signals come from the sliced prefix.

No stock runtime has those adapters: `load_sliced` is the loader. A tied head has to be untied, because both ends are
rotated differently; `prune_tied` keeps the shared matrix whole, with an adapter at either end, which costs fewer
parameters where the vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgeprune.calibration import TextSet
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.files import read_json
from edgeprune.models import Model, load
from edgeprune.shape import ModelShape
from rivals.folders import save_folder, tensors_of

KEY = "slicegpt"  # in config.json: {"dense_hidden", "tied"}
STEP = 8  # components kept are a multiple of this, as in the authors' experiments
_TEXTS_AT_ONCE = 8


class SlicedLayer(nn.Module):
    """A stock decoder layer with an adapter on each residual path."""

    def __init__(self, layer: nn.Module, shape: ModelShape, width: int) -> None:
        super().__init__()
        family = shape.family
        self.layer = layer
        self.attention_norm, self.mlp_norm = family.attention_norm, family.mlp_norm
        self.attention, self.mlp = family.output.rpartition(".")[0], family.down.rpartition(".")[0]
        self.attention_adapter = nn.Parameter(torch.eye(width))
        self.mlp_adapter = nn.Parameter(torch.eye(width))

    def attend(self, hidden: torch.Tensor, **stock: Any) -> torch.Tensor:
        """What attention adds: (batch, tokens, width of the output projection)."""
        normed = self.layer.get_submodule(self.attention_norm)(hidden)
        added: torch.Tensor = self.layer.get_submodule(self.attention)(hidden_states=normed, **stock)[0]
        return added

    def think(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP adds: (batch, tokens, width of the down projection)."""
        added: torch.Tensor = self.layer.get_submodule(self.mlp)(self.layer.get_submodule(self.mlp_norm)(hidden))
        return added

    def forward(self, hidden_states: torch.Tensor, **stock: Any) -> torch.Tensor:
        """As a stock decoder layer."""
        hidden = hidden_states @ self.attention_adapter + self.attend(hidden_states, **stock)
        return hidden @ self.mlp_adapter + self.think(hidden)


class AdaptedEmbedding(nn.Module):
    """The whole embedding, then an adapter to the first rotation."""

    def __init__(self, vocab: int, dense: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dense))
        self.adapter = nn.Parameter(torch.empty(dense, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids to (batch, tokens, width)."""
        return nn.functional.embedding(ids, self.weight) @ self.adapter


class AdaptedHead(nn.Module):
    """An adapter back from the last rotation, then the embedding's matrix."""

    def __init__(self, embedding: AdaptedEmbedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.adapter = nn.Parameter(torch.empty_like(embedding.adapter.T))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to logits."""
        return nn.functional.linear(hidden @ self.adapter, self.weight)


def sliced_parameters(shape: ModelShape, width: int, *, tied: bool) -> int:
    """Parameters of the sliced model, adapters included; norms have none, they are constants."""
    layers = shape.layers
    heads = sum(2 * (layer.heads + layer.kv_heads) * shape.head_dim for layer in layers)
    matrices = 3 if shape.family.gate else 2
    inner = heads + sum(matrices * layer.neurons for layer in layers)
    ends = shape.vocab * shape.hidden + 2 * shape.hidden * width if tied else 2 * shape.vocab * width
    return inner * width + 2 * len(layers) * width**2 + ends


def choose_width(shape: ModelShape, ratio: float, *, tied: bool) -> int:
    """The number of components, a multiple of `STEP`, that comes nearest to `ratio`; all of them at ratio 0.

    Raises:
        BadInput: the ratio is out of reach.
    """
    if ratio == 0:
        return shape.hidden
    target = (1 - ratio) * shape.parameters
    options = range(STEP, shape.hidden + 1, STEP)
    width = min(options, key=lambda option: abs(sliced_parameters(shape, option, tied=tied) - target))
    if width == STEP:
        raise BadInput(f"ratio {ratio} leaves no components", remedy="ask for less")
    return width


def principal(blocks: Iterator[torch.Tensor], width: int) -> torch.Tensor:
    """The first `width` eigenvectors of Σ XᵀX by falling eigenvalue: (hidden, width), float64.

    Args:
        blocks: (…, hidden) each.
        width: how many.
    """
    gram = torch.zeros(0)
    for block in blocks:
        rows = block.flatten(0, -2).double()
        gram = rows.T @ rows + (gram if gram.numel() else 0)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]


def check_family(shape: ModelShape) -> None:
    """Raises BadInput for a family whose layer is not two pre-normed residual branches of unfused matrices."""
    family = shape.family
    odd = [name for name in ("attention_post_norm", "mlp_post_norm", "qkv", "gate_up") if getattr(family, name, None)]
    layer_norm = getattr(family, "norm", "rms") != "rms" or getattr(family, "parallel", False)
    if odd or layer_norm or getattr(family, "norm_offset", 0.0):
        raise BadInput(f"SliceGPT is written here for LLaMA's layer, not for family {family.name}")


def _set(module: nn.Module, path: str, weight: torch.Tensor) -> None:
    linear: Any = module.get_submodule(path)
    linear.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)


def _weight(module: nn.Module, path: str) -> torch.Tensor:
    weight = module.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().double()


def _fold_norm(layer: nn.Module, norm: str, readers: list[str], turn: torch.Tensor, scale: float) -> None:
    """Norm weights go into the `readers`, whose inputs are turned by `turn`, (hidden, width); left is a constant."""
    gain = _weight(layer, norm)
    for reader in readers:
        _set(layer, reader, (_weight(layer, reader) * gain) @ turn)
    _set(layer, norm, torch.full((turn.shape[1],), scale))


def _turn_writer(layer: nn.Module, writer: str, turn: torch.Tensor) -> None:
    linear: Any = layer.get_submodule(writer)
    _set(layer, writer, turn.T @ _weight(layer, writer))
    if linear.bias is not None:
        linear.bias = nn.Parameter((linear.bias.detach().double() @ turn).float(), requires_grad=False)


@torch.inference_mode()
def slice_model(model: Model, calibration: TextSet, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and cut every layer of `model` in place, in order; its layers become `SlicedLayer`s.

    Returns:
        The first and the last rotation, (hidden, width) each, float64.

    Raises:
        BadInput: texts of different lengths.
    """
    shape, family, module = model.shape, model.shape.family, model.module
    if len({len(ids) for ids in calibration.begun}) != 1:
        raise BadInput("SliceGPT wants calibration texts of one length")
    body: Any = module.get_submodule(family.layers.rpartition(".")[0])
    layers: Any = module.get_submodule(family.layers)
    ids = torch.stack(list(calibration.begun))
    positions = torch.arange(ids.shape[1])[None]
    stock = {"attention_mask": None, "position_embeddings": body.rotary_emb(torch.zeros(1), positions)}
    # A norm over `width` components divides by their mean square; the dense one divided by that of all.
    scale = (shape.hidden / width) ** 0.5
    state = list(module.get_submodule(family.embedding)(ids).split(_TEXTS_AT_ONCE))  # (texts, length, hidden) each
    first = turn = principal(iter(state), width)
    state = [block @ turn.float() for block in state]
    for index in range(len(shape.layers)):
        sliced = SlicedLayer(layers[index], shape, width)
        layer = sliced.layer
        inputs = [path for path in (family.query, family.key, family.value) if path]
        _fold_norm(layer, family.attention_norm, inputs, turn, scale)
        # In the dense basis, where the next rotation is looked for: (texts, length, hidden).
        state = [block @ turn.T.float() + sliced.attend(block, **stock) for block in state]
        new = principal(iter(state), width)
        state = [block @ new.float() for block in state]
        sliced.attention_adapter.copy_(turn.T @ new)
        _turn_writer(layer, family.output, new)
        turn = new
        _fold_norm(layer, family.mlp_norm, [path for path in (family.gate, family.up) if path], turn, scale)
        state = [block @ turn.T.float() + sliced.think(block) for block in state]
        new = principal(iter(state), width)
        state = [block @ new.float() for block in state]
        sliced.mlp_adapter.copy_(turn.T @ new)
        _turn_writer(layer, family.down, new)
        turn = new
        layers[index] = sliced
    return first, turn


def _prune(folder: Path, ratio: float, calibration: TextSet, out: Path, *, tied: bool) -> Path:
    model = load(folder)
    shape, family = model.shape, model.shape.family
    check_family(shape)
    if tied and not shape.tied:
        raise BadInput("the head is not tied", remedy="use the plain form")
    width = choose_width(shape, ratio, tied=tied)
    dense = tensors_of(folder)
    first, last = slice_model(model, calibration, width)
    layers: Any = model.module.get_submodule(family.layers)
    tensors = {
        f"{family.layers}.{index}.{name}": tensor.detach()
        for index, layer in enumerate(layers)
        for name, tensor in layer.state_dict().items()
    }
    embedding = dense[f"{family.embedding}.weight"].double()
    gain = dense[f"{family.final_norm}.weight"].double()
    tensors[f"{family.final_norm}.weight"] = torch.full((width,), (shape.hidden / width) ** 0.5)
    if tied:
        tensors[f"{family.embedding}.weight"] = embedding
        tensors[f"{family.embedding}.adapter"] = first
        tensors[f"{family.head}.adapter"] = (gain[:, None] * last).T
    else:
        head = dense.get(f"{family.head}.weight", dense[f"{family.embedding}.weight"]).double()
        tensors[f"{family.embedding}.weight"] = embedding @ first
        tensors[f"{family.head}.weight"] = (head * gain) @ last
    config = Checkpoint(folder).config | {
        "hidden_size": width,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": tied,
        KEY: {"dense_hidden": shape.hidden, "tied": tied},
    }
    return save_folder(folder, tensors, config, out)


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """As published: embedding and head are both cut, so a tied head becomes a matrix of its own."""
    return _prune(folder, ratio, calibration, out, tied=False)


def prune_tied(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """The shared embedding stays whole, with an adapter at either end."""
    return _prune(folder, ratio, calibration, out, tied=True)


def load_sliced(folder: Path) -> nn.Module:
    """The float32 torch model of a folder that `prune` or `prune_tied` wrote, in evaluation mode.

    Raises:
        BadInput: not such a folder.
    """
    config = read_json(folder / "config.json")
    if KEY not in config:
        raise BadInput("not a sliced model", where=folder)
    shape = Checkpoint(folder).shape
    family = shape.family
    stock = AutoConfig.from_pretrained(folder, local_files_only=True)
    tied, stock.tie_word_embeddings = config[KEY]["tied"], False
    model = AutoModelForCausalLM.from_config(stock)
    layers: Any = model.get_submodule(family.layers)
    for index in range(len(layers)):
        layers[index] = SlicedLayer(layers[index], shape, shape.hidden)
    if tied:
        embedding = AdaptedEmbedding(shape.vocab, config[KEY]["dense_hidden"], shape.hidden)
        model.set_submodule(family.embedding, embedding)
        model.set_submodule(family.head, AdaptedHead(embedding))
    tensors = tensors_of(folder)
    if tied:
        tensors[f"{family.head}.weight"] = tensors[f"{family.embedding}.weight"]
    model.load_state_dict(tensors)
    module: nn.Module = model.eval()
    return module
