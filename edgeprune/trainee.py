"""Which weights of a model are trained, and how they go back into its checkpoint: all of them, or low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import missing_extra
from edgeprune.runtimes.pytorch import load_model
from edgeprune.training import Decoder
from edgeprune.weights import Change, write_like

_ADAPTER = "default"


@dataclass(frozen=True)
class LowRank:
    """LoRA (arXiv 2106.09685) on every projection: W + (alpha / rank) · B A. The defaults are AMP's."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


class Trainee:
    """A student in training: its decoder in the number format of the products, float32 masters of what is trained.

    Args:
        folder: the student's checkpoint.
        dtype: number format of the products.
        device: where it is trained.
        length: tokens in a window.
        low_rank: train low-rank updates of the projections; None trains the weights themselves.
        train_embedding: train embedding and head, not the layers alone.

    Raises:
        BadInput: a broken checkpoint, or `peft` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        length: int,
        low_rank: LowRank | None,
        train_embedding: bool,
    ) -> None:
        model = load_model(folder).to(device)
        self._folder = folder
        self._prefix = f"{model.base_model_prefix}."
        # Before adapters change names; the names of tied tensors lead to one parameter.
        self._places = dict(model.state_dict(keep_vars=True))
        self._low_rank = low_rank
        if low_rank is not None:
            _add_adapters(model, low_rank)
        elif not train_embedding:
            model.get_input_embeddings().requires_grad_(False)
            # An untied head as well: both cost the optimizer most and are what pruning leaves alone.
            model.get_output_embeddings().requires_grad_(False)
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        self.decoder = Decoder(model.train(), dtype, length)

    @property
    def trained(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters.values())

    def write(self, masters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the student's folder again into `folder`, with the trained values `masters`.

        Raises:
            BadInput, StageFailed: as `write_like`.
        """
        changes = self._replaced(masters) if self._low_rank is None else self._merged(masters)
        write_like(self._folder, changes, folder, prefix=self._prefix)

    def _replaced(self, masters: Mapping[str, Tensor]) -> dict[str, Change]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        changes: dict[str, Change] = {}
        for place, value in self._places.items():
            name = names.get(id(value))
            # A tied head has a place of its own only in some folders; the embedding's place is in all.
            if name is not None and (place == name or self._in_folder(place)):
                changes[place] = lambda _, new=masters[name]: new  # type: ignore[misc]
        return changes

    def _in_folder(self, place: str) -> bool:
        return place in Checkpoint(self._folder)

    def _merged(self, masters: Mapping[str, Tensor]) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.data = masters[name]  # float32: a sum in bfloat16 would lose most of the update
            for path, module in self.decoder.model.named_modules():
                if hasattr(module, "get_delta_weight") and _ADAPTER in module.lora_A:
                    delta = module.get_delta_weight(_ADAPTER)
                    changes[f"{path}.weight"] = lambda old, delta=delta: old + delta.cpu()  # type: ignore[misc]
        return changes


def _add_adapters(model: Any, low_rank: LowRank) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise missing_extra("peft", "recover") from error
    head = model.get_output_embeddings()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    config = LoraConfig(
        r=low_rank.rank, lora_alpha=low_rank.alpha, lora_dropout=low_rank.dropout, target_modules=targets, bias="none"
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
