from __future__ import annotations

import struct
import sys

import pytest

from omega_qvla.errors import MissingPackageError, ResourceError
from omega_qvla.report.figure import comparison_figure
from omega_qvla.results.reading import load_comparison

pytest.importorskip("matplotlib")

UNMEASURED = ("success_mean", "success_ci95", "action_error", "noise_floor", "smoothness")
UNMEASURED += ("checkpoint_bytes", "resident_bytes", "ms_per_chunk")


def size_of(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_a_picture_is_drawn_and_nothing_else_left(saved, tmp_path):
    target = tmp_path / "out" / "comparison.png"
    assert comparison_figure(load_comparison(saved).rows, target) == target
    width, height = size_of(target)
    assert width == 1800 and height > 300
    assert [path.name for path in target.parent.iterdir()] == ["comparison.png"]


def test_the_same_file_gives_the_same_picture(saved, tmp_path):
    first = comparison_figure(load_comparison(saved).rows, tmp_path / "a.png").read_bytes()
    assert comparison_figure(load_comparison(saved).rows, tmp_path / "b.png").read_bytes() == first


def test_more_recipes_make_it_taller_and_gaps_do_not_matter(row, read, tmp_path):
    missing = dict.fromkeys(UNMEASURED)
    short = comparison_figure(read(row("fp32", success={}, **missing)), tmp_path / "short.png")
    rows = [row(f"recipe-{n}", condition) for n in range(9) for condition in ("plain", "stress:9")]
    tall = comparison_figure(read(*rows, row("gap", **missing)), tmp_path / "tall.png")
    assert size_of(tall)[1] > 2 * size_of(short)[1]


def test_full_precision_without_rivals_is_drawn(row, read, tmp_path):
    comparison_figure(read(row("fp32", action_error=0.0)), tmp_path / "alone.png")


def test_missing_matplotlib_names_the_extra(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'matplotlib>=.*'report'"):
        comparison_figure(load_comparison(saved).rows, tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_a_place_that_cannot_be_written_is_named(saved):
    with pytest.raises(ResourceError, match="cannot write"):
        comparison_figure(load_comparison(saved).rows, saved / "below-a-file.png")
