# pyright: basic
"""The programs that run on the GPU: transform and quantize, multiply, scale.

Written in Triton; ``triton.py`` holds what calls them, and nothing imports this file where Triton
is not installed.  Arithmetic is that of ``reference.py``, operation for operation:

* quantize: q = clamp(x'·(1/s)) rounded to the nearest integer, halves to even.  Adding and taking
  away 1.5·2²³ does that rounding: above 2²³ a float32 has no fraction left, and its own rounding is
  the one wanted.  Division is the IEEE one (``div_rn``); the compiler's default is not.
* multiply: a byte of weight holds two 4-bit integers in two's complement, and neither needs
  unpacking by more than one operation: ``w << 4`` is 16 times the low one as an int8, ``w & 0xF0``
  16 times the high one.  Both products are added up 16-fold in int32 and shifted back once at the
  end, exactly: 16 · 128 · 8 · K stays below 2³¹ for K < 2¹⁷.
* scale: (product · weight scale) · activation scale + bias, each rounded by itself.  Kernels are
  compiled without contraction (``enable_fp_fusion=False``), so the float output is the reference's
  bit for bit too.
* gate, where a layer stands for a gate and what it lets pass: activation(y_j) · y_(j + N/2) for
  j < N/2, from two sums of one program, so that neither half is ever written.

Weights stand on the left of the product and activations on the right, outputs × rows.  That way the
side with few entries (a chunk has 10 to 50 rows) is the one whose tile can be 16 wide, and the
weights, widened in registers, need not go through shared memory again on Hopper.

Layouts, all row-major:

* ``weights`` int8 [N, width/2]: byte 64·b + j of a row holds inputs 128·b + j (low half) and
  128·b + 64 + j (high half); ``width`` is K filled up to a multiple of 128.
* ``integers`` int8 [M, width]: quantized activations, in order.
* ``transform`` bfloat16 [blocks, 64, 64]: x' = x T per block of 64 inputs.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports] - an extra
import triton.language as tl  # pyright: ignore[reportMissingImports]

from omega_qvla.runtime.kernels.triton_elementwise_device import activated

HALF = tl.constexpr(64)
"""Inputs per transform block, per group of weight scales, and per half of a packed block."""
_ROUNDER = tl.constexpr(12582912.0)
_ANY = ["count", "columns", "blocks", "parts", "groups", "per_row"]
"""Arguments whose value changes no instruction worth having: a prompt one token longer must not be
compiled for anew because its length is no multiple of 16."""


@triton.jit
def _leading_bits(x):
    """float32 with all but the leading 11 bits of its significand taken away."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _times_matrix(x, matrix):
    """x [rows, 64] float32 times a matrix of bfloat16 values, as precise as float32 products.

    TF32 keeps 11 bits of a number: three parts carry all 24 of a float32, and one all 8 of a
    bfloat16, so every product is exact; only sums are rounded.
    """
    high = _leading_bits(x)
    middle = _leading_bits(x - high)
    low = (x - high) - middle
    y = tl.dot(low, matrix, input_precision="tf32", out_dtype=tl.float32)
    y = tl.dot(middle, matrix, acc=y, input_precision="tf32", out_dtype=tl.float32)
    return tl.dot(high, matrix, acc=y, input_precision="tf32", out_dtype=tl.float32)


@triton.jit
def _block_of_rows(x, transform, offset, rows, count, columns, stride, block, blocks):
    """One block of rows after its transform and offset: float32 [rows, 64], zeros past the end."""
    lane = tl.arange(0, HALF)
    column = block * HALF + lane
    inside = (rows < count)[:, None] & (column < columns)[None, :]
    found = tl.load(x + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)
    found = found.to(tl.float32)
    if transform is not None:
        place = transform + block * HALF * HALF + lane[:, None] * HALF + lane[None, :]
        # The last block of an odd number of them has no partner: it is all zeros.
        known = (block < blocks) & (lane >= 0)[:, None] & (lane >= 0)[None, :]
        matrix = tl.load(place, mask=known, other=0.0).to(tl.float32)
        found = _times_matrix(found, matrix)
    if offset is not None:
        found = found - tl.load(offset + column)[None, :]
    return found


@triton.jit
def _store_integers(integers, found, inverse, rows, count, width, block, LIMIT: tl.constexpr):
    """Round one block of transformed rows and store it."""
    scaled = tl.minimum(tl.maximum(found * inverse, -LIMIT), LIMIT - 1.0)
    rounded = ((scaled + _ROUNDER) - _ROUNDER).to(tl.int32).to(tl.int8)
    lane = tl.arange(0, HALF)
    place = integers + rows[:, None] * width + block * HALF + lane[None, :]
    tl.store(place, rounded, mask=(rows < count)[:, None] & (lane >= 0)[None, :])


@triton.jit(do_not_specialize=_ANY)
def quantize_static(
    x,
    transform,
    offset,
    scale,
    integers,
    count,
    columns,
    stride,
    blocks,
    width,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows × blocks: transform and quantize with one given scale; nothing is reduced."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    found = _block_of_rows(x, transform, offset, rows, count, columns, stride, block, blocks)
    inverse = tl.div_rn(1.0, tl.load(scale))
    _store_integers(integers, found, inverse, rows, count, width, block, LIMIT)


@triton.jit(do_not_specialize=_ANY)
def row_maxima(
    x,
    transform,
    offset,
    maxima,
    count,
    columns,
    stride,
    blocks,
    share,
    ROWS: tl.constexpr,
):
    """Rows × slices: the largest magnitude of each row in a slice of ``share`` blocks."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    largest = tl.zeros((ROWS,), tl.float32)
    for block in range(part * share, tl.minimum((part + 1) * share, blocks)):
        found = _block_of_rows(x, transform, offset, rows, count, columns, stride, block, blocks)
        largest = tl.maximum(largest, tl.max(tl.abs(found), axis=1))
    tl.store(maxima + part * count + rows, largest, mask=rows < count)


@triton.jit(do_not_specialize=_ANY)
def quantize_dynamic(
    x,
    transform,
    offset,
    maxima,
    scales,
    integers,
    count,
    columns,
    stride,
    blocks,
    width,
    parts,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows × blocks: quantize with one scale per row, made of the maxima of its slices.

    The scale reaches to the share ``CLIP`` of the largest magnitude.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    largest = tl.zeros((ROWS,), tl.float32)
    for part in range(0, parts):
        found = tl.load(maxima + part * count + rows, mask=rows < count, other=0.0)
        largest = tl.maximum(largest, found)
    scale = tl.div_rn(largest, tl.full((ROWS,), LIMIT - 1.0, tl.float32)) * CLIP
    scale = tl.where(scale > 0.0, scale, 1.0)
    tl.store(scales + rows, scale, mask=(rows < count) & (block == 0))
    found = _block_of_rows(x, transform, offset, rows, count, columns, stride, block, blocks)
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    _store_integers(integers, found, inverse, rows, count, width, block, LIMIT)


@triton.jit
def _step(
    total,
    integers,
    weights,
    rows,
    count,
    outputs,
    size,
    width,
    place,
    end,
):
    """Add 16 times the product of some bytes of weight, given by their places in a row."""
    inside = place < end
    wanted = (outputs < size)[:, None] & inside[None, :]
    packed = tl.load(
        weights + outputs[:, None] * (width // 2) + place[None, :], mask=wanted, other=0
    )
    column = (place // HALF) * (2 * HALF) + place % HALF
    present = inside[:, None] & (rows < count)[None, :]
    source = integers + rows[None, :] * width + column[:, None]
    low = tl.load(source, mask=present, other=0)
    high = tl.load(source + HALF, mask=present, other=0)
    total = tl.dot(packed << 4, low, acc=total, out_dtype=tl.int32)
    return tl.dot(packed & -16, high, acc=total, out_dtype=tl.int32)


@triton.jit
def _product(
    integers,
    weights,
    rows,
    count,
    outputs,
    size,
    width,
    begin,
    end,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """16 times the integer product over bytes [begin, end) of every row, int32 [outputs, rows]."""
    total = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for first in range(begin, end, BYTES):
        place = first + tl.arange(0, BYTES)
        total = _step(total, integers, weights, rows, count, outputs, size, width, place, end)
    return total


@triton.jit
def _scaled(product, bias, scales, rows, count, outputs, size, per_row):
    """(product · weight scale, done by the caller) · activation scale + bias, [outputs, rows]."""
    scale = tl.load(scales + rows * per_row, mask=rows < count, other=0.0)
    y = product * scale[None, :]
    if bias is not None:
        y = y + tl.load(bias + outputs, mask=outputs < size, other=0.0)[:, None]
    return y


@triton.jit
def _store_scaled(product, bias, scales, out, rows, count, outputs, size, per_row):
    """``_scaled`` → out [rows, N]."""
    y = _scaled(product, bias, scales, rows, count, outputs, size, per_row)
    inside = (outputs < size)[:, None] & (rows < count)[None, :]
    place = rows[None, :] * size + outputs[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY)
def multiply(
    integers,
    weights,
    weight_scale,
    bias,
    scales,
    out,
    count,
    size,
    width,
    per_row,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Row tiles × output tiles: the whole product, scaled."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = _product(
        integers,
        weights,
        rows,
        count,
        outputs,
        size,
        width,
        0,
        width // 2,
        ROWS,
        OUTPUTS,
        BYTES,
    )
    channel = tl.load(weight_scale + outputs, mask=outputs < size, other=0.0)
    product = (total >> 4).to(tl.float32) * channel[:, None]
    _store_scaled(product, bias, scales, out, rows, count, outputs, size, per_row)


@triton.jit(do_not_specialize=_ANY)
def multiply_part(
    integers,
    weights,
    partial,
    count,
    size,
    width,
    share,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Row tiles × output tiles × parts of K: 16 times a part's product → int32 [parts, M, N].

    With few rows there are fewer tiles than processors; integers may be added up in any order.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    total = _product(
        integers,
        weights,
        rows,
        count,
        outputs,
        size,
        width,
        part * share,
        tl.minimum((part + 1) * share, width // 2),
        ROWS,
        OUTPUTS,
        BYTES,
    )
    inside = (outputs < size)[:, None] & (rows < count)[None, :]
    place = partial + (part * count + rows[None, :]) * size + outputs[:, None]
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=_ANY)
def add_parts(
    partial,
    weight_scale,
    bias,
    scales,
    out,
    count,
    size,
    parts,
    per_row,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Row tiles × output tiles: add the parts up and scale."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (outputs < size)[:, None] & (rows < count)[None, :]
    total = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for part in range(0, parts):
        place = partial + (part * count + rows[None, :]) * size + outputs[:, None]
        total += tl.load(place, mask=inside, other=0)
    channel = tl.load(weight_scale + outputs, mask=outputs < size, other=0.0)
    product = (total >> 4).to(tl.float32) * channel[:, None]
    _store_scaled(product, bias, scales, out, rows, count, outputs, size, per_row)


@triton.jit
def _store_gated(
    gate,
    up,
    weight_scale,
    bias,
    scales,
    out,
    rows,
    count,
    outputs,
    half,
    per_row,
    KIND: tl.constexpr,
):
    """16-fold sums of gates and of what they let pass → out [rows, N/2]."""
    known = outputs < half
    channel = tl.load(weight_scale + outputs, mask=known, other=0.0)
    left = (gate >> 4).to(tl.float32) * channel[:, None]
    left = _scaled(left, bias, scales, rows, count, outputs, half, per_row)
    channel = tl.load(weight_scale + half + outputs, mask=known, other=0.0)
    right = (up >> 4).to(tl.float32) * channel[:, None]
    if bias is not None:
        bias += half
    right = _scaled(right, bias, scales, rows, count, outputs, half, per_row)
    y = activated(left, KIND) * right
    place = rows[None, :] * half + outputs[:, None]
    inside = known[:, None] & (rows < count)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY)
def multiply_gated(
    integers,
    weights,
    weight_scale,
    bias,
    scales,
    out,
    count,
    half,
    width,
    per_row,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Row tiles × output tiles of one half: both products, scaled, gated."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    end = width // 2
    gate = _product(
        integers, weights, rows, count, outputs, half, width, 0, end, ROWS, OUTPUTS, BYTES
    )
    weights += half * end
    up = _product(
        integers, weights, rows, count, outputs, half, width, 0, end, ROWS, OUTPUTS, BYTES
    )
    _store_gated(
        gate, up, weight_scale, bias, scales, out, rows, count, outputs, half, per_row, KIND
    )


@triton.jit(do_not_specialize=_ANY)
def add_parts_gated(
    partial,
    weight_scale,
    bias,
    scales,
    out,
    count,
    half,
    parts,
    per_row,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Row tiles × output tiles of one half: add the parts of both up, scale, gate."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (outputs < half)[:, None] & (rows < count)[None, :]
    gate = tl.zeros((OUTPUTS, ROWS), tl.int32)
    up = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for part in range(0, parts):
        place = partial + (part * count + rows[None, :]) * 2 * half + outputs[:, None]
        gate += tl.load(place, mask=inside, other=0)
        up += tl.load(place + half, mask=inside, other=0)
    _store_gated(
        gate, up, weight_scale, bias, scales, out, rows, count, outputs, half, per_row, KIND
    )


@triton.jit(do_not_specialize=_ANY)
def multiply_grouped(
    integers,
    weights,
    weight_scale,
    bias,
    scales,
    out,
    count,
    size,
    width,
    groups,
    per_row,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """As ``multiply``, with one weight scale per 64 inputs, [groups, N].

    Groups are added up in order and in float32, as the reference does; this costs more than it
    looks, because it is not the tensor cores that do it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = tl.arange(0, HALF)
    y = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for group in range(0, width // HALF):
        place = (group // 2) * HALF + lane
        packed = tl.load(
            weights + outputs[:, None] * (width // 2) + place[None, :],
            mask=(outputs < size)[:, None] & (lane >= 0)[None, :],
            other=0,
        )
        found = tl.load(
            integers + rows[None, :] * width + group * HALF + lane[:, None],
            mask=(lane >= 0)[:, None] & (rows < count)[None, :],
            other=0,
        )
        shifted = tl.where(group % 2 == 0, packed << 4, packed & -16)
        total = tl.dot(shifted, found, out_dtype=tl.int32) >> 4
        known = (outputs < size) & (group < groups)
        channel = tl.load(weight_scale + group * size + outputs, mask=known, other=0.0)
        y += total.to(tl.float32) * channel[:, None]
    _store_scaled(y, bias, scales, out, rows, count, outputs, size, per_row)
