"""The GPU programs checked on the GPU at hand before anything is timed; by ``benchmarks/gpu.py``.

Products are the reference's bit for bit; what holds an exponential or a sum of floats is held to
float64, within some roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.errors import OmegaError
from omega_qvla.policies.layers.elementwise import RMS_EPS, TORCH, Gate
from omega_qvla.runtime.kernels import reference
from omega_qvla.runtime.kernels import triton as gpu
from omega_qvla.runtime.kernels.triton_elementwise import gated_product, normalize, rotate

_GATES: tuple[Gate, Gate] = ("gelu_tanh", "silu")
_ROUNDINGS = 64 * 2**-24
"""Of the size of the terms: a row's sum is made of thousands of them."""


class MismatchError(OmegaError):
    """The GPU gave other integers or other actions than the reference."""

    exit_status = 1


def check_layers(device: str, generator: torch.Generator, trials: int = 120) -> dict[str, int]:
    """Random layers on the GPU against the reference on the CPU, bit for bit; where there are two
    halves and one scale per output, also as a gate and what it lets pass.

    Raises:
        MismatchError: one differs; names its shape.
    """
    for trial in range(trials):
        m, n, k = (
            int(torch.randint(1, top, (1,), generator=generator)) for top in (200, 400, 1500)
        )
        if trial % 2:  # as in the policies: rows and outputs aligned
            n, k = 16 * (n // 16 + 1), 16 * (k // 16 + 1)
        group = 64 if trial % 4 == 3 else None
        bits = 8 if trial % 5 == 0 else 4
        weight = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        scales = (n,) if group is None else (n, -(-k // group))
        weight_scale = torch.rand(scales, generator=generator) + 0.05
        bias = torch.randn(n, generator=generator) if trial % 3 else None
        rows = 3 * torch.randn((m, k), generator=generator)
        static = torch.tensor(0.6) if trial % 7 < 3 else None
        layer = gpu.PackedLinear(
            pack_int4(weight).to(device),
            weight_scale.to(device),
            columns=k,
            group=group,
            bias=None if bias is None else bias.to(device),
            activation_bits=bits,
            processors=132,
        )
        given = rows.to(device), None if static is None else static.to(device)
        found = layer(*given).cpu()
        scale = reference.row_scales(rows, bits) if static is None else static
        q = reference.quantize_rows(rows, scale, bits)
        wanted = reference.scaled_matmul(q, weight, weight_scale, group) * scale
        wanted = wanted if bias is None else wanted + bias
        if not torch.equal(found, wanted):
            raise MismatchError(
                f"layer {trial}, M {m}, N {n}, K {k}, group {group}, {bits}-bit activations: the "
                f"GPU differs from the reference by {float((found - wanted).abs().max()):.3g}"
            )
        if n % 2 == 0 and group is None:
            kind = _GATES[trial % 2]
            found = layer.gated(given[0], kind, given[1]).cpu()
            gate, up = wanted.double().chunk(2, dim=-1)
            _require_close(
                f"gated layer {trial}, M {m}, N {n}, K {k}",
                found,
                TORCH.gated_product(kind, gate, up),
                (gate.abs() + gate.square()) * up.abs(),
            )
    return {"layers_equal_bit_for_bit": trials}


def _check_rotation(device: str, heads: Tensor, shape: str) -> int:
    """Heads [B, h, T, d], rotated by themselves; how many were compared."""
    table = tuple(part[:, :1] for part in heads.chunk(2, dim=-1))
    if not table[0].numel():
        return 0
    found = rotate(heads.to(device), *(part.to(device) for part in table)).cpu()
    wanted = TORCH.rotate(heads, (table[0], table[1]))
    if not torch.equal(found, wanted):
        raise MismatchError(
            f"rotation {shape}: the GPU is off by {float((found - wanted).abs().max()):.3g} where "
            "it should give the same bits"
        )
    return 1


def check_elementwise(device: str, generator: torch.Generator, trials: int = 60) -> dict[str, int]:
    """Norms and gated products on the GPU against float64 on the CPU; rotations bit for bit.

    Raises:
        MismatchError: one is further off than float32 explains; names its shape.
    """
    compared = 0
    for trial in range(trials):
        batch, tokens, width = (
            int(torch.randint(1, top, (1,), generator=generator)) for top in (4, 80, 2100)
        )
        x = 3.0 * torch.randn((batch, tokens, width), generator=generator) + 0.5
        table = torch.randn((batch if trial % 2 else 1, 3, width), generator=generator)
        scale, shift, _ = (one.unsqueeze(1) for one in table.unbind(1))
        on_gpu = [one.unsqueeze(1) for one in table.to(device).unbind(1)]
        shape = f"of {batch} × {tokens} × {width}"
        size = 2.0 + scale.double().abs() * 8.0 + shift.double().abs()
        found = normalize(x.to(device), on_gpu[0], on_gpu[1], eps=RMS_EPS, centred=False)
        wanted = TORCH.adaptive_rms_norm(x.double(), scale.double(), shift.double())
        _require_close(f"RMS norm {shape}", found.cpu(), wanted, size)
        if width > 8:  # the spread of a few numbers may be rounding itself
            found = normalize(x.to(device), on_gpu[0], on_gpu[1], eps=RMS_EPS, centred=True)
            wanted = TORCH.adaptive_layer_norm(x.double(), scale.double(), shift.double(), RMS_EPS)
            _require_close(f"layer norm {shape}", found.cpu(), wanted, size)
        kind, other = _GATES[trial % 2], torch.randn(x.shape, generator=generator)
        product = gated_product(kind, x.to(device), other.to(device)).cpu()
        wanted = TORCH.gated_product(kind, x.double(), other.double())
        bound = (x.double().abs() + x.double().square()) * other.double().abs()
        _require_close(f"gated product {shape}", product, wanted, bound)
        compared += 3 if width > 8 else 2
        compared += _check_rotation(device, x[..., : width - width % 2].unsqueeze(1), shape)
    return {"elementwise_within_rounding": compared}


def _require_close(what: str, found: Tensor, wanted: Tensor, size: Tensor) -> None:
    """Within some float32 roundings of the size of its terms."""
    off = (found.double() - wanted).abs() / (size + 1e-20)
    if not bool((off <= _ROUNDINGS).all()):
        raise MismatchError(
            f"{what}: the GPU is off by {float(off.max()) * 2**24:.0f} roundings of its terms, "
            f"{_ROUNDINGS * 2**24:.0f} are allowed"
        )
