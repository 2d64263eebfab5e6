"""Gradients of single texts without the gradients: inner products from rank-one parts, and sketches that keep them.

The gradient of a loss by a linear layer's weights is, for one token, δ ⊗ x: the gradient by the layer's output times
its input. At the output head δ is e = softmax - one-hot, or student - teacher where the loss is a KL. So for two texts

    ⟨G_a, G_b⟩ = Σ_{s in a, t in b} (δ_s · δ_t)(x_s · x_t),

and no gradient, which is as large as the layer, need ever be made. The sum has as many terms as the texts have pairs of
tokens; a sketch has one pass. With independent random signs P (outputs × p) and R (inputs × r),

    S(a) = Σ_{s in a} (Pᵀδ_s)(Rᵀx_s)ᵀ / √(p·r),    E⟨S(a), S(b)⟩ = ⟨G_a, G_b⟩,

for both factors keep inner products in expectation (Johnson & Lindenstrauss; random signs: Achlioptas 2003). Sketches
of several layers with signs of their own may be added up: cross terms vanish in expectation, so the sum is a sketch of
the gradient by all of them together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeprune.losses import Mix


def inner_product(delta_a: Tensor, x_a: Tensor, delta_b: Tensor, x_b: Tensor) -> Tensor:
    """⟨G_a, G_b⟩ of two texts, exact.

    Args:
        delta_a, delta_b: gradients by the layer's output, (tokens, outputs), a row a token.
        x_a, x_b: the layer's inputs, (tokens, inputs).
    """
    return ((delta_a @ delta_b.T) * (x_a @ x_b.T)).sum()


def error(probs: Tensor, teacher: Tensor | None, labels: Tensor, mix: Mix) -> Tensor:
    """The gradient of a recovery's loss by the logits: mix.kl · (q - p) + mix.ce · (q - one-hot), (N, V).

    Args:
        probs: the student's distributions q, (N, V).
        teacher: the teacher's p, (N, V); None: cross-entropy alone, at weight 1.
        labels: the text's next tokens, (N,).
    """
    result = probs * (1.0 if teacher is None else mix.kl + mix.ce)
    weight = 1.0 if teacher is None else mix.ce
    if teacher is not None:
        result -= mix.kl * teacher
    return result.scatter_add_(-1, labels[:, None], torch.full_like(labels[:, None], -weight, dtype=result.dtype))


class Sketch:
    """The sketch of one linear layer's gradient.

    Args:
        outputs, inputs: of the layer.
        size: (p, r) of the module's text.
        seed: of the signs.
    """

    def __init__(self, outputs: int, inputs: int, size: tuple[int, int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._left = _signs(outputs, size[0], generator)
        self._right = _signs(inputs, size[1], generator)

    def left(self, delta: Tensor) -> Tensor:
        """Pᵀδ / √p of rows, (N, outputs) -> (N, p), float32."""
        return (delta @ self._left) / math.sqrt(self._left.shape[1])

    def right(self, x: Tensor) -> Tensor:
        """Rᵀx / √r of rows, (N, inputs) -> (N, r), float32."""
        return (x @ self._right) / math.sqrt(self._right.shape[1])

    def join(self, left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
        """Mean over each text's tokens of left ⊗ right.

        Args:
            left: (texts, length, p), zero where a text has no token.
            right: (texts, length, r).
            counts: tokens of each text, (texts,).

        Returns:
            (texts, p · r).
        """
        return (left.transpose(1, 2) @ right).flatten(1) / counts[:, None].clamp_min(1)


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8).mul_(2).sub_(1).float()
