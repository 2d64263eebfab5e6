"""A model one decoder layer at a time: the weights of one layer in memory, the rest on disk, in any family.

A layer adds two branches to the residual stream x: attention and MLP, each post(projection(inner(pre(x)))), with
`pre` a norm, `post` a norm or nothing, and `projection` the output or the down projection. In a parallel block both
read the same x. That is all that is assumed here; what happens inside a branch is the stock module's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, StageFailed
from edgeprune.families import Family
from edgeprune.heterogeneous import layer_module, stock_skeleton
from edgeprune.runtimes.pytorch import stock_config

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, ...] = ("attention", "mlp")
_WINDOWS_AT_ONCE = 32  # embedded together
# The role of the projection that ends a half, and of the norms around it.
_ROLES: Mapping[Half, tuple[str, str, str]] = {
    "attention": ("output", "attention_norm", "attention_post_norm"),
    "mlp": ("down", "mlp_norm", "mlp_post_norm"),
}


def projection_role(half: Half) -> str:
    """The role (a field of `Family`) of the projection that ends `half`."""
    return _ROLES[half][0]


class Block:
    """A decoder layer whose halves are run apart.

    Args:
        module: the stock decoder layer, with weights.
        family: its family.
        call: what the stock model passes to this layer beside the hidden states (mask, rotary tables …).
    """

    def __init__(self, module: nn.Module, family: Family, call: Mapping[str, Any]) -> None:
        self.module, self.family, self._call = module, family, call
        self._attention: dict[str, Any] | None = None

    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer, (windows, length, hidden), float32; it can be differentiated."""
        low = any(parameter.dtype is torch.bfloat16 for parameter in self.module.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            after: torch.Tensor | tuple[torch.Tensor, ...] = self.module(residual, **self._call)
        return after[0] if isinstance(after, tuple) else after

    def projection(self, half: Half) -> nn.Linear:
        """The projection that ends a half."""
        found = self.module.get_submodule(getattr(self.family, _ROLES[half][0]))
        assert isinstance(found, nn.Linear)
        return found

    @torch.inference_mode()
    def inner(self, half: Half, residual: torch.Tensor) -> torch.Tensor:
        """The input of the half's projection.

        Args:
            residual: the residual stream that the half reads, (windows, length, hidden), float32.

        Returns:
            (windows, length, heads · head_dim) or (windows, length, neurons), in the module's number format.
        """
        output, pre, _ = _ROLES[half]
        norm = getattr(self.family, pre) or self.family.attention_norm  # a parallel block has one norm for both
        normed = self.module.get_submodule(norm)(residual).to(self.projection(half).weight.dtype)
        path = getattr(self.family, output)
        parent = self.module.get_submodule(path.rpartition(".")[0])
        if half == "mlp":
            with _replaced(self.module, path, nn.Identity()):
                activated: torch.Tensor = parent(normed)
                return activated
        call = self._attention_call(residual[:1])
        with _replaced(self.module, path, nn.Identity()):
            attended: torch.Tensor = parent(hidden_states=normed, **call)[0]
            return attended

    @torch.inference_mode()
    def added(self, half: Half, projected: torch.Tensor) -> torch.Tensor:
        """What the half adds to the residual stream: its projection's output, through the norm after it if any."""
        post = getattr(self.family, _ROLES[half][2])
        result: torch.Tensor = projected if post is None else self.module.get_submodule(post)(projected)
        return result

    @property
    def normed_output(self) -> bool:
        """Whether a norm stands between a half's projection and the residual stream."""
        return self.family.attention_post_norm is not None

    def _attention_call(self, window: torch.Tensor) -> dict[str, Any]:
        """What the layer passes on to its attention; families differ in it, so the layer is asked once."""
        if self._attention is None:
            path = getattr(self.family, _ROLES["attention"][0]).rpartition(".")[0]
            attention = self.module.get_submodule(path)
            dtype = self.projection("attention").weight.dtype

            def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                assert not args
                kwargs.pop("hidden_states")
                raise _CallSeen({key: _converted(value, dtype) for key, value in kwargs.items()})

            handle = attention.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                self.module(window.to(dtype), **self._call)
            except _CallSeen as seen:
                self._attention = seen.call
            finally:
                handle.remove()
            if self._attention is None:
                raise StageFailed(f"the layer of family {self.family.name} did not call its attention")
        return self._attention


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Rotary tables and masks in the matrices' number format."""
    if isinstance(value, tuple):
        return tuple(_converted(each, dtype) for each in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


class _CallSeen(Exception):
    def __init__(self, call: dict[str, Any]) -> None:
        self.call = call


@contextmanager
def _replaced(module: nn.Module, path: str, stand_in: nn.Module) -> Iterator[None]:
    original = module.get_submodule(path)
    module.set_submodule(path, stand_in)
    try:
        yield
    finally:
        module.set_submodule(path, original)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and passes the hidden states on."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.call: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        if hasattr(original, "attention_type"):  # by which Gemma picks a mask
            self.attention_type = original.attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not args
        self.hidden, self.call = hidden_states, kwargs
        # Some stock models expect a tuple of their layers, others the tensor itself; nobody reads it after the first.
        return (hidden_states,)


@dataclass(frozen=True)
class Head:
    """What turns the residual stream after the last layer into logits."""

    norm: nn.Module
    weight: torch.Tensor  # (vocabulary, hidden)
    bias: torch.Tensor | None
    soft_cap: float | None
    counts: torch.Tensor | None = None  # (vocabulary,): for how many tokens each stands; None: for itself

    @torch.inference_mode()
    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits, (tokens, vocabulary), float32, of the residual stream, (tokens, hidden)."""
        logits: torch.Tensor = (self.norm(residual).to(self.weight.dtype) @ self.weight.T).float()
        if self.bias is not None:
            logits += self.bias
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits if self.counts is None else logits + self.counts.log()

    @torch.inference_mode()
    def sample(self, residual: torch.Tensor, size: int) -> Head:
        """A head of `size` tokens whose distributions stand for this one's: it costs as much less as it is smaller.

        Half of them are the tokens that this head expects most over `residual`, (tokens, hidden); the others are drawn
        from the rest, each to count for as many as it was drawn from. Two such distributions differ about as the whole
        ones do, and not at all where those do not.
        """
        vocabulary = len(self.weight)
        if vocabulary <= size:
            return self
        expected = torch.zeros(vocabulary)
        for part in torch.split(residual, 256):
            expected += self.logits(part).softmax(-1).sum(0)
        order = expected.argsort(descending=True)
        most, rest = order[: size // 2], order[size // 2 :]
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[: size - len(most)]]
        rows = torch.cat([most, drawn])
        counts = torch.cat([torch.ones(len(most)), torch.full((len(drawn),), len(rest) / len(drawn))])
        bias = None if self.bias is None else self.bias[rows]
        return Head(self.norm, self.weight[rows], bias, self.soft_cap, counts)


class LayeredModel:
    """A checkpoint whose layers are loaded one at a time.

    Args:
        checkpoint: the folder.
        dtype: number format in which matrices run: bfloat16 is twice as fast where the processor has it and adds
            noise of 0.4 %, float32 is exact. The residual stream and norms are float32.
        uneven: whether layers may differ from each other, or lack a half: then they can be run, but not pruned.

    Raises:
        BadInput: a checkpoint whose layers differ already, or that transformers cannot configure.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, uneven: bool = False) -> None:
        self.checkpoint, self.shape, self.dtype = checkpoint, checkpoint.shape, dtype
        if not self.shape.uniform and not uneven:
            raise BadInput("layers differ already", where=checkpoint.folder, remedy="give the dense model")
        self.family = self.shape.family
        try:
            self.config = stock_config(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"transformers cannot read the config ({error})", where=checkpoint.folder) from error
        self._skeleton = stock_skeleton(self.config)
        layers: Any = self._skeleton.get_submodule(self.family.layers)
        self._recorders = [_Recorder(layer) for layer in layers]
        self._skeleton.set_submodule(self.family.layers, nn.ModuleList(self._recorders))
        self._calls: list[dict[str, Any]] = []

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The residual stream before the first layer.

        Args:
            ids: (windows, length), all real tokens.
            out: receives it; None: a new tensor.

        Returns:
            (windows, length, hidden), float32.
        """
        embedding = self._skeleton.get_submodule(self.family.embedding)
        embedding.weight = nn.Parameter(self._tensor(f"{self.family.embedding}.weight"), requires_grad=False)
        body = self._skeleton.get_submodule(self.family.layers.rpartition(".")[0])
        norm, path = self._skeleton.get_submodule(self.family.final_norm), self.family.final_norm
        result = torch.empty(*ids.shape, self.shape.hidden) if out is None else out
        try:
            self._skeleton.set_submodule(path, nn.Identity())
            for start in range(0, len(ids), _WINDOWS_AT_ONCE):
                part = slice(start, start + _WINDOWS_AT_ONCE)
                body(input_ids=ids[part], use_cache=False)
                hidden = self._recorders[0].hidden
                assert hidden is not None
                result[part] = hidden
            body(input_ids=ids[:1], use_cache=False)  # what layers are called with then fits a batch of any size
        finally:
            self._skeleton.set_submodule(path, norm)
            embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self._calls = [recorder.call for recorder in self._recorders]
        return result

    def block(self, index: int) -> Block:
        """Layer `index`, with its weights; `embed` must have been called, for it tells how layers are called.

        Raises:
            BadInput: tensors that are missing or of another size.
        """
        module = layer_module(self.config, index, self.shape.layers[index], device="meta")
        prefix = f"{self.family.layers}.{index}."
        state = {}
        for name, parameter in module.named_parameters():
            tensor = self._tensor(prefix + name)
            if tensor.shape != parameter.shape:
                raise BadInput(
                    f"tensor {prefix + name!r} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}",
                    where=self.checkpoint.folder,
                    remedy="the checkpoint does not match its config.json",
                )
            state[name] = tensor.to(self.dtype) if tensor.ndim > 1 else tensor
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        head_norms = {getattr(self.family, role) for role in self.family.head_norms}
        # Biases beside bfloat16 matrices must be bfloat16 too, and norms of heads, which stand before a product of
        # matrices; the other norms stay float32.
        for name, each in module.named_modules():
            if isinstance(each, nn.Linear) and each.bias is not None:
                each.bias = nn.Parameter(each.bias.to(self.dtype), requires_grad=False)
            elif name in head_norms:
                each.to(self.dtype)
        return Block(module.eval(), self.family, self._calls[index])

    def head(self) -> Head:
        """The final norm and the language-model head, with their weights."""
        norm = self._skeleton.get_submodule(self.family.final_norm)
        state = {name: self._tensor(f"{self.family.final_norm}.{name}") for name, _ in norm.named_parameters()}
        norm.load_state_dict(state, assign=True)
        tied = self.shape.tied or f"{self.family.head}.weight" not in self.checkpoint
        weight = self._tensor(f"{self.family.embedding if tied else self.family.head}.weight").to(self.dtype)
        bias = self._tensor(f"{self.family.head}.bias") if self.shape.head_bias else None
        return Head(norm, weight, bias, self.shape.logit_soft_cap)

    def _tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.tensor(name))
