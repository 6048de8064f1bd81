"""The reference integer kernel: pure PyTorch, exact, the oracle of all faster ones.

Three steps, as every kernel does them:

1. transform: x' = x T per block of B input channels, in float32;
2. quantize: q = clamp(round(x'·(1/s)), -2^(b-1), 2^(b-1) - 1), halves to even, s per row or
   given; the reciprocal is rounded to float32 first, as kernels that multiply by it do;
3. multiply: Σ_k q[m,k] w[n,k] in int32, from weights that stay packed eight to a word in memory
   and are unpacked for the duration of one call.

The transform's sums are those of the linear algebra library; the C++ kernels add in the order of k.
Given equal x', all integers are equal.

Products of 4-bit integers are at most 64 in magnitude, so int32 sums are exact for any K below
2^25.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NIBBLE_OFFSET = 8


def transform_blocks(x: Tensor, transform: Tensor) -> Tensor:
    """x [M, K] times block-diagonal T [K'/B, B, B] → [M, K'] float32, zero-padding K to K'."""
    blocks, block, _ = transform.shape
    missing = blocks * block - x.shape[-1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    grouped = x.view(-1, blocks, block).transpose(0, 1)
    product = torch.bmm(grouped, transform.to(torch.float32))
    return product.transpose(0, 1).reshape(-1, blocks * block)


def row_scales(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Dynamic per-row scale, [M, 1] float32; 1 for zero rows.

    Abs max over the largest integer, times ``clip`` in float32.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = largest / (2 ** (bits - 1) - 1) * clip
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_rows(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round x [M, K] to int8 integers of ``bits`` bits with scale [M, 1] or a scalar tensor."""
    limit = 2 ** (bits - 1)
    return (x * scale.reciprocal()).round_().clamp_(-limit, limit - 1).to(torch.int8)


def unpack_words(packed: Tensor) -> Tensor:
    """Eight unsigned nibbles per int32 word, [N, K/8] → signed int8 [N, K]."""
    octets = packed.view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8) - _NIBBLE_OFFSET


def integer_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product of int8 q [M, K] and int8 weight [N, K] → int32 [M, N]."""
    if q.shape[0] == 0:
        return torch.zeros((0, weight.shape[0]), dtype=torch.int32, device=q.device)
    if q.shape[1] == 1:  # PyTorch 2.13's CPU kernel leaves the result uninitialised then
        return q.to(torch.int32) * weight.t().to(torch.int32)
    return torch._int_mm(q, weight.t())  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def scaled_matmul(q: Tensor, weight: Tensor, weight_scale: Tensor, group: int | None) -> Tensor:
    """Σ over groups of (integer product · weight scale), float32 [M, N].

    Args:
        q: int8 [M, K].
        weight: int8 [N, K].
        weight_scale: float32 [N], or [N, K/group].
        group: input channels per weight scale; None for one scale per output channel.
    """
    if group is None:
        return integer_matmul(q, weight).to(torch.float32) * weight_scale
    total = torch.zeros((q.shape[0], weight.shape[0]), device=q.device)
    for index in range(weight_scale.shape[1]):  # whole words may end in columns of no group
        part = slice(index * group, (index + 1) * group)
        product = integer_matmul(q[:, part].contiguous(), weight[:, part].contiguous())
        total += product.to(torch.float32) * weight_scale[:, index]
    return total
