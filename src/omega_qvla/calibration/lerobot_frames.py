"""The chosen frames of a LeRobot dataset: their rows, and observations made of them.

A row gives the numbers of a frame and the time of its images.  The image of a row is the video
frame whose timestamp is nearest to the row's, as LeRobot and Isaac-GR00T choose it; where there is
none within half a row period, or where it would lie in another episode, the row has no image.
LeRobot by default wants it within 0.1 ms: rows that have it farther away are counted.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla.calibration.lerobot_metadata import (
    INFO,
    Episode,
    LeRobotDataset,
    StatePart,
    contained,
)
from omega_qvla.calibration.parquet import (
    column_names,
    episode_rows,
    read_image_row,
    read_rows,
)
from omega_qvla.calibration.streamed import Skipped
from omega_qvla.calibration.video import Video
from omega_qvla.errors import ObservationError
from omega_qvla.extras import needing
from omega_qvla.policies.base import Observation

LEROBOT_TOLERANCE = 1e-4
"""Seconds; LeRobot's default ``tolerance_s``."""

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


class UnreadableError(ObservationError):
    """One observation cannot be read; the others may."""

    def __init__(self, where: str, frame: Frame, reason: str) -> None:
        self.skipped = Skipped(where, _place(frame.episode, frame.number), reason)
        super().__init__(f"{self.skipped.place}: {reason}")


@dataclass(frozen=True)
class RowReader:
    """Reads rows as frames.

    Attributes:
        dataset: where they are.
        parts: what a state is put together from.
        instruction: what every frame was told; None for what its task says.
    """

    dataset: LeRobotDataset
    parts: Sequence[StatePart]
    instruction: str | None = None

    def frames(self, episode: Episode, numbers: Sequence[int]) -> Iterator[Frame | Skipped]:
        """Some frames of one episode, each as it is or with the reason why it cannot be used.

        Raises:
            ObservationError: a feature is not what ``info.json`` declares.
        """
        path, where = contained(self.dataset.root, episode.data), episode.data
        try:
            names = column_names(path, where)
            rows = episode_rows(path, where, episode.index)
            wanted = [int(rows[number]) for number in numbers if number < len(rows)]
            columns = [*dict.fromkeys(part.feature for part in self.parts)]
            columns += ["task_index"] if self.instruction is None else []
            columns += [name for name in ("timestamp", "frame_index") if name in names]
            cells = read_rows(path, where, wanted, columns)
        except ObservationError as error:
            yield from (_skip(episode, number, str(error)) for number in numbers)
            return
        for number in numbers:
            if number < len(rows):
                row = int(rows[number])
                yield self._frame(episode, number, row, cells[row])
            else:
                reason = f"the file has {len(rows)} rows of {episode.length}"
                yield _skip(episode, number, reason)

    def _frame(
        self, episode: Episode, number: int, row: int, cells: Mapping[str, Any]
    ) -> Frame | Skipped:
        if cells.get("frame_index", number) != number:
            reason = f"the row says frame_index {cells['frame_index']}: rows are out of order"
            return _skip(episode, number, reason)
        time = cells.get("timestamp", number / self.dataset.fps)
        time = time[0] if isinstance(time, list) and len(time) == 1 else time
        if not isinstance(time, (int, float)) or not math.isfinite(time):
            return _skip(episode, number, f"timestamp is {time!r}")
        prompt = self.instruction or self.dataset.tasks.get(cells["task_index"], "")
        if not prompt.strip():
            reason = (
                f"task_index {cells['task_index']} has no instruction among the tasks (one for "
                "every frame can be given: --instruction)"
            )
            return _skip(episode, number, reason)
        state = self._state(episode, cells)
        finite = np.isfinite(state)
        if not finite.all():
            reason = f"the state has NaN or Inf at {np.flatnonzero(~finite).tolist()}"
            return _skip(episode, number, reason)
        return Frame(episode, number, row, float(time), state, prompt)

    def _state(self, episode: Episode, cells: Mapping[str, Any]) -> np.ndarray:
        """The state of one row, float32 [n]."""
        pieces = []
        for part in self.parts:
            try:
                with np.errstate(over="ignore"):  # what does not fit becomes Inf and is refused
                    values = np.asarray(cells[part.feature], dtype=np.float32).reshape(-1)
            except (TypeError, ValueError) as error:
                raise ObservationError(
                    f"{episode.data}: {part.feature} is not numeric: {error}"
                ) from error
            width = self.dataset.widths[part.feature]
            if len(values) != width:
                raise ObservationError(
                    f"{episode.data}: {part.feature} has {len(values)} numbers, {INFO} declares "
                    f"{width}; the files belong to different datasets"
                )
            pieces.append(values[part.start : part.end])
        return np.concatenate(pieces)


class ObservationReader:
    """Makes observations of frames; keeps a few videos open.

    Args:
        dataset: where the frames are.
        mapping: the policy's cameras → the dataset's features, None for one that is left out.

    Attributes:
        displaced: of the frames read so far, those whose image LeRobot would find too far away in
            time: (episode, number) → seconds.
    """

    def __init__(self, dataset: LeRobotDataset, mapping: Mapping[str, str | None]) -> None:
        self._dataset, self._mapping = dataset, mapping
        self.displaced: dict[tuple[int, int], float] = {}
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
        shown = self._open(clip.path).frame_at(time, tolerance + LEROBOT_TOLERANCE)
        if not clip.start - LEROBOT_TOLERANCE <= shown.time < clip.end:
            raise ObservationError(
                f"the image nearest to {frame.time:.3f} s belongs to another episode"
            )
        away = abs(shown.time - time)
        if away >= LEROBOT_TOLERANCE:
            place = (frame.episode.index, frame.number)
            self.displaced[place] = max(away, self.displaced.get(place, 0.0))
        return shown.image

    def _open(self, relative: str) -> Video:
        if relative not in self._videos:
            while len(self._videos) >= _OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
            self._videos[relative] = Video(contained(self._dataset.root, relative), relative)
        self._videos.move_to_end(relative)
        return self._videos[relative]


def decode_image(cell: Any) -> np.ndarray:
    """An encoded image as datasets store it, ``{"bytes": …, "path": …}`` → uint8 [H, W, 3].

    An image is turned as its EXIF data say, as in LeRobot.

    Raises:
        ObservationError: no bytes, not an image, not in colour with 8 bits per channel, or of an
            unreasonable size.
        ResourceError: Pillow is not installed.
    """
    with needing("reading the images of a LeRobot dataset", "data"):
        from PIL import Image, ImageOps
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(content, bytes):
        raise ObservationError("the image is not stored in the file")
    try:
        with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > _MAX_IMAGE_PIXELS:
                raise ObservationError(f"the image claims {image.width} × {image.height} pixels")
            if image.mode != "RGB":
                raise ObservationError(
                    f"the image is of kind {image.mode}, not RGB with 8 bits per channel; "
                    "depth maps and grey images cannot be shown to a policy"
                )
            return np.array(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ObservationError(f"the image is damaged: {error}") from error


def _place(episode: Episode, number: int) -> str:
    return f"episode {episode.index}, frame {number}"


def _skip(episode: Episode, number: int, reason: str) -> Skipped:
    return Skipped(episode.data, _place(episode, number), reason)
