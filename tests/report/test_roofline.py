"""The roofline is drawn from a saved kernel benchmark, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omega_qvla.report.results import ReportError
from omega_qvla.report.roofline import roofline_figure

DOCUMENT = {
    "machine": "a processor",
    "threads": 1,
    "peak_gmacs": {"avx2": 100.0, "generic": 4.0},
    "memory_gbytes": 20.0,
    "rows": [
        {"kernel": "avx2", "M": 10, "gmacs": 70.0},
        {"kernel": "torch fp32", "M": 10, "gmacs": 15.0},
    ],
}


def test_a_saved_benchmark_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "k.json").write_text(json.dumps(DOCUMENT))
    picture = roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.parametrize("missing", ["machine", "threads", "peak_gmacs", "memory_gbytes", "rows"])
def test_what_is_not_a_kernel_benchmark_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "k.json").write_text(
        json.dumps({k: v for k, v in DOCUMENT.items() if k != missing})
    )
    with pytest.raises(ReportError, match="bench kernels"):
        roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
    (tmp_path / "k.json").write_text("[")
    with pytest.raises(ReportError, match="cannot read"):
        roofline_figure(tmp_path / "k.json", tmp_path / "k.png")
