"""The C++ kernels give the reference's integers and the reference's floats, bit for bit.

No tolerance anywhere: the integer product is exact, and the epilogue rounds in the order the
reference does.  The transform adds in the order of k with fused multiply-adds; its oracle does the
same in float64, where a product of two float32 is exact, and rounds to float32 after every sum.
"""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.errors import ObservationError, PolicyError, ResourceError
from omega_qvla.runtime.kernels import cpu, reference

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(cpu.instruction_set() is None, reason="installed without a C++ compiler"),
]
PATHS = cpu.instruction_sets()


def draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


class Layer:
    """Random operands, with both ends of the 4-bit range certainly among the weights."""

    def __init__(self, generator: torch.Generator, n: int, k: int, group: int | None) -> None:
        self.weight = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        self.weight[0, 0], self.weight[-1, -1] = -8, 7
        self.columns, self.group = k, group
        shape = (n,) if group is None else (n, -(-k // group))
        self.scale = torch.rand(shape, generator=generator) + 0.05
        self.bias: Tensor | None = None

    def packed(
        self, path: str, bits: int = 4, transform: Tensor | None = None, clip: float = 1.0
    ) -> cpu.PackedLinear:
        weight = self.weight
        if transform is not None:
            missing = transform.shape[0] * 64 - weight.shape[1]
            weight = torch.nn.functional.pad(weight, (0, missing))
        return cpu.PackedLinear(
            pack_int4(weight),
            self.scale,
            columns=self.columns,
            group=self.group,
            bias=self.bias,
            transform=transform,
            activation_bits=bits,
            activation_clip=clip,
            path=path,
        )

    def expected_centred(
        self, rows: Tensor, static: Tensor | None, offset: Tensor, bias: Tensor
    ) -> Tensor:
        """With an offset of the rows and the bias that comes with it."""
        own, self.bias = self.bias, bias
        found = self.expected(rows - offset, static, 4)
        self.bias = own
        return found

    def expected(self, rows: Tensor, static: Tensor | None, bits: int, clip: float = 1.0) -> Tensor:
        scale = reference.row_scales(rows, bits, clip) if static is None else static
        q = reference.quantize_rows(rows, scale, bits)
        y = reference.scaled_matmul(q, self.weight, self.scale, self.group) * scale
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("path", PATHS)
def test_five_thousand_random_layers_equal_the_reference_bit_for_bit(path: str) -> None:
    """Odd M and every tail of N and K; per-channel and group scales; static, dynamic, clipped."""
    generator = torch.Generator().manual_seed(PATHS.index(path))
    for trial in range(5000):
        m, n, k = draw(generator, 1, 30), draw(generator, 1, 70), draw(generator, 1, 200)
        group = (None, 64, None, 16, 128)[trial % 5]
        bits = 8 if trial % 4 == 0 else 4
        layer = Layer(generator, n, k, group)
        layer.bias = torch.randn(n, generator=generator) if trial % 2 else None
        rows = 3 * torch.randn((m, k), generator=generator)
        static = torch.tensor(0.6) if trial % 3 == 0 else None
        clip = (1.0, 0.85, 0.3)[trial % 7 % 3]
        found = layer.packed(path, bits, clip=clip)(rows, static, threads=1)
        wanted = layer.expected(rows, static, bits, clip)
        assert torch.equal(found, wanted), (trial, m, n, k, group, bits, clip)


def fused_transform(x: Tensor, transform: Tensor) -> Tensor:
    """x [M, K] T as a chain of fused multiply-adds over k, float32 [M, K']."""
    blocks = transform.shape[0]
    x = torch.nn.functional.pad(x, (0, 64 * blocks - x.shape[1])).view(-1, blocks, 64)
    total = torch.zeros_like(x)
    for k in range(64):
        product = x[:, :, k : k + 1].double() * transform[:, k].double()
        total = (total.double() + product).float()
    return total.reshape(-1, 64 * blocks)


@pytest.mark.parametrize("path", PATHS)
def test_the_fused_transform_gives_the_integers_of_its_oracle(path: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for trial in range(120):
        m, n, k = draw(generator, 1, 60), draw(generator, 1, 50), draw(generator, 1, 330)
        blocks = -(-k // 64)
        transform = (torch.randn((blocks, 64, 64), generator=generator) / 8).bfloat16()
        layer = Layer(generator, n, 64 * blocks, 64 if trial % 3 == 0 else None)
        layer.columns = k
        rows = torch.randn((m, k), generator=generator)
        static = torch.tensor(0.3) if trial % 2 else None
        found = layer.packed(path, transform=transform)(rows, static, threads=1)
        wanted = layer.expected(fused_transform(rows, transform), static, 4)
        assert torch.equal(found, wanted), (trial, m, n, k)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transformed", [False, True])
def test_offsets_are_subtracted_before_rounding_bit_for_bit(path: str, transformed: bool) -> None:
    """With and without a transform, every tail; the layer's own bias gives way to the call's."""
    generator = torch.Generator().manual_seed(11)
    for trial in range(120):
        m, n, k = draw(generator, 1, 60), draw(generator, 1, 70), draw(generator, 1, 330)
        blocks = -(-k // 64)
        transform = (torch.randn((blocks, 64, 64), generator=generator) / 8).bfloat16()
        width = 64 * blocks if transformed else k
        layer = Layer(generator, n, width, 64 if trial % 3 == 0 else None)
        layer.columns = k
        layer.bias = torch.randn(n, generator=generator) if trial % 2 else None
        rows = torch.randn((m, k), generator=generator)
        static = torch.tensor(0.3) if trial % 4 == 0 else None
        offset, bias = (torch.randn(size, generator=generator) for size in (width, n))
        packed = layer.packed(path, transform=transform if transformed else None)
        found = packed(rows, static, threads=1, offset=offset, bias=cpu.spread_bias(bias))
        exact = fused_transform(rows, transform) if transformed else rows
        assert torch.equal(found, layer.expected_centred(exact, static, offset, bias)), trial
        assert torch.equal(packed(rows, static), layer.expected(exact, static, 4)), trial


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("low", [-8, 7])
def test_the_largest_magnitudes_do_not_saturate(path: str, low: int) -> None:
    """16-bit sums would overflow first where every product is -8 · -8 or -8 · 7."""
    k = 16384
    words = pack_int4(torch.full((33, k), low, dtype=torch.int8))
    layer = cpu.PackedLinear(words, torch.ones(33), columns=k, path=path)
    rows = torch.full((13, k), -8.0)
    assert bool((layer(rows, torch.tensor(1.0)) == -8 * low * k).all())


@pytest.mark.parametrize("path", PATHS)
def test_threads_change_no_bit(path: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = Layer(generator, 300, 640, None)
    packed = layer.packed(path)
    for m in (1, 2, 13, 57):
        rows = torch.randn((m, 640), generator=generator)
        alone = packed(rows, None, threads=1)
        for threads in range(2, 5):
            for _ in range(20):
                assert torch.equal(packed(rows, None, threads=threads), alone)


@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 70), k=st.integers(1, 140), seed=st.integers(0, 10**6))
def test_panels_hold_the_words_and_give_them_back(n: int, k: int, seed: int) -> None:
    weight = torch.randint(
        -8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    words, padded = pack_int4(weight), cpu.padded_width(k, None)
    panels = cpu.pack_panels(words, k, padded)
    assert torch.equal(cpu.unpack_panels(panels, n, k, padded), words)
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 3)):
        byte = int(panels[row // 32, column // 4, 4 * (row % 16) + column % 4])
        nibble = byte & 15 if row % 32 < 16 else byte >> 4
        assert nibble - 8 == int(weight[row, column])


def small() -> cpu.PackedLinear:
    return Layer(torch.Generator().manual_seed(0), 5, 12, None).packed(PATHS[0])


def test_no_rows_give_no_rows() -> None:
    assert small()(torch.zeros((0, 12))).shape == (0, 5)


def test_rows_may_lie_apart_and_misaligned() -> None:
    layer, storage = small(), torch.randn(4 * 20 + 1)
    rows = storage[1:].view(4, 20)[:, 3:15]
    assert torch.equal(layer(rows), layer(rows.contiguous()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros((2, 12), dtype=torch.float64), "torch.float64"),
        (torch.zeros((2, 12), dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros((2, 11)), r"\[2, 11\]"),
        (torch.zeros(12), r"\[12\]"),
        (torch.zeros((12, 2)).t(), "contiguous"),
        (torch.zeros((2, 12), device="meta"), "meta"),
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
        {"words": torch.zeros((2, 5), dtype=torch.int32).t()},
        {"weight_scale": torch.ones(4)},
        {"weight_scale": torch.ones(5, dtype=torch.float64)},
        {"bias": torch.ones(6)},
        {"transform": torch.ones(1, 32, 32, dtype=torch.bfloat16)},
        {"group": 6},
        {"activation_bits": 5},
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "words": torch.zeros((5, 2), dtype=torch.int32),
        "weight_scale": torch.ones(5),
        "columns": 12,
    }
    with pytest.raises(PolicyError):
        cpu.PackedLinear(**(arguments | changes))  # pyright: ignore[reportArgumentType]


def test_a_path_this_processor_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ResourceError, match="z80"):
        Layer(torch.Generator(), 5, 12, None).packed("z80")


def test_the_peak_of_every_path_can_be_measured() -> None:
    for path in PATHS:
        assert cpu.peak_macs(path, seconds=0.002) > 0


def _in_child(connection: object, rows: Tensor) -> None:
    connection.send(float(small()(rows, None, threads=2).double().sum()))  # type: ignore[attr-defined]


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    """Threads do not survive fork; a child that waited for its parent's would hang."""
    rows = torch.ones((3, 12))
    expected = float(small()(rows, None, threads=2).double().sum())
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(theirs, rows))
    child.start()
    assert ours.poll(60), "the child hangs"
    assert ours.recv() == expected
    child.join(60)
    assert child.exitcode == 0


def test_calls_from_many_threads_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(5)
    layer = Layer(generator, 90, 256, None).packed(PATHS[0])
    rows = [torch.randn((m, 256), generator=generator) for m in (3, 8, 21, 40)]
    wanted = [layer(x, None, threads=1) for x in rows]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(100):
            if not torch.equal(layer(rows[index], None, threads=2), wanted[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert wrong == []


def operator_arguments(layer: cpu.PackedLinear, x: Tensor) -> tuple[object, ...]:
    operands = (x, layer.panels, layer.weight_scale, layer.bias, layer.transform, None, None)
    path = cpu.path_number(PATHS[0])
    return (*operands, layer.out_features, layer.group, layer.activation_bits, 1.0, path, 1)


def test_the_operator_passes_opcheck() -> None:
    layer = small()
    torch.library.opcheck(
        torch.ops.omega_qvla.w4a4_linear.default, operator_arguments(layer, torch.randn(3, 12))
    )


def test_a_compiled_graph_calls_the_operator_and_gives_the_same_bits() -> None:
    layer, x = small(), torch.randn(3, 12)

    def double(rows: Tensor) -> Tensor:
        return layer(rows * 2) + 1

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), double(x))
