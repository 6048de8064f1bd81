"""The GPU programs compile without a GPU, and what they compile to multiplies integers.

Read in the disassembled machine code: every product of weights is made by integer tensor-core
instructions (``IMMA``; ``IGMMA`` on Hopper) and by no other.  Read in PTX: rounding is what
the reference does, so no contraction, no approximate division, no flushing of small numbers.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from omega_qvla.errors import ResourceError
from omega_qvla.runtime.kernels import triton_gpu as gpu

CAPABILITIES = (80, 87, 89, 90, 100, 120)
"""A100, Orin, RTX 4090, H200, B200, RTX 5090; Thor (110) reads like 100."""
TYPES = {
    "x": "*fp32",
    "transform": "*bf16",
    "integers": "*i8",
    "weights": "*i8",
    "partial": "*i32",
    **dict.fromkeys(("scale", "scales", "maxima", "weight_scale", "bias", "out"), "*fp32"),
    **dict.fromkeys(("offset", "gate", "up", "shift", "cosine", "sine"), "*fp32"),
}
ALIGNED = {*TYPES, "width", "size", "half", "stride", "share"}
"""Arguments that are multiples of 16 in every layer of the policies."""
SMALL: dict[str, Any] = {
    "CLIP": 0.85,
    "ROWS": 16,
    "OUTPUTS": 64,
    "BYTES": 64,
    "LIMIT": 8,
    "KIND": "silu",
}
LARGE: dict[str, Any] = {
    "KIND": "gelu_tanh",
    "CLIP": 1.0,
    "ROWS": 128,
    "OUTPUTS": 128,
    "BYTES": 64,
    "LIMIT": 128,
}
ABSENT = SMALL | dict.fromkeys(("transform", "offset", "bias"))
"""A layer with neither transform nor offset nor bias."""
ONES = ABSENT | dict.fromkeys(("count", "blocks", "parts", "share", "size", "per_row", "groups"), 1)
"""One row, one block, one part, one output."""
pytestmark = pytest.mark.emulated

EXACT = ("multiply", "multiply_part", "multiply_grouped")
PRODUCTS = (*EXACT, "multiply_gated")
PROGRAMS = (
    *PRODUCTS,
    "add_parts",
    "add_parts_gated",
    "quantize_static",
    "quantize_dynamic",
    "row_maxima",
)
BETWEEN: dict[str, dict[str, Any]] = {
    "normalize": {"BASE": 1.0, "EPS": 1e-6, "CENTRED": True, "WIDTH": 2048},
    "gated_product": {"KIND": "gelu_tanh", "WIDTH": 1024},
    "rotate": {"HALF": 128},
}
"""Programs between two products."""


@pytest.fixture(scope="module")
def device() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed: make gpu")
    return gpu.programs()


def compile_program(
    program: Any,
    capability: int,
    sizes: dict[str, Any],
    folder: Path,
    types: dict[str, str] = TYPES,
) -> Any:
    """One program for one GPU, with nothing taken from an earlier run.

    Arguments named in ``sizes`` are constants, as Triton makes of None and of 1 when it is called.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = program.arg_names
    constants = {name: sizes[name] for name in names if name in sizes}
    source = ASTSource(
        fn=program,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in ALIGNED and name not in constants
        },
    )
    options = {
        "num_warps": 8 if sizes is LARGE else 4,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def machine_code(compiled: Any, folder: Path) -> str:
    """The disassembly, by the tool that comes with Triton."""
    import triton

    binary = folder / "program.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    done = subprocess.run(
        [tool, "-c", binary], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def check_product(compiled: Any, capability: int, folder: Path, *, exact: bool = True) -> None:
    """Integer matrix instructions and no others; ``exact``: nothing contracted either, which the
    division in a gate is made of."""
    code = machine_code(compiled, folder)
    wanted = "IGMMA" if capability == 90 else "IMMA"
    assert re.search(rf"\b{wanted}\.\S*S8\S*\.S8", code), f"no int8 {wanted} for sm_{capability}"
    assert not re.search(r"\b(HMMA|HGMMA|DMMA|UTCHMMA|QGMMA)\b", code)
    assert not exact or "FFMA" not in code


def check_rounding(ptx: str) -> None:
    assert "fma.rn.f32" not in ptx and ".ftz" not in ptx
    assert not re.search(r"\b(div\.full|div\.approx|rcp\.approx)", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_product_is_made_of_integer_matrix_instructions(
    device: ModuleType, capability: int, tmp_path: Path
) -> None:
    compiled = compile_program(device.multiply_part, capability, SMALL, tmp_path)
    check_product(compiled, capability, tmp_path)
    if capability == 90:  # widened weights are not written to shared memory again
        assert re.search(r"IGMMA\.\S+ R\d+, R\d+, gdesc", machine_code(compiled, tmp_path))


@pytest.mark.parametrize("name", sorted({*PROGRAMS} - {"multiply_part"}))
def test_every_program_compiles_and_rounds_as_the_reference_does(
    device: ModuleType, name: str, tmp_path: Path
) -> None:
    compiled = compile_program(getattr(device, name), 80, ABSENT, tmp_path)
    check_rounding(compiled.asm["ptx"])
    if name in PRODUCTS:
        check_product(compiled, 80, tmp_path, exact=name in EXACT)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_between_two_products_compiles_and_divides_exactly(
    device: ModuleType, name: str, tmp_path: Path
) -> None:
    programs = importlib.import_module("omega_qvla.runtime.kernels.triton_elementwise_device")
    for capability in (80, 120):
        compiled = compile_program(getattr(programs, name), capability, BETWEEN[name], tmp_path)
        check_rounding(compiled.asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("absent", [{}, {"shift": None}], ids=["modulated", "gain"])
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_between_two_products_on_every_gpu(
    device: ModuleType, capability: int, name: str, absent: dict[str, Any], tmp_path: Path
) -> None:
    programs = importlib.import_module("omega_qvla.runtime.kernels.triton_elementwise_device")
    sizes = BETWEEN[name] | absent
    check_rounding(compile_program(getattr(programs, name), capability, sizes, tmp_path).asm["ptx"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adding_a_bias_is_not_contracted_with_anything(
    device: ModuleType, capability: int, tmp_path: Path
) -> None:
    """A scaled product and its sum with the bias are rounded one after the other, on every GPU."""
    compiled = compile_program(device.add_parts, capability, SMALL, tmp_path)
    check_rounding(compiled.asm["ptx"])
    assert not re.search(r"\bFFMA\b", machine_code(compiled, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_of_16_bits_compile_too(
    device: ModuleType, name: str, dtype: str, tmp_path: Path
) -> None:
    types = TYPES | {name: f"*{dtype}" for name in ("x", "out")}
    compiled = compile_program(getattr(device, name), 90, SMALL, tmp_path, types)
    check_rounding(compiled.asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [SMALL, ABSENT, ONES, LARGE], ids=["small", "absent", "ones", "large"]
)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_program_on_every_gpu(
    device: ModuleType, capability: int, name: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    compiled = compile_program(getattr(device, name), capability, sizes, tmp_path)
    check_rounding(compiled.asm["ptx"])
    if name in PRODUCTS:
        check_product(compiled, capability, tmp_path, exact=name in EXACT)


def test_a_triton_that_is_too_old_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"3\.2\.0 is too old"):
        gpu.check_version("3.2.0")
    gpu.check_version("3.7.1")
    gpu.check_version("4.0.0+git1234")
