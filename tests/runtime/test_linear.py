"""``QuantizedLinear`` multiplies integers, exactly.

The oracle multiplies in int64 with numpy.  The module's float output may differ from the oracle's
float64 one by float32 rounding of a product of three numbers and of the sum over groups: 1e-5 of
the largest output is allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.errors import ObservationError, PolicyError, ResourceError
from omega_qvla.flow_time import FlowClock
from omega_qvla.runtime.kernels import cpu, reference
from omega_qvla.runtime.linear import QuantizedLinear, best_kernel
from omega_qvla.runtime.token_embedding import QuantizedEmbedding

RELATIVE = 1e-5


def integers(rows: int, columns: int, seed: int, bits: int = 4) -> Tensor:
    """Uniform over the whole range, with both ends certainly there."""
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    drawn[0, 0], drawn[-1, -1] = -limit, limit - 1
    return drawn


def make(weight: Tensor, **changes: Any) -> QuantizedLinear:
    """A module holding these 4-bit integers."""
    rows, columns = weight.shape
    arguments: dict[str, Any] = {
        "weight_packed": pack_int4(weight),
        "weight_scale": torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.1,
        "in_features": columns,
        "splits": (rows,),
        "activation_bits": 4,
        "transform": None,
        "permutation": None,
        "activation_scale": None,
        "activation_step_times": None,
        "bias": None,
        "group": None,
        "clock": FlowClock(),
    }
    return QuantizedLinear(**(arguments | changes))


def oracle(q: Tensor, weight: Tensor) -> np.ndarray:
    return q.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T


shapes = {
    "m": st.integers(1, 19),
    "n": st.integers(1, 40),
    "k": st.integers(1, 200),
    "seed": st.integers(0, 10**6),
}


@settings(deadline=None, max_examples=120)
@given(**shapes, bits=st.sampled_from([4, 8]))
def test_the_integer_product_equals_an_int64_oracle(
    m: int, n: int, k: int, seed: int, bits: int
) -> None:
    q, weight = integers(m, k, seed, bits), integers(n, k, seed + 1, bits)
    product = reference.integer_matmul(q, weight)
    assert product.dtype == torch.int32
    assert np.array_equal(product.numpy(), oracle(q, weight))


@pytest.mark.parametrize("k", [64, 4096, 16384])
def test_the_largest_magnitudes_do_not_saturate(k: int) -> None:
    """-8 · -8 and -128 · -128 in every place: kernels that add in int16 would overflow."""
    for low in (-8, -128):
        q, weight = (
            torch.full((3, k), low, dtype=torch.int8),
            torch.full((5, k), low).to(torch.int8),
        )
        assert bool((reference.integer_matmul(q, weight) == low * low * k).all())


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 20), k=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_unpacked_words_are_the_packed_integers(n: int, k: int, seed: int) -> None:
    weight = integers(n, k, seed)
    unpacked = reference.unpack_words(pack_int4(weight))
    assert torch.equal(unpacked[:, :k], weight)


@settings(deadline=None, max_examples=60)
@given(**shapes, group=st.sampled_from([None, 2, 16, 24, 64]), bias=st.booleans())
def test_the_output_is_the_scaled_integer_product(
    m: int, n: int, k: int, seed: int, group: int | None, bias: bool
) -> None:
    """Any width: not a multiple of the word (8), of the group, or of the block."""
    weight = integers(n, k, seed)
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group is None else -(-k // group)
    scale = torch.rand((n, groups), generator=generator) + 0.1
    module = make(
        weight,
        weight_scale=scale[:, 0].contiguous() if group is None else scale,
        group=group,
        bias=torch.randn(n, generator=generator) if bias else None,
    )
    x = torch.randn((m, k), generator=generator) * 5
    q, activation = module.quantize_input(x)
    assert int(q.min()) >= -8 and int(q.max()) <= 7
    assert torch.equal(module.integers()[:, :k], weight)
    size = k if group is None else group
    expected = np.zeros((m, n))
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, k))
        expected += oracle(q[:, part], weight[:, part]) * scale[:, g].double().numpy()
    expected *= activation.double().numpy()
    if module.bias is not None:
        expected += module.bias.double().numpy()
    found = module(x).numpy()
    assert np.abs(found - expected).max() <= RELATIVE * max(1.0, np.abs(expected).max())


def test_the_transform_is_applied_per_block_after_padding_and_permuting() -> None:
    k, block, padded = 12, 8, 16
    generator = torch.Generator().manual_seed(0)
    transform = torch.randn((2, block, block), generator=generator).bfloat16()
    permutation = torch.randperm(padded, generator=generator).to(torch.int32)
    module = make(
        integers(3, padded, 4), in_features=k, transform=transform, permutation=permutation
    )
    x = torch.randn((5, k), generator=generator)
    gathered = torch.nn.functional.pad(x, (0, padded - k))[:, permutation.long()]
    wanted = gathered @ torch.block_diag(*transform.float())
    largest = wanted.abs().amax(1, keepdim=True)
    q, scale = module.quantize_input(x)
    assert torch.allclose(scale, largest / 7, rtol=RELATIVE)
    assert torch.equal(q, (wanted * scale.reciprocal()).round().clamp(-8, 7).to(torch.int8))


def test_a_block_smaller_than_a_word_is_padded_to_whole_words() -> None:
    transform = torch.eye(4).repeat(3, 1, 1).bfloat16()
    weight = integers(2, 12, 0)
    module = make(weight, in_features=11, transform=transform)
    x = torch.randn((1, 11), generator=torch.Generator().manual_seed(0))
    q, scale = module.quantize_input(x)
    expected = oracle(q[:, :12], weight) * module.weight_scale.numpy() * scale.numpy()
    assert np.allclose(module(x).numpy(), expected, rtol=RELATIVE)


def test_no_floating_point_product_stands_in_for_the_integer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operands handed to the kernel are int8, and its result is what the output is made of."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    original = torch._int_mm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype))
        return original(a, b) + 1

    module, x = make(integers(3, 16, 0), kernel="reference"), torch.ones(2, 16)
    before = module(x)
    monkeypatch.setattr(torch, "_int_mm", spy)
    after = module(x)
    assert seen == [(torch.int8, torch.int8)]
    _, scale = module.quantize_input(x)
    assert torch.allclose(after - before, scale * module.weight_scale, rtol=1e-3)


def test_leading_dimensions_and_no_rows_are_kept() -> None:
    module = make(integers(6, 16, 0), splits=(4, 2))
    assert module(torch.ones(2, 3, 16)).shape == (2, 3, 6)
    assert module(torch.ones(0, 16)).shape == (0, 6)
    assert module(torch.zeros(2, 16)).abs().max() == 0
    assert module(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ObservationError, match="16 inputs"):
        make(integers(2, 16, 0))(torch.ones(1, 15))


def stepped(clock: FlowClock) -> QuantizedLinear:
    times = torch.tensor([1.0 - i / 10 for i in range(10)])
    scales = torch.linspace(0.1, 1.0, 10) ** 2
    return make(
        integers(2, 8, 0), activation_scale=scales, activation_step_times=times, clock=clock
    )


def test_static_scales_are_exact_at_calibrated_times_and_linear_between() -> None:
    """The clock counts in float64, the artifact stores float32: 0.9 must still mean step 1."""
    clock = FlowClock()
    module = stepped(clock)
    assert module.activation_scale is not None
    for i in range(10):
        with clock.step(i, 1.0 - i / 10):
            assert float(module.quantize_input(torch.ones(1, 8))[1]) == module.activation_scale[i]
    with clock.step(0, 0.85):
        middle = (module.activation_scale[1] + module.activation_scale[2]) / 2
        assert float(module.quantize_input(torch.ones(1, 8))[1]) == pytest.approx(float(middle))
    for time, index in ((0.01, 9), (2.0, 0)):
        with clock.step(0, time):
            found = float(module.quantize_input(torch.ones(1, 8))[1])
            assert found == module.activation_scale[index]


def test_static_scales_outside_any_step_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"clock\.step\(i, t\)"):
        stepped(FlowClock())(torch.ones(1, 8))


def test_an_embedding_expands_only_the_rows_looked_up() -> None:
    rows = torch.tensor([[1, -2], [127, 0]], dtype=torch.int8)
    embedding = QuantizedEmbedding(rows, torch.tensor([0.5, 2.0]), width=rows.shape[1])
    found = embedding(torch.tensor([[1, 0, 1]]))
    assert found.tolist() == [[[254.0, 0.0], [0.5, -1.0], [254.0, 0.0]]]


def test_without_the_extension_the_reference_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = integers(9, 40, 0), torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    wanted = make(weight)(x)
    monkeypatch.setattr(cpu, "_extension", None)
    assert best_kernel() == "reference"
    module = make(weight)
    assert module.kernel == "reference"
    assert torch.equal(module(x), wanted)
    with pytest.raises(ResourceError, match=r"g\+\+"):
        make(weight, kernel="avx2")


def test_a_kernel_that_cannot_do_the_layer_is_refused() -> None:
    if cpu.instruction_set() is None:
        pytest.skip("installed without a C++ compiler")
    eight_bits = integers(3, 16, 0, bits=8)
    assert make(integers(3, 16, 0), weight_packed=eight_bits).kernel == "reference"
    with pytest.raises(PolicyError, match="8-bit weights"):
        make(integers(3, 16, 0), weight_packed=eight_bits, kernel=best_kernel())


def test_a_prepared_module_keeps_its_weight_once_and_gives_it_back() -> None:
    weight = integers(40, 70, 3)
    module = make(weight)
    stored = module.stored()["weight_packed"]
    module.prepare()
    if module.kernel != "reference":
        assert module.weight_packed is None
    assert torch.equal(module.stored()["weight_packed"], stored)
    assert torch.equal(module.integers()[:, :70], weight)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_a_low_rank_branch_is_the_same_to_the_bit_however_it_lies_in_memory(rows: int) -> None:
    """As calibration makes it one factor is column by column; as it is loaded, row by row."""
    generator = torch.Generator().manual_seed(0)
    weight = integers(70, 96, 1)
    down = torch.randn(16, 96, generator=generator).bfloat16()
    up = torch.randn(70, 16, generator=generator).bfloat16()
    x = torch.randn(rows, 96, generator=generator)
    made = make(weight, low_rank_down=down, low_rank_up=up.t().contiguous().t())
    loaded = make(weight, low_rank_down=down.t().contiguous().t(), low_rank_up=up)
    assert torch.equal(made(x), loaded(x))
    assert made.low_rank_up is not None and loaded.low_rank_up is not None
    assert made.low_rank_up.stride() == loaded.low_rank_up.stride()
