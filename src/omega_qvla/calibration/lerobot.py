"""Observations from a LeRobot dataset: mapped names, chosen frames, read when they are needed.

What is read, in this order: the description (``lerobot_metadata``), a plan of frames over all tasks
and over whole episodes (``sampling``), those frames' rows (``parquet``), and their images, one at a
time (``video``, or encoded images in the parquet files).  Every image is decoded once here, so that
a damaged one is known, counted and left out before any work starts; after that only numbers and
digests stay in memory and images are decoded again on access.

The image of a row is the frame whose timestamp is the row's, as LeRobot and Isaac-GR00T choose it;
where there is none within half a frame period the row is left out.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.calibration.lerobot_metadata import (
    INFO,
    Episode,
    LeRobotDataset,
    StatePart,
    contained,
    read_dataset,
)
from omega_qvla.calibration.parquet import (
    column_names,
    episode_rows,
    read_image_row,
    read_rows,
)
from omega_qvla.calibration.sampling import SPLITS, Span, plan_frames
from omega_qvla.calibration.streamed import Skipped, SourceReport, Streamed
from omega_qvla.calibration.video import Video
from omega_qvla.errors import ObservationError, ResourceError
from omega_qvla.policies.base import Observation

Cameras = Sequence[str] | Mapping[str, str | None] | None
"""The policy's cameras: names, or name → the dataset's camera; None leaves that camera out."""

ENOUGH = 0.5
"""The part of the chosen frames that must be readable."""

_OPEN_VIDEOS = 8
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_IMAGE_PIXELS = 1 << 26


@dataclass(frozen=True)
class Frame:
    """One row of a dataset, without its images."""

    episode: Episode
    number: int
    row: int
    time: float
    state: np.ndarray
    prompt: str

    @property
    def place(self) -> str:
        """For messages."""
        return f"episode {self.episode.index}, frame {self.number}"


def stream_lerobot(
    root: Path,
    *,
    cameras: Cameras = None,
    state: Sequence[str] | None = None,
    instruction: str | None = None,
    split: str = "calibration",
    limit: int = 64,
    seed: int = 0,
) -> tuple[Streamed, SourceReport]:
    """Choose frames of a dataset and check that they can be read.

    Args:
        root: the dataset's directory.
        cameras: see ``Cameras``; by default the dataset's own.
        state: features or GR00T's names that the state is put together from, in this order; by
            default the whole ``observation.state``.
        instruction: what every frame was told, for datasets whose tasks have no words.
        split: ``calibration``, or ``heldout`` for the frames between those.
        limit: how many observations at most.
        seed: of the choice.

    Returns:
        The observations, and what was left out.

    Raises:
        ObservationError: the dataset is incomplete or invalid, a name is not in it, or fewer than
            half of the chosen frames can be read.
        ResourceError: pyarrow, PyAV or Pillow is not installed.
    """
    if split not in SPLITS:
        raise ObservationError(f"{root} has no split {split!r}; it has {', '.join(SPLITS)}")
    if limit < 1:
        raise ObservationError(f"limit is {limit}; calibration needs at least one observation")
    if instruction is not None and not instruction.strip():
        raise ObservationError("the instruction is empty; give a sentence, or none at all")
    dataset = read_dataset(root)
    mapping = map_cameras(dataset, cameras)
    parts = dataset.state_parts(state)
    episodes, remarks = _available(dataset, [key for key in mapping.values() if key is not None])
    spans = [Span(episode.tasks, episode.length) for episode in episodes]
    plan = plan_frames(spans, limit, seed, split)
    if not plan:
        raise ObservationError(f"{root} has too few frames for any of the {split!r} split")
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for position, group in groupby(plan, key=lambda pair: pair[0]):
        numbers = [number for _, number in group]
        for found in _read_frames(dataset, episodes[position], numbers, parts, instruction):
            (frames if isinstance(found, Frame) else skipped).append(found)  # type: ignore[arg-type]
    reader = _Reader(dataset, mapping)
    kept: list[Frame] = []
    digests: list[bytes] = []
    for frame in frames:
        try:
            digests.append(content_digest(reader.read(frame)))
            kept.append(frame)
        except UnreadableError as error:
            skipped.append(error.skipped)
    _require_enough(root, len(plan), len(kept), skipped)
    report = SourceReport(_summary(dataset, kept, split), tuple(skipped), tuple(remarks))
    return Streamed(lambda number: reader.read(kept[number]), digests), report


def state_names(root: str | Path) -> list[str]:
    """What a state can be put together from: GR00T's names, then features.

    Raises:
        ObservationError: see ``read_dataset``.
    """
    return read_dataset(Path(root)).state_names


def map_cameras(dataset: LeRobotDataset, cameras: Cameras) -> dict[str, str | None]:
    """The policy's cameras → the dataset's features, or None for a camera that is left out.

    Raises:
        ObservationError: a camera has no counterpart; names both sides.
    """
    if cameras is None:
        wanted: Mapping[str, str | None] = dataset.default_cameras()
    elif isinstance(cameras, Mapping):
        wanted = cameras
    else:
        wanted = {name: name for name in cameras}
    known = dataset.camera_names
    lost = [name for name, key in wanted.items() if key is not None and key not in known]
    if lost or all(key is None for key in wanted.values()):
        first = next(iter(dataset.default_cameras().values()), "FEATURE")
        example = f"{(lost or ['NAME'])[0]}={first}"
        raise ObservationError(
            f"{dataset.root} has no camera {_listed(wanted[name] for name in lost)}: the policy "
            f"has {_listed(wanted)}, the dataset {_listed(dataset.cameras)}. Say which is "
            f"which with --cameras {example} (in Python a mapping from the policy's names to the "
            "dataset's); NAME=none (in Python None) leaves a camera of the policy out"
        )
    return {name: None if key is None else known[key] for name, key in wanted.items()}


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join(repr(name) for name in names if name is not None) or "none"


class UnreadableError(ObservationError):
    """One observation cannot be read; the others may."""

    def __init__(self, where: str, frame: Frame, reason: str) -> None:
        self.skipped = Skipped(where, frame.place, reason)
        super().__init__(f"{frame.place}: {reason}")


def _available(dataset: LeRobotDataset, keys: Sequence[str]) -> tuple[list[Episode], list[str]]:
    """The episodes whose files are there, and a remark on the others."""
    seen: dict[str, bool] = {}

    def there(path: str) -> bool:
        if path not in seen:
            seen[path] = contained(dataset.root, path).is_file()
        return seen[path]

    videos = [key for key in keys if key in dataset.videos]
    for key in videos:
        if not any([there(episode.clips[key].path) for episode in dataset.episodes]):
            raise ObservationError(
                f"{dataset.root / INFO} declares camera {key!r}, but the dataset has no video of "
                f"it (looked for {dataset.episodes[0].clips[key].path} and the like)"
            )
    found: list[Episode] = []
    lost: list[str] = []
    for episode in dataset.episodes:
        paths = [episode.data, *(episode.clips[key].path for key in videos)]
        missing = [path for path in paths if not there(path)]
        if missing:
            lost.append(missing[0])
        elif episode.length:
            found.append(episode)
    if not found:
        raise ObservationError(
            f"{dataset.root} has no episode whose files are all there; first missing: "
            f"{(lost or [dataset.episodes[0].data])[0]}"
        )
    remarks = []
    if lost:
        remarks.append(
            f"{len(lost)} of {len(dataset.episodes)} episodes left out, their files are missing: "
            f"first {lost[0]}"
        )
    return found, remarks


def _read_frames(
    dataset: LeRobotDataset,
    episode: Episode,
    numbers: Sequence[int],
    parts: Sequence[StatePart],
    instruction: str | None,
) -> Iterator[Frame | Skipped]:
    """The rows of some frames of one episode, ascending."""
    path, where = contained(dataset.root, episode.data), episode.data
    try:
        names = column_names(path, where)
        rows = episode_rows(path, where, episode.index)
        wanted = [int(rows[number]) for number in numbers if number < len(rows)]
        columns = [*dict.fromkeys(part.feature for part in parts)]
        columns += ["task_index"] if instruction is None else []
        columns += [name for name in ("timestamp", "frame_index") if name in names]
        cells = read_rows(path, where, wanted, columns)
    except ObservationError as error:
        for number in numbers:
            yield Skipped(where, f"episode {episode.index}, frame {number}", str(error))
        return
    for number in numbers:
        place = f"episode {episode.index}, frame {number}"
        if number >= len(rows):
            yield Skipped(where, place, f"the file has {len(rows)} rows of {episode.length}")
            continue
        row = int(rows[number])
        yield _frame(dataset, episode, number, row, cells[row], parts, instruction)


def _frame(
    dataset: LeRobotDataset,
    episode: Episode,
    number: int,
    row: int,
    cells: Mapping[str, Any],
    parts: Sequence[StatePart],
    instruction: str | None,
) -> Frame | Skipped:
    def skip(reason: str) -> Skipped:
        return Skipped(episode.data, f"episode {episode.index}, frame {number}", reason)

    if cells.get("frame_index", number) != number:
        return skip(f"the row says frame_index {cells['frame_index']}: rows are out of order")
    time = cells.get("timestamp", number / dataset.fps)
    time = time[0] if isinstance(time, list) and len(time) == 1 else time
    if not isinstance(time, (int, float)) or not math.isfinite(time):
        return skip(f"timestamp is {time!r}")
    prompt = instruction or dataset.tasks.get(cells["task_index"], "")
    if not prompt.strip():
        return skip(
            f"task_index {cells['task_index']} has no instruction among the tasks (one for every "
            "frame can be given: --instruction)"
        )
    state = _state(dataset, episode, cells, parts)
    if not np.isfinite(state).all():
        return skip(f"the state has NaN or Inf at {np.flatnonzero(~np.isfinite(state)).tolist()}")
    return Frame(episode, number, row, float(time), state, prompt)


def _state(
    dataset: LeRobotDataset, episode: Episode, cells: Mapping[str, Any], parts: Sequence[StatePart]
) -> np.ndarray:
    """The state of one row, float32 [n].

    Raises:
        ObservationError: a feature is not what ``info.json`` declares.
    """
    pieces = []
    for part in parts:
        try:
            with np.errstate(over="ignore"):
                values = np.asarray(cells[part.feature], dtype=np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise ObservationError(
                f"{episode.data}: {part.feature} is not numeric: {error}"
            ) from error
        if len(values) != dataset.widths[part.feature]:
            raise ObservationError(
                f"{episode.data}: {part.feature} has {len(values)} numbers, {INFO} declares "
                f"{dataset.widths[part.feature]}; the files belong to different datasets"
            )
        pieces.append(values[part.start : part.end])
    return np.concatenate(pieces)


class _Reader:
    """Makes observations of frames; keeps a few videos open."""

    def __init__(self, dataset: LeRobotDataset, mapping: Mapping[str, str | None]) -> None:
        self._dataset, self._mapping = dataset, mapping
        self._videos: OrderedDict[str, Video] = OrderedDict()

    def read(self, frame: Frame) -> Observation:
        """The observation of a frame.

        Raises:
            UnreadableError: an image of it cannot be read.
        """
        left_out = [name for name, key in self._mapping.items() if key is None]
        masks = {"image_masks": {name: False for name in left_out}} if left_out else {}
        return {
            "images": {
                name: self._image(frame, key)
                for name, key in self._mapping.items()
                if key is not None
            },
            **masks,
            "state": frame.state.copy(),
            "prompt": frame.prompt,
            "task": frame.prompt,
        }

    def _image(self, frame: Frame, key: str) -> np.ndarray:
        is_video = key in self._dataset.videos
        where = frame.episode.clips[key].path if is_video else frame.episode.data
        try:
            if is_video:
                return self._video_frame(frame, key)
            path = contained(self._dataset.root, where)
            return decode_image(read_image_row(path, where, frame.row, key))
        except ObservationError as error:
            raise UnreadableError(where, frame, str(error)) from error

    def _video_frame(self, frame: Frame, key: str) -> np.ndarray:
        clip, tolerance = frame.episode.clips[key], 0.5 / self._dataset.fps
        time = clip.start + frame.time
        if time > clip.end - tolerance:
            raise ObservationError(f"its time {frame.time:.3f} s is past the end of its video")
        return self._open(clip.path).frame_at(time, tolerance)

    def _open(self, relative: str) -> Video:
        if relative not in self._videos:
            while len(self._videos) >= _OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
            self._videos[relative] = Video(contained(self._dataset.root, relative), relative)
        self._videos.move_to_end(relative)
        return self._videos[relative]


def decode_image(cell: Any) -> np.ndarray:
    """An encoded image as datasets store it, ``{"bytes": …, "path": …}`` → uint8 [H, W, 3].

    Raises:
        ObservationError: no bytes, not an image, or of an unreasonable size.
        ResourceError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError(
            "reading LeRobot images needs Pillow: pip install 'omega-qvla[data]'"
        ) from error
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(content, bytes):
        raise ObservationError("the image is not stored in the file")
    try:
        with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > _MAX_IMAGE_PIXELS:
                raise ObservationError(f"the image claims {image.width} × {image.height} pixels")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ObservationError(f"the image is damaged: {error}") from error


def _require_enough(root: Path, chosen: int, kept: int, skipped: Sequence[Skipped]) -> None:
    if kept and kept >= ENOUGH * chosen:
        return
    lines = SourceReport("", tuple(skipped)).lines()[1:]
    raise ObservationError(
        f"only {kept} of the {chosen} frames chosen from {root} can be read, at least "
        f"{math.ceil(ENOUGH * chosen)} are needed: {'; '.join(lines[:3])}"
        + (f"; and {len(lines) - 3} more files" if len(lines) > 3 else "")
    )


def _summary(dataset: LeRobotDataset, kept: Sequence[Frame], split: str) -> str:
    prompts = {frame.prompt for frame in kept}
    episodes = {frame.episode.index for frame in kept}
    return (
        f"{len(kept)} {split} observations of {len(prompts)} tasks from {len(episodes)} episodes "
        f"of {dataset.root} (LeRobot {dataset.version})"
    )
