"""llama.cpp as a peer: real libraries where they are installed, clear words where they are not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.speed.llama_cpp import Ggml, random_weight


def libraries() -> Path:
    """The folder of the libraries that llama-cpp-python brings."""
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    return Path(found.origin).parent / "lib"


def test_a_folder_without_the_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"libggml-base\.so.*llama-cpp-python"):
        Ggml(tmp_path)


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    for name in ("ggml-base", "ggml-cpu", "ggml"):
        (tmp_path / f"lib{name}.so").write_bytes(b"not a library")
    with pytest.raises(ResourceError, match="libggml-base"):
        Ggml(tmp_path)


@pytest.mark.parametrize("out_features", [32, 36])  # with and without the repacked layout
def test_it_multiplies_the_weight_it_was_given(out_features: int) -> None:
    ggml = Ggml(libraries())
    rows = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
    call = ggml.linear(rows, out_features, copies=2, threads=1)
    exact = rows @ random_weight(out_features, 64, seed=0).t()
    for _ in range(3):  # both copies, and the first again
        error = (call() - exact).norm() / exact.norm()
        assert error < 0.15  # Q4_0 rounds normal weights to about 8 %


def test_rows_that_are_no_whole_blocks_cannot_be_stored() -> None:
    ggml = Ggml(libraries())
    assert ggml.supports(4096) and not ggml.supports(4304)
