"""What mixes the channels of one block before rounding.

A block of input channels x [R, B] and the weight columns W [N, B] that read it are rounded as
x' = x M and W' = W M⁻ᵀ.  The maps M offered here, best first in what they know:

* **Hadamard** H/√B knows nothing and spreads every channel evenly (QuaRot, arXiv 2404.00456);
* **right singular vectors** U know the weight; U H gives all its channels equal energy (arXiv
  2605.28803);
* **greedy** (DuQuant, arXiv 2406.01721, section 3.2) knows the inputs.  It looks for the channel
  with the largest magnitude, turns it into all the others evenly, and repeats on the result; of
  all products of such rotations it keeps the one with the lowest peak.  Turning channel d needs
  an orthogonal matrix whose row d is flat.  The paper draws the other rows at random; here they
  are the cosines of the orthonormal DCT-II, whose first row is flat as well, so that the same
  inputs give the same bytes;
* **second moment** (WUSH, arXiv 2512.00956) knows both, as G = WᵀW and C = xᵀx, and is no rotation.
  With the Cholesky factor G = L Lᵀ and the eigenvectors Lᵀ C L = V S² Vᵀ,

      M = L V S^{-1/2} H,       Mᵀ C M = M⁻¹ G M⁻ᵀ = H S H :

  inputs and weight get one and the same second moment, whose diagonal is flat (tr S / B), and
  tr S is the smallest product of their sizes that any M can reach.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omega_qvla.quantization.checks import require_finite

GREEDY_STEPS = 256
"""Turns tried at most (DuQuant, section 4.1)."""

MOMENT_DAMPING = 0.01
"""Added to the diagonal of both second moments, as a fraction of its mean.

A direction that calibration or the weight hardly knows would be amplified without bound.
"""


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sylvester's Hadamard matrix over √n: symmetric, orthogonal, all entries ±1/√n.

    Args:
        n: a power of two.
        dtype: of the result.

    Returns:
        [n, n].

    Raises:
        ValueError: n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Sylvester Hadamard matrix needs a power of two, got {n}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat(
            (torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)), dim=0
        )
    return (matrix / n**0.5).to(dtype)


def svd_basis(weight_block: Tensor) -> Tensor:
    """Right singular vectors of a weight block, as eigenvectors of WᵀW.

    Columns are ordered by falling singular value and signed so that the entry of largest
    magnitude (the first, among equals) is positive: the same block always gives the same basis.

    Args:
        weight_block: [N, B], any N ≥ 0.

    Returns:
        [B, B] float64, orthogonal.

    Raises:
        NonFiniteError: NaN or Inf in the block.
    """
    require_finite(weight_block, "weight")
    block = weight_block.to(torch.float64)
    return _eigenbasis(block.t() @ block)


def _eigenbasis(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric [B, B] matrix, descending, with fixed signs."""
    largest = float(gram.diagonal().max()) if gram.numel() else 0.0
    if largest > 0.0:
        gram = gram / largest
    basis = torch.linalg.eigh((gram + gram.t()) / 2).eigenvectors.flip(-1)
    leading = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(leading < 0, -1.0, 1.0)


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix [n, n] float64; its first row is 1/√n throughout."""
    angle = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * angle.unsqueeze(-1) * (angle + 0.5)) * (2.0 / n) ** 0.5
    matrix[0] /= 2.0**0.5
    return matrix


def greedy_rotation(rows: Tensor, steps: int = GREEDY_STEPS) -> Tensor:
    """DuQuant's rotation of one block.

    Args:
        rows: [R, B] sampled inputs of the block, R ≥ 1.
        steps: turns tried at most.

    Returns:
        [B, B] float64, orthogonal: the product of the first turns after which the largest
        magnitude of rows · product was lowest (searched for in float32); the identity if no turn
        lowers it.

    Raises:
        NonFiniteError: NaN or Inf in ``rows``.
        ValueError: no rows.
    """
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(f"a greedy rotation needs rows [R, B], got {list(rows.shape)}")
    require_finite(rows, "activations")
    size = rows.shape[1]
    flat = cosines(size).to(rows.device)
    turned, single = rows.to(torch.float32), flat.to(torch.float32)
    product = torch.eye(size, dtype=torch.float64, device=rows.device)
    best, lowest = product, float(turned.abs().max())
    for _ in range(steps):
        channel = int(turned.abs().amax(dim=0).argmax())
        order = torch.arange(size, device=rows.device)
        order[0], order[channel] = channel, 0
        turned = turned @ single[order][:, order]
        product = product @ flat[order][:, order]
        peak = float(turned.abs().max())
        if peak < lowest:
            best, lowest = product, peak
    return best


def second_moment_map(
    weight_moment: Tensor, input_moment: Tensor, damping: float = MOMENT_DAMPING
) -> Tensor:
    """WUSH's map of one block.

    Args:
        weight_moment: G = WᵀW [B, B]; its overall scale only scales the result.
        input_moment: C = xᵀx [B, B]; likewise.
        damping: added to both diagonals, as a fraction of their means; 0 for moments of full rank.

    Returns:
        M [B, B] float64: x' = x M, W' = W M⁻ᵀ.  A side without any energy counts as white.

    Raises:
        NonFiniteError: NaN or Inf in a moment.
        ValueError: B is not a power of two.
    """
    require_finite(weight_moment, "the weight's second moment")
    require_finite(input_moment, "the input's second moment")
    weights, inputs = _damped(weight_moment, damping), _damped(input_moment, damping)
    factor = torch.linalg.cholesky(weights)
    squares, vectors = torch.linalg.eigh(factor.t() @ inputs @ factor)
    leading = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = vectors * torch.where(leading < 0, -1.0, 1.0)
    smallest = float(squares.max()) * torch.finfo(torch.float64).eps
    spread = squares.clamp(min=smallest) ** -0.25
    return (factor @ vectors * spread) @ hadamard(weights.shape[0]).to(weights.device)


def shrunk(moment: Tensor, share: float) -> Tensor:
    """A second moment moved to its diagonal by this share (0: as it is, 1: diagonal).

    What is estimated off the diagonal, from few samples or a few tokens, is trusted less.  Between
    diagonal moments ``second_moment_map`` is a smoothing with exponent ½ and a Hadamard matrix.
    """
    return moment * (1.0 - share) + moment.diagonal().diag() * share


def _damped(moment: Tensor, damping: float) -> Tensor:
    """A symmetric moment over its mean diagonal, plus ``damping``; the identity for zeros."""
    mean = float(moment.diagonal().to(torch.float64).mean())
    identity = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    if mean <= 0.0:
        return identity
    scaled = moment.to(torch.float64) / mean
    return (scaled + scaled.t()) / 2 + damping * identity
