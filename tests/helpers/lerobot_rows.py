"""Every row of a dataset read by this library, against what LeRobot read from it.

What LeRobot read is in ``lerobot.json`` beside the dataset (``tests/lerobot/dataset_cases.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.calibration.lerobot import map_cameras
from omega_qvla.calibration.lerobot_frames import (
    Frame,
    ObservationReader,
    RowReader,
    UnreadableError,
)
from omega_qvla.calibration.lerobot_metadata import read_dataset


@dataclass
class Comparison:
    """Rows of a dataset, all cameras of a row taken together.

    Attributes:
        identical: read by both, and equal to the last byte: images, state and instruction.
        different: read by both, and not equal.
        missing: read by LeRobot alone.
        extra: read by this library alone.
        neither: read by none of the two.
        reasons: why this library did not read a row.
        displaced: rows that this library says LeRobot finds too far away in time by default.
    """

    identical: list[int] = field(default_factory=list)
    different: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    neither: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    displaced: int = 0


def compare_rows(
    root: Path, cameras: Sequence[str], order: Iterable[int] | None = None
) -> Comparison:
    """Read every row of a dataset and compare.

    Args:
        root: the dataset, with its ``lerobot.json``.
        cameras: their short names.
        order: in which the rows are read; ascending by default.
    """
    rows = json.loads((root / "lerobot.json").read_text())["rows"]
    dataset = read_dataset(root)
    reader = ObservationReader(dataset, map_cameras(dataset, list(cameras)))
    row_reader = RowReader(dataset, dataset.state_parts(None))
    found = Comparison()
    for number in range(len(rows)) if order is None else order:
        row = rows[number]
        expected = row["images"] or row.get("plain")
        (frame,) = row_reader.frames(dataset.episodes[row["episode"]], [row["frame"]])
        assert isinstance(frame, Frame), frame
        try:
            observation: Any = reader.read(frame)
        except UnreadableError as error:
            found.reasons.append(str(error))
            (found.missing if expected else found.neither).append(number)
            continue
        if expected is None:
            found.extra.append(number)
            continue
        equal = [
            expected[f"observation.images.{name}"] == digest(image)
            for name, image in observation["images"].items()
        ]
        equal.append(np.array_equal(observation["state"], np.asarray(row["state"], np.float32)))
        equal.append(observation["prompt"] == row["task"])
        (found.identical if all(equal) else found.different).append(number)
    found.displaced = len(reader.displaced)
    return found


def row_count(root: Path) -> int:
    """How many rows a dataset has."""
    return len(json.loads((root / "lerobot.json").read_text())["rows"])


def digest(image: np.ndarray) -> str:
    """SHA-256 of an image, uint8 [H, W, 3]."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
