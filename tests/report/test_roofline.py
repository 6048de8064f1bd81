"""The roofline is drawn from a saved kernel benchmark, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omega_qvla.errors import ResultError
from omega_qvla.report.roofline import roofline_figure

DOCUMENT = {
    "schema": 1,
    "machine": "a processor",
    "threads": 1,
    "peak_gmacs": {"avx2": 100.0, "generic": 4.0},
    "memory_gbytes": 20.0,
    "rows": [
        {"kernel": "avx2", "M": 10, "gmacs": 70.0},
        {"kernel": "torch fp32", "M": 10, "gmacs": 15.0},
    ],
}


GPU_DOCUMENT = {
    "schema": 1,
    "machine": "a GPU",
    "peak_gmacs": {"int8": 990_000.0},
    "memory_gbytes": 4000.0,
    "rows": [
        {"kernel": kernel, "M": 10, "gmacs": 9_000.0, "weights_in_cache": warm}
        for kernel in ("triton", "cuBLAS bf16")
        for warm in (False, True)
    ],
}


@pytest.mark.parametrize("document", [DOCUMENT, GPU_DOCUMENT], ids=["processor", "gpu"])
def test_a_saved_benchmark_becomes_a_picture(tmp_path: Path, document: object) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "k.json").write_text(json.dumps(document))
    picture = roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.parametrize("missing", ["machine", "peak_gmacs", "memory_gbytes", "rows"])
def test_what_is_not_a_kernel_benchmark_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "k.json").write_text(
        json.dumps({k: v for k, v in DOCUMENT.items() if k != missing})
    )
    with pytest.raises(ResultError, match="bench kernels"):
        roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
    (tmp_path / "k.json").write_text("[")
    with pytest.raises(ResultError, match="not JSON"):
        roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
