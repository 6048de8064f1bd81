"""Datasets that LeRobot wrote, against what LeRobot itself read from them, byte for byte.

``golden/lerobot_datasets.zip`` holds datasets of LeRobot 0.6.1 and SHA-256 of the frames it decoded
(PyAV 15.1, FFmpeg 7.1).  ``tests/lerobot/dataset_cases.py`` makes it.
"""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lerobot_rows import compare_rows, row_count

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError

GOLDEN = Path(__file__).parent / "golden" / "lerobot_datasets.zip"
CAMERAS = ("base", "wrist")

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="the frames were decoded on x86-64; FFmpeg rounds colours differently elsewhere",
)

READ = {
    "png": 31,
    "av1": 31,
    "bt709": 31,
    "h264-open-joined": 62,
    "hevc-default": 31,
    "intra-refresh": 31,
    "30-fps-video-open": 20,
    "uneven-open": 20,
    "first-pts-2-open": 29,
    "late": 1,
    "depth-video": 8,
}
"""Rows of each dataset that LeRobot's decoder has a frame for, at its default tolerance."""


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("pyarrow", "av", "PIL"):
        pytest.importorskip(name, reason="the extra `data` is not installed")
    folder = tmp_path_factory.mktemp("lerobot_datasets")
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("order", ["ascending", "drawn"])
def test_every_row_is_what_lerobot_shows(golden: Path, case: str, order: str) -> None:
    """Open groups of pictures included, where LeRobot alone does not find every frame."""
    count = row_count(golden / case)
    drawn = np.random.default_rng(0).permutation(count)
    numbers = range(count) if order == "ascending" else drawn
    found = compare_rows(golden / case, CAMERAS, numbers)
    assert (len(found.identical), found.different, found.missing) == (READ[case], [], [])


def test_rows_before_the_first_frame_are_left_out_and_say_where_it_is(golden: Path) -> None:
    found = compare_rows(golden / "first-pts-2-open", CAMERAS)
    assert found.neither == [0, 1] and not found.extra
    assert all("the nearest is at 0.200 s" in reason for reason in found.reasons)


def test_images_that_lerobot_finds_too_far_away_are_counted_and_said(golden: Path) -> None:
    found = compare_rows(golden / "late", CAMERAS)
    assert found.displaced == len(found.extra) == 19
    observations = Observations.from_lerobot(golden / "late", limit=64)
    assert observations.report is not None
    (remark,) = [line for line in observations.report.lines() if "tolerance_s" in line]
    assert "of 10 frames" in remark and "0.0001" in remark


def test_a_depth_map_is_left_out_unless_it_is_asked_for_which_is_refused(golden: Path) -> None:
    observations = Observations.from_lerobot(golden / "depth-video")
    assert set(observations[0]["images"]) == set(CAMERAS)
    assert observations.report is not None
    assert any("observation.images.depth" in line for line in observations.report.lines())
    with pytest.raises(ObservationError, match=r"depth.*is a depth map"):
        Observations.from_lerobot(golden / "depth-video", cameras={"base": "depth"})
