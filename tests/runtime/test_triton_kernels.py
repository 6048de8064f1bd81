"""Under Triton's interpreter the GPU kernels give the reference's integers and floats, bit for bit.

No tolerance, but where a transform of arbitrary numbers is added up in another order.  What this
does not prove is that a GPU does what the interpreter does: ``test_triton_machine_code.py`` looks
at what it would be given, and only ``make bench-gpu`` runs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted_triton import Call, Chunk, Interpreter, numpy_operands
from torch import Tensor

import omega_qvla as oq
from omega_qvla.artifact.packing import pack_int4
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.runtime.kernels import reference
from omega_qvla.runtime.kernels import triton as gpu
from omega_qvla.runtime.kernels import triton_layout as layout
from omega_qvla.runtime.kernels.triton_tuning import Tiling

pytestmark = pytest.mark.emulated

needs_triton = pytest.mark.usefixtures("interpreted")

TILINGS = (
    Tiling(rows=16, outputs=64, bytes=64, parts=3, warps=4, stages=2),
    Tiling(rows=32, outputs=64, bytes=128, parts=2, warps=4, stages=4),
    Tiling(rows=64, outputs=128, bytes=64, parts=1, warps=8, stages=3),
)


def integers(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """4-bit integers over the whole range, with both ends certainly there."""
    drawn = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    drawn[0, 0], drawn[-1, -1] = -8, 7
    return drawn


def expected(
    rows: Tensor, weight: Tensor, operands: dict[str, Any], static: float | None
) -> tuple[Tensor, Tensor]:
    """The reference's integers and output, of rows that have been transformed."""
    bits, bias = operands["activation_bits"], operands["bias"]
    missing = weight.shape[1] - rows.shape[1]
    rows = torch.nn.functional.pad(rows.float(), (0, missing))
    clip = operands.get("activation_clip", 1.0)
    scale = reference.row_scales(rows, bits, clip) if static is None else torch.tensor(static)
    q = reference.quantize_rows(rows, scale, bits)
    y = reference.scaled_matmul(q, weight, operands["weight_scale"], operands["group"]) * scale
    return q, y if bias is None else y + bias


def check_layer(
    interpreted: Interpreter,
    *,
    m: int,
    n: int,
    k: int,
    seed: int,
    bits: int,
    group: int | None,
    static: float | None,
    biased: bool,
    clip: float = 1.0,
    centred: bool = False,
    tilings: tuple[Tiling, ...] = TILINGS,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = integers(n, k, generator)
    scales = (n,) if group is None else (n, -(-k // group))
    operands: dict[str, Any] = {
        "words": pack_int4(weight),
        "weight_scale": torch.rand(scales, generator=generator) + 0.05,
        "columns": k,
        "group": group,
        "bias": torch.randn(n, generator=generator) if biased else None,
        "activation_bits": bits,
        "activation_clip": clip,
        "processors": 8,
    }
    rows = 3 * torch.randn((m, k), generator=generator)
    offset = torch.randn(k, generator=generator) if centred else None
    bias = torch.randn(n, generator=generator) if centred else None
    q, y = expected(
        rows if offset is None else rows - offset,
        weight,
        operands if bias is None else {**operands, "bias": bias},
        static,
    )
    call = Call(
        numpy_operands(**operands),
        rows.numpy(),
        static,
        tilings=() if group else tilings,
        offset=None if offset is None else offset.numpy(),
        bias=None if bias is None else bias.numpy(),
    )
    found = interpreted(call)
    assert np.array_equal(found.integers[:, :k], q.numpy())
    assert not found.integers[:, k:].any()
    for output in (found.output, *found.tiled):
        assert np.array_equal(output, y.numpy())


layers = {
    "m": st.integers(1, 40),
    "n": st.integers(1, 80),
    "k": st.integers(1, 300),
    "seed": st.integers(0, 10**6),
    "bits": st.sampled_from([4, 8]),
    "group": st.sampled_from([None, None, 64]),
    "static": st.sampled_from([None, 0.6]),
    "biased": st.booleans(),
    "clip": st.sampled_from([1.0, 0.85]),
    "centred": st.booleans(),
}
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@needs_triton
@settings(relaxed, max_examples=7)
@given(**layers)
def test_layers_equal_the_reference_bit_for_bit(interpreted: Interpreter, **layer: Any) -> None:
    """Every tail of M, N and K; static and per-token scales; cut along K or not."""
    check_layer(interpreted, **layer)


@needs_triton
@pytest.mark.slow
@settings(relaxed, max_examples=600)
@given(**layers)
def test_many_layers_equal_the_reference_bit_for_bit(
    interpreted: Interpreter, **layer: Any
) -> None:
    check_layer(interpreted, **layer)


@needs_triton
@pytest.mark.parametrize(
    ("bits", "low", "k"),
    [
        (4, -8, 1024),
        (4, 7, 1024),
        (8, -128, 1024),
        pytest.param(8, -128, (1 << 17) - 1, marks=pytest.mark.slow),
    ],
)
def test_the_largest_magnitudes_do_not_overflow(
    interpreted: Interpreter, bits: int, low: int, k: int
) -> None:
    """-8 · -128 in every place, 16-fold, is the largest sum there can be."""
    operands = numpy_operands(
        words=pack_int4(torch.full((3, k), -8, dtype=torch.int8)),
        weight_scale=torch.ones(3),
        columns=k,
        activation_bits=bits,
    )
    call = Call(operands, np.full((2, k), low, np.float32), 1.0, tilings=TILINGS[1:2])
    found = interpreted(call)
    assert (found.output == -8 * low * k).all() and (found.tiled[0] == -8 * low * k).all()


@needs_triton
def test_halves_are_rounded_to_even_and_ends_are_clamped(interpreted: Interpreter) -> None:
    values = torch.tensor([[-9.0, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 1e30]])
    operands = numpy_operands(
        words=pack_int4(torch.zeros((1, 12), dtype=torch.int8)),
        weight_scale=torch.ones(1),
        columns=12,
    )
    found = interpreted(Call(operands, values.numpy(), 1.0))
    assert found.integers[0, :12].tolist() == [-8, -8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7]


@needs_triton
def test_rows_of_zeros_have_scale_one(interpreted: Interpreter) -> None:
    operands = numpy_operands(
        words=pack_int4(torch.ones((2, 70), dtype=torch.int8)),
        weight_scale=torch.ones(2),
        columns=70,
    )
    found = interpreted(Call(operands, np.zeros((3, 70), np.float32)))
    assert not found.output.any()


def transformed_layer(
    seed: int, k: int, n: int, bits: int, transform: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    weight = integers(n, 64 * transform.shape[0], generator)
    return weight, {
        "words": pack_int4(weight),
        "weight_scale": torch.rand(n, generator=generator) + 0.05,
        "columns": k,
        "group": None,
        "transform": transform,
        "bias": None,
        "activation_bits": bits,
    }


@needs_triton
@settings(relaxed, max_examples=5)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 330),
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([4, 8]),
    static=st.sampled_from([None, 3.7]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_transform_gives_the_integers_of_the_reference(
    interpreted: Interpreter,
    m: int,
    k: int,
    seed: int,
    bits: int,
    static: float | None,
    dtype: str,
) -> None:
    """Small integers times halves: every sum is exact, in whatever order it is made."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-k // 64)
    drawn = torch.randint(-4, 5, (blocks, 64, 64), generator=generator)
    transform = (drawn / 2).bfloat16()
    rows = torch.randint(-9, 10, (m, k), generator=generator).float()
    weight, operands = transformed_layer(seed, k, 20, bits, transform)
    q, y = expected(reference.transform_blocks(rows, transform), weight, operands, static)
    found = interpreted(Call(numpy_operands(**operands), rows.numpy(), static, dtype))
    assert np.array_equal(found.integers[:, : q.shape[1]], q.numpy())
    if dtype == "float32":
        assert np.array_equal(found.output, y.numpy())
    else:  # the interpreter, unlike a GPU, cuts float32 off when it narrows it to bfloat16
        assert np.allclose(found.output, y.numpy(), rtol=2**-7, atol=0.0)


@needs_triton
@pytest.mark.parametrize("static", [None, 0.4])
def test_the_transform_of_any_numbers_rounds_to_the_nearest_integer(
    interpreted: Interpreter, static: float | None
) -> None:
    """Sums of 64 float32 products are off by less than 1e-5 here: so much past a half may be."""
    generator = torch.Generator().manual_seed(11)
    transform = (torch.randn((5, 64, 64), generator=generator) / 8).bfloat16()
    rows = torch.randn((33, 300), generator=generator)
    _, operands = transformed_layer(11, 300, 8, 4, transform)
    exact = torch.nn.functional.pad(rows, (0, 20)).double().view(33, 5, 1, 64)
    exact = (exact @ transform.double()).view(33, 320)
    scale = exact.abs().amax(1, keepdim=True) / 7 if static is None else torch.tensor(static)
    found = interpreted(Call(numpy_operands(**operands), rows.numpy(), static))
    distance = (exact / scale).clamp(-8, 7) - torch.from_numpy(found.integers[:, :320])
    assert float(distance.abs().max()) <= 0.5 + 1e-5


@needs_triton
@pytest.mark.parametrize(
    "family", ["small_policy", pytest.param("small_gr00t", marks=pytest.mark.slow)]
)
def test_a_whole_policy_acts_as_with_the_reference_kernel(
    interpreted: Interpreter,
    family: str,
    request: pytest.FixtureRequest,
    few: Observations,
    noise: np.ndarray,
    tmp_path: Path,
) -> None:
    """Fused sites, biases, step scales by the clock.  Transforms are added up in another order,
    and a value between two integers may fall to the other side; none does by much."""
    policy = request.getfixturevalue(family)
    oq.quantize(policy, few, "omega-w4a4-static").save_pretrained(tmp_path / "out")
    found = interpreted.array(Chunk(tmp_path / "out", dict(few[0]), noise))
    loaded: Any = oq.load(tmp_path / "out", kernel="reference").policy
    wanted = loaded.sample_normalized(few[0], noise).numpy()
    assert np.square(found - wanted).mean() < 1e-4 * np.square(wanted).mean()


def test_the_interpreter_does_not_leak_into_other_tests() -> None:
    assert "TRITON_INTERPRET" not in os.environ


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 70), k=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_packed_bytes_hold_the_words_and_give_them_back(n: int, k: int, seed: int) -> None:
    weight = integers(n, k, torch.Generator().manual_seed(seed))
    words = pack_int4(weight)
    packed = layout.pack(words, k)
    assert torch.equal(layout.unpack(packed, k), words)
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 3)):
        byte = packed[row, column // 128 * 64 + column % 64]
        nibble = byte if column % 128 >= 64 else byte << 4
        assert int(nibble >> 4) == int(weight[row, column])


def test_packing_needs_no_more_memory_than_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows converted together do not see each other: the result is that of all at once."""
    weight = integers(2100, 200, torch.Generator().manual_seed(1))
    whole = layout.pack(pack_int4(weight), 200)
    monkeypatch.setattr(layout, "_ROWS_AT_ONCE", 7)
    assert torch.equal(layout.pack(pack_int4(weight), 200), whole)
    assert torch.equal(layout.unpack(whole, 200), pack_int4(weight))


def small(**changes: Any) -> gpu.PackedLinear:
    pytest.importorskip("triton", reason="Triton is not installed: make gpu")
    arguments: dict[str, Any] = {
        "words": torch.zeros((5, 2), dtype=torch.int32),
        "weight_scale": torch.ones(5),
        "columns": 12,
    }
    return gpu.PackedLinear(**(arguments | changes))


def test_no_rows_give_no_rows() -> None:
    assert small()(torch.zeros((0, 12))).shape == (0, 5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros((2, 12), dtype=torch.float64), "torch.float64"),
        (torch.zeros((2, 11)), r"\[2, 11\]"),
        (torch.zeros(12), r"\[12\]"),
        (torch.zeros((12, 2)).t(), "contiguous"),
        (torch.zeros((2, 12), device="meta"), "meta"),
        (torch.zeros((1, 12)).expand(1 << 25, 12), "fewer rows"),
    ],
)
def test_inputs_the_kernel_cannot_read_are_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        small()(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"words": torch.zeros((5, 2), dtype=torch.int64)},
        {"words": torch.zeros((5, 3), dtype=torch.int32)},
        {"weight_scale": torch.ones(4)},
        {"weight_scale": torch.ones(5, device="meta")},
        {"bias": torch.ones(6)},
        {"transform": torch.ones(1, 32, 32, dtype=torch.bfloat16)},
        {"group": 32, "weight_scale": torch.ones((5, 1))},
        {"activation_bits": 5},
        {"columns": 1 << 17, "words": torch.zeros((1, 1 << 14), dtype=torch.int32)},
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        small(**changes)
