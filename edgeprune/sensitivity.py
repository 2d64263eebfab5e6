"""How much each weight matters to what the model says: the diagonal of the Fisher information, in one pass.

A change δ of the weights costs KL(model ‖ changed model) ≈ ½ δᵀ F δ nats a token, F being the Fisher information of the
next-token distribution. Rounding errors are nearly independent of each other, so its diagonal is what counts for them
(LeCun et al., Optimal Brain Damage, 1989; used for quantisation by SqueezeLLM, arXiv 2306.07629).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeprune.errors import BadInput
from edgeprune.export.gguf_deci import is_filler
from edgeprune.export.gguf_layout import Source, module_name, source
from edgeprune.export.gguf_types import tensors
from edgeprune.importance import Progress
from edgeprune.models import Model


def outer_squares(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of g_r² x_c²: the Fisher diagonal of a weight with inputs x, were each token a sample of its own.

    Args:
        gradient: of the log-likelihood by the weight's output, (tokens, rows).
        x: the weight's input, (tokens, columns).

    Returns:
        (rows, columns), float32.
    """
    return gradient.square().T @ x.square()


def fisher_diagonal(
    model: Model, texts: Sequence[torch.Tensor], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """The mean over tokens of each weight's squared gradient, by its name in a GGUF file: (rows, columns) each.

    Rows are in the checkpoint's order (`gguf_layout.paired_heads` tells which are not in the file's).

    The labels are drawn from the model's own distribution, which makes it the Fisher information and not a property
    of the text's words. A tied embedding's entry sums what it does as embedding and as head; an untied embedding has
    only the former.

    Args:
        model: the model; its parameters are not changed.
        texts: token ids, (length,) each; one at a time is in memory.
        seed: of the labels.
        progress: called with tokens done and all.

    Raises:
        BadInput: no tokens.
    """
    texts = [text for text in texts if len(text)]
    total = sum(len(text) for text in texts)
    if not total:
        raise BadInput("no calibration tokens", remedy="give a text that is not empty")
    shape, module = model.shape, model.module
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, list[str]] = {}  # a fused matrix of the checkpoint can be several in the file
    for t in tensors(shape):
        if t.name.startswith("blk.") and len(t.shape) > 1 and not is_filler(t.name, shape):
            names.setdefault(module_name(t.name, shape).removesuffix(".weight"), []).append(t.name)
    rows = {t.name: t.shape[0] for t in tensors(shape)}
    embedding: Any = module.get_submodule(shape.family.embedding)
    head: Any = embedding if shape.tied else module.get_submodule(shape.family.head)
    # Gemma's embeddings are scaled, in Gemma 3 by the embedding's own module, whose output is differentiated by.
    scale = float(getattr(embedding, "embed_scale", 1.0))
    head_name = "token_embd.weight" if shape.tied else "output.weight"
    body = module.get_submodule(shape.family.layers.rpartition(".")[0])
    found: dict[str, torch.Tensor] = {"token_embd.weight": torch.zeros_like(embedding.weight, dtype=torch.float32)}
    found.setdefault(head_name, torch.zeros_like(head.weight, dtype=torch.float32))
    inputs: dict[str, torch.Tensor] = {}

    def add(name: str, amount: torch.Tensor) -> None:
        found[name] = found[name] + amount if name in found else amount

    def keep_input(path: str) -> Any:
        return lambda _module, given: inputs.__setitem__(path, given[0].detach()[0])

    def use_gradient(path: str) -> Any:
        def use(_module: Any, _in: Any, out: tuple[torch.Tensor, ...]) -> None:
            found_here = outer_squares(out[0][0], inputs.pop(path))
            for name in names[path]:
                add(name, _part(found_here, source(name, shape), rows[name]))

        return use

    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    handles = []
    try:
        module.requires_grad_(False)  # gradients flow through the activations alone: half of the work
        for path in names:
            layer = module.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(keep_input(path)))
            handles.append(layer.register_full_backward_hook(use_gradient(path)))
        done = 0
        for text in texts:
            embedded = embedding(text[None]).detach().requires_grad_(True)
            hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state
            with torch.no_grad():
                logits = torch.nn.functional.linear(hidden[0], head.weight, getattr(head, "bias", None)).float()
                cap = shape.logit_soft_cap
                capped = logits if cap is None else cap * torch.tanh(logits / cap)
                gradient = capped.softmax(dim=-1)
                drawn = torch.multinomial(gradient, 1, generator=generator)
                gradient.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=torch.float32))
                if cap is not None:
                    gradient *= 1 - (capped / cap).square()
                add(head_name, outer_squares(gradient, hidden[0].float()))
                back = gradient.to(hidden.dtype) @ head.weight
            hidden.backward(back[None])
            assert embedded.grad is not None
            found["token_embd.weight"].index_add_(0, text, (embedded.grad[0].float() * scale).square())
            done += len(text)
            if progress:
                progress(done, total)
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted[name])
    return {name: amount / total for name, amount in found.items()}


def _part(whole: torch.Tensor, place: Source, count: int) -> torch.Tensor:
    return whole if place.of is None else whole[place.start : place.start + count]
