# pyright: basic
"""The GPU programs between two products: norms with their modulation, gated products,
rotary positions.

Each is one pass over rows that are read once and written once.  Sums are float32; a row is reduced
by one program, in the compiler's order, so results are those of ``policies/layers/elementwise.py``
up to the rounding of a sum, not bit for bit.

* normalize: y = c · 1/√(mean(c²) + ε) · (base + scale) + shift, where c is x (RMS norm) or
  x - mean(x) (layer norm).  Scale and shift are a row of their own for every ``tokens`` rows of x,
  or the same for all (a stride of 0).
* gated product: activation(gate) · up, with gelu_tanh(g) = g · σ(2 √(2/π) (g + 0.044715 g³)), since
  (1 + tanh u)/2 = σ(2u), and silu(g) = g · σ(g).
* rotate: the halves u and v of a head become u cos - v sin and v cos + u sin, products and sums
  rounded one by one, so that these are the definition's bits.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports] - an extra
import triton.language as tl  # pyright: ignore[reportMissingImports]

_TWICE_ROOT = tl.constexpr(1.5957691216057308)
"""2 √(2/π)."""


@triton.jit
def activated(gate, KIND: tl.constexpr):
    """The nonlinearity of a gated product, float32."""
    inner = gate
    if KIND == "gelu_tanh":
        inner = _TWICE_ROOT * (gate + 0.044715 * gate * gate * gate)
    return tl.div_rn(gate, 1.0 + tl.exp(-inner))


@triton.jit(do_not_specialize=["columns", "tokens"])
def normalize(
    x,
    scale,
    shift,
    out,
    columns,
    stride,
    tokens,
    scale_stride,
    BASE: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows: a whole row at once, ``WIDTH`` being the next power of two of its ``columns``."""
    row = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    inside = lane < columns
    found = tl.load(x + row * stride + lane, mask=inside, other=0.0).to(tl.float32)
    number = columns.to(tl.float32)
    if CENTRED:
        mean = tl.div_rn(tl.sum(found, axis=0), number)
        found = tl.where(inside, found - mean, 0.0)
    power = tl.div_rn(tl.sum(found * found, axis=0), number)
    y = found * tl.div_rn(1.0, tl.sqrt_rn(power + EPS))
    place = (row // tokens) * scale_stride + lane
    y = y * (BASE + tl.load(scale + place, mask=inside, other=0.0).to(tl.float32))
    if shift is not None:
        y = y + tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + lane, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns"])
def gated_product(
    gate,
    up,
    out,
    columns,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows × pieces of ``WIDTH`` columns."""
    row = tl.program_id(0)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < columns
    left = tl.load(gate + row * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + row * up_stride + lane, mask=inside, other=0.0).to(tl.float32)
    y = activated(left, KIND) * right
    tl.store(out + row * columns + lane, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens"])
def rotate(
    x,
    cosine,
    sine,
    out,
    heads,
    tokens,
    half,
    chunk_stride,
    head_stride,
    token_stride,
    table_stride,
    HALF: tl.constexpr,
):
    """One head of one token, in the order of the output [chunks, heads, tokens, 2 · half]."""
    row = tl.program_id(0)
    token, head, chunk = row % tokens, row // tokens % heads, row // tokens // heads
    lane = tl.arange(0, HALF)
    inside = lane < half
    at = x + chunk * chunk_stride + head * head_stride + token * token_stride + lane
    place = chunk * table_stride + token * half + lane
    u = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cosine + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sine + place, mask=inside, other=0.0).to(tl.float32)
    to = out + row * 2 * half + lane
    tl.store(to, (u * c - v * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (v * c + u * s).to(out.dtype.element_ty), mask=inside)
