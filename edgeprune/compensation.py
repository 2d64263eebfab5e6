"""Weight compensation: how the inputs of a projection that stay take over what the others did.

Pure tensor functions of second moments. For a projection with inputs x (one row a token), token weights s and targets
t, `gram` is G = Σ s x xᵀ and `cross` is C = Σ s x tᵀ. Keeping the inputs K, the weights W (rows: inputs) that lose
least are those of weighted ridge regression towards the old weights W₀:

    min over W_K of  Σ s ‖t - W_Kᵀ x_K‖² + Σ_k λ G_kk ‖W_k - W₀_k‖²
    (G_KK + Λ) W_K = C_K + Λ W₀_K,     Λ = diag(λ G_kk)

Damping by each input's own second moment makes λ free of scale: neurons differ in it by orders of magnitude.
Sources: the update is that of Optimal Brain Surgeon (Hassibi & Stork 1992) for a whole projection, as ZipLM
(arXiv 2302.04089) and OSSCAR (arXiv 2403.12983) use it for structures. Which inputs stay: `elimination`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from edgeprune.errors import StageFailed

# Of the mean second moment; keeps an input that never fires from making the matrix singular.
_FLOOR = 1e-6
_LEAST = 1e-30  # mean square of inputs that are all zero: nothing can be learnt from them, and nothing overflows
# Relative error of a solution in float64 grows with the condition number; above this it would reach per cents.
MAX_CONDITION = 1e13


def token_weights(residual: torch.Tensor) -> torch.Tensor:
    """Weight of each token in a layer's least squares: 1 / RMS² of the residual stream after the layer, mean 1.

    The next norm divides a token by its RMS, so an error counts by its size relative to that. Without the weights the
    few tokens of massive activations (190 times the median on SmolLM2-135M) rule every statistic.

    Args:
        residual: (..., hidden), the dense model's.

    Returns:
        (...), float32.
    """
    weights = 1.0 / residual.float().pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return weights / weights.mean()


def add_moments(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, symmetric: bool = False) -> None:
    """total += leftᵀ right, in place; of a `symmetric` total only the blocks on and above the diagonal.

    Args:
        total: (m, n).
        left: (tokens, m).
        right: (tokens, n).
        symmetric: the product is symmetric; `mirrored` makes it whole when all tokens are in. Saves near half the work.
    """
    if not symmetric:
        total.addmm_(left.T, right)
        return
    width = total.shape[0]
    blocks = max(1, min(8, width // 128))
    edges = [width * i // blocks for i in range(blocks + 1)]
    for start, stop in itertools.pairwise(edges):
        total[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """A whole symmetric matrix from its upper triangle, in place: it can be as large as all else together."""
    upper = torch.triu(total, 1)
    return total.triu_().add_(upper.T)


@dataclass(frozen=True)
class Moments:
    """Second moments of one projection's inputs with themselves and with its targets, and the weights it has.

    Sums are kept in the number format they were made in; what is solved is float64.

    Attributes:
        gram: (inputs, inputs).
        cross: (inputs, outputs).
        weight: (inputs, outputs), the dense weights, transposed to a row an input.
        scale: what losses are told in units of, e.g. the weighted energy of the residual stream.
        constant: whether the last input is the constant 1, whose weights are the bias: it always stays, and takes over
            the means of what goes (as FLAP does, arXiv 2312.11983; here with all else in one solution).
        own: share of the target that is what the projection says itself of these inputs, W₀ᵀ x, beside that in `cross`.
            Where it is all of it, `cross` is not read.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    weight: torch.Tensor
    scale: float
    own: float = 0.0
    constant: bool = False

    @property
    def inputs(self) -> int:
        """How many inputs can go."""
        return len(self.gram) - self.constant

    def damping(self, ridge: float) -> torch.Tensor:
        """The diagonal of Λ, (inputs,)."""
        diagonal = self.gram.diagonal().double()
        return ridge * diagonal + _FLOOR * diagonal.mean().clamp_min(_LEAST)

    def damped_cross(self, ridge: float, kept: torch.Tensor) -> torch.Tensor:
        """Rows `kept` of C + Λ W₀, (kept, outputs), with C that of the whole target."""
        weight = self.weight.double()
        result = self.damping(ridge)[kept, None] * weight[kept]
        if self.own:
            result.addmm_(self.gram[kept].double(), weight, alpha=self.own)
        if self.own < 1:
            result += (1 - self.own) * self.cross[kept].double()
        return result

    def solved_with(self, inverse: torch.Tensor, ridge: float) -> torch.Tensor:
        """P (C + Λ W₀), (inputs, outputs), with P = (G + Λ)⁻¹: the weights that keep every input.

        For the projection's own share of the target they are W₀, which saves a product with G.
        """
        weight = self.weight.double()
        if self.own == 1:
            return weight.clone()
        towards = self.damping(ridge)[:, None] * weight + self.cross.double()
        return (inverse @ towards).mul_(1 - self.own).add_(weight, alpha=self.own)


def factored(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Cholesky factor of a symmetric matrix in float64; the matrix itself is overwritten.

    Raises:
        StageFailed: it is not positive definite, or so ill-conditioned that a solution would mean nothing.
    """
    diagonal = matrix.diagonal().clone()
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty(0, dtype=torch.int32)))
    # How much of each input the ones before it do not explain already. Cholesky does not mind how inputs are scaled,
    # so the condition that counts is that of the correlations; this is near it in practice.
    unexplained = factor.diagonal().square() / diagonal
    if int(info) or not bool(torch.isfinite(unexplained).all()):
        raise StageFailed(f"second moments of {what} are not positive definite", remedy="give more calibration text")
    condition = float(1.0 / unexplained.min())
    if condition > MAX_CONDITION:
        raise StageFailed(
            f"second moments of {what} have condition {condition:.0e}", remedy="give more calibration text"
        )
    return factor


def solve(moments: Moments, kept: torch.Tensor, ridge: float, *, what: str = "a projection") -> torch.Tensor:
    """The best weights of a projection that keeps the inputs `kept`: (outputs, len(kept)), float32.

    Where the last input is the constant, it stays too: its weights are one column more, the bias.

    Raises:
        StageFailed: see `factored`.
    """
    if moments.constant:
        kept = torch.cat([kept, torch.tensor([moments.inputs])])
    gram = moments.gram[kept][:, kept].double()
    gram.diagonal().add_(moments.damping(ridge)[kept])
    return torch.cholesky_solve(moments.damped_cross(ridge, kept), factored(gram, what)).T.float().contiguous()
