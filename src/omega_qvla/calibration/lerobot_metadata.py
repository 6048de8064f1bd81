"""What a LeRobot dataset says of itself: versions 2.0, 2.1 and 3.0, and GR00T's additions.

| | 2.0, 2.1 | 3.0 |
|---|---|---|
| episodes | ``meta/episodes.jsonl`` | ``meta/episodes/chunk-*/file-*.parquet`` |
| tasks | ``meta/tasks.jsonl`` | ``meta/tasks.parquet`` |
| data | one parquet file per episode | episodes one after the other in larger files |
| video | one file per episode and camera | the same, each episode from one timestamp to another |

Everywhere ``meta/info.json`` names the version, the frame rate, the features and the templates of
the paths; GR00T adds ``meta/modality.json`` with short names for cameras and slices of the state.
Source: LeRobot 0.3.3 and 0.4.4, ``datasets/lerobot_dataset.py`` and ``datasets/utils.py``;
Isaac-GR00T's N1.5 release, ``gr00t/data/dataset.py``.

All of it may come from anybody.  A path is filled in by substitution (never ``str.format``, whose
templates can reach attributes and ask for gigabytes of padding) and must stay inside the dataset.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.calibration.parquet import read_columns
from omega_qvla.errors import ObservationError
from omega_qvla.policies.processing.normalization import numbered

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_EPISODES, _EPISODES_FOLDER = "meta/episodes.jsonl", "meta/episodes"
_TASKS, _TASKS_TABLE = "meta/tasks.jsonl", "meta/tasks.parquet"
_MODALITY = "meta/modality.json"
_CAMERA_PREFIX = "observation.images."
_STATE_NAMES = ("observation.state", "state")
_JSON_BYTES = 256 << 20


class _Feature(BaseModel):
    model_config = ConfigDict(extra="ignore")
    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: dict[str, Any] | None = None
    video_info: dict[str, Any] | None = None

    @property
    def is_depth(self) -> bool:
        """Whether LeRobot takes it for a depth map."""
        told = {**(self.video_info or {}), **(self.info or {})}
        return bool(told.get("is_depth_map") or told.get("video.is_depth_map"))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What its numbers are called; empty where that is not said for each of them.

        LeRobot writes a list, or in older versions a mapping with one list (``{"motors": […]}``).
        """
        names = self.names
        if isinstance(names, dict) and len(names) == 1:
            (names,) = names.values()
        if not isinstance(names, list) or len(names) != math.prod(self.shape):
            return ()
        return tuple(names) if all(isinstance(name, str) for name in names) else ()


class _Info(BaseModel):
    model_config = ConfigDict(extra="ignore")
    codebase_version: str
    robot_type: Any = None
    fps: float = Field(gt=0, allow_inf_nan=False)
    chunks_size: int = Field(default=1000, ge=1)
    data_path: str
    video_path: str | None = None
    features: dict[str, _Feature]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")
    start: int = Field(ge=0)
    end: int = Field(ge=1)
    original_key: str = "observation.state"


class _Camera(BaseModel):
    model_config = ConfigDict(extra="ignore")
    original_key: str | None = None


class _Modality(BaseModel):
    model_config = ConfigDict(extra="ignore")
    state: dict[str, _Part] = {}
    video: dict[str, _Camera] = {}


@dataclass(frozen=True)
class Clip:
    """Where the video of one episode and camera is.

    Attributes:
        path: of the file, relative to the dataset.
        start: seconds into the file at which the episode begins.
        end: seconds at which it ends; infinite where the file holds no other episode.
    """

    path: str
    start: float = 0.0
    end: float = math.inf


@dataclass(frozen=True)
class Episode:
    """One episode: number, frames, what it was told, and where its parts are.

    A camera that was not recorded has no clip.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data: str
    clips: Mapping[str, Clip]


@dataclass(frozen=True)
class StatePart:
    """A slice of a feature that becomes a part of the state: ``row[feature][start:end]``."""

    feature: str
    start: int
    end: int


@dataclass(frozen=True)
class LeRobotDataset:
    """The description of a dataset; no frame has been read.

    Attributes:
        root: its directory.
        version: ``v2.0``, ``v2.1`` or ``v3.0``.
        fps: frames per second.
        images: camera features stored as encoded images in the parquet files.
        videos: camera features stored as videos.
        depth: camera features that are depth maps, which no policy here is shown.
        robot: the kind of robot, where it is said.
        widths: numbers per row of every numeric feature.
        dimensions: what these numbers are called, for the features where it is said.
        modality: GR00T's names; empty in datasets without them.
        episodes: in the order of the metadata.
        tasks: the instruction of every task index.
    """

    root: Path
    version: str
    fps: float
    images: tuple[str, ...]
    videos: tuple[str, ...]
    depth: tuple[str, ...]
    robot: str | None
    widths: Mapping[str, int]
    dimensions: Mapping[str, tuple[str, ...]]
    modality: _Modality
    episodes: Sequence[Episode]
    tasks: Mapping[int, str] = field(repr=False)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera features in colour, however they are stored."""
        return (*self.images, *self.videos)

    @cached_property
    def camera_names(self) -> dict[str, str]:
        """Everything a camera may be called → its feature.

        The feature itself, the feature without ``observation.images.``, and GR00T's names with and
        without ``video.``, which win where they differ.
        """
        names = {key.removeprefix(_CAMERA_PREFIX): key for key in self.cameras}
        names |= {key: key for key in self.cameras}
        for name, camera in self.modality.video.items():
            key = camera.original_key or name
            if key in self.cameras:
                names |= {name: key, f"video.{name}": key}
        return names

    @property
    def depth_names(self) -> set[str]:
        """Everything a depth map may be called."""
        short = {key.removeprefix(_CAMERA_PREFIX) for key in self.depth}
        named = {n for n, c in self.modality.video.items() if c.original_key in self.depth}
        return {*self.depth, *short, *named, *(f"video.{name}" for name in named)}

    def default_cameras(self) -> dict[str, str]:
        """The dataset's own cameras: those GR00T names, else all, by their short names."""
        named = {n: self.camera_names[n] for n in self.modality.video if n in self.camera_names}
        return named or {key.removeprefix(_CAMERA_PREFIX): key for key in self.cameras}

    @property
    def state_names(self) -> list[str]:
        """What a state can be put together from: GR00T's names, then features."""
        bookkeeping = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
        return [*self.modality.state, *(name for name in self.widths if name not in bookkeeping)]

    @property
    def whole_state(self) -> str | None:
        """The feature that is the state where nothing else is asked for."""
        return next((name for name in _STATE_NAMES if name in self.widths), None)

    def named_numbers(self) -> dict[str, tuple[str, int]]:
        """Names of single numbers → their feature and place in it.

        GR00T's parts, ``left_arm[0]`` and so on where they have several numbers, which win over
        the names that the whole state's own numbers have.
        """
        own = self.dimensions.get(self.whole_state or "", ())
        named = {n: (self.whole_state or "", i) for i, n in enumerate(own) if own.count(n) == 1}
        for name, part in self.modality.state.items():
            for number, label in enumerate(numbered(name, part.end - part.start)):
                named[label] = (part.original_key, part.start + number)
        return named

    def state_dimensions(self, parts: Sequence[StatePart]) -> tuple[str, ...]:
        """What the numbers of a state are called; empty where one of them has no name.

        Args:
            parts: what the state is put together from.
        """
        names = {place: name for name, place in self.named_numbers().items()}
        places = [(part.feature, i) for part in parts for i in range(part.start, part.end)]
        return tuple(names[place] for place in places) if names.keys() >= set(places) else ()

    def state_parts(self, names: Sequence[str] | None) -> list[StatePart]:
        """The slices a state is put together from, in the order of the names.

        Args:
            names: features, GR00T's names with or without ``state.``, or names of single numbers of
                the whole state; by default the whole ``observation.state`` (or ``state``).

        Raises:
            ObservationError: a name is unknown, or a slice is wider than its feature.
        """
        if names is None:
            names = [] if self.whole_state is None else [self.whole_state]
        if not names:
            raise ObservationError(
                f"{self.root} has no {' or '.join(_STATE_NAMES)}; say what the state is with "
                f"state=[...]; known: {', '.join(self.state_names) or 'nothing numeric'}"
            )
        return [self._state_part(name) for name in names]

    def _state_part(self, name: str) -> StatePart:
        if name in self.widths:
            return StatePart(name, 0, self.widths[name])
        part = self.modality.state.get(name.removeprefix("state."))
        numbers = self.named_numbers()
        if part is None and name in numbers:
            feature, place = numbers[name]
            return StatePart(feature, place, place + 1)
        if part is None:
            own = self.dimensions.get(self.whole_state or "", ())
            raise ObservationError(
                f"{self.root} has no state {name!r}; known: {', '.join([*self.state_names, *own])}"
            )
        width = self.widths.get(part.original_key, 0)
        if not part.start < part.end <= width:
            raise ObservationError(
                f"{self.root / _MODALITY}: state {name!r} is {part.original_key}"
                f"[{part.start}:{part.end}], which has {width} numbers"
            )
        return StatePart(part.original_key, part.start, part.end)


def is_dataset(path: Path) -> bool:
    """Whether a path looks like a LeRobot dataset."""
    return (path / "meta").is_dir()


def read_dataset(root: Path) -> LeRobotDataset:
    """Read the description of a dataset.

    Args:
        root: the directory that holds ``meta``.

    Raises:
        ObservationError: not a dataset, a version this library does not read, or a description
            that is incomplete, contradictory or leads out of the directory.
        ResourceError: pyarrow is not installed.
    """
    info = _read_info(root)
    kinds = ("image", "video")
    cameras = {
        kind: tuple(
            key
            for key, feature in info.features.items()
            if feature.dtype == kind and not feature.is_depth
        )
        for kind in kinds
    }
    if cameras["video"] and not info.video_path:
        raise ObservationError(f"{root / INFO} has video features but no video_path")
    layout = _episodes_v3 if info.codebase_version == "v3.0" else _episodes_v2
    episodes = list(layout(root, info, cameras["video"]))
    if not episodes:
        raise ObservationError(f"{root} describes no episode; the dataset is empty")
    return LeRobotDataset(
        root=root,
        version=info.codebase_version,
        fps=info.fps,
        images=cameras["image"],
        videos=cameras["video"],
        depth=tuple(k for k, f in info.features.items() if f.dtype in kinds and f.is_depth),
        robot=info.robot_type if isinstance(info.robot_type, str) else None,
        dimensions={k: f.dimensions for k, f in info.features.items() if f.dimensions},
        widths={
            key: math.prod(feature.shape)
            for key, feature in info.features.items()
            if feature.dtype.startswith(("float", "int", "uint"))
        },
        modality=_read_modality(root),
        episodes=episodes,
        tasks=dict(_tasks(root, info.codebase_version)),
    )


def contained(root: Path, relative: str) -> Path:
    """The path of a file of the dataset.

    Links may lead to the ``blobs`` beside the ``snapshots`` a dataset lies in, as they do in a
    download cache of the Hugging Face hub, and nowhere else.

    Raises:
        ObservationError: the path leads out of the dataset, or is no path at all.
    """
    try:
        home, path = root.resolve(), (root / relative).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ObservationError(f"{root}: {relative!r} is no usable path: {error}") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(path.is_relative_to(place) for place in allowed):
        raise ObservationError(f"{root}: {relative!r} leads out of the dataset; it is refused")
    return path


def _read_info(root: Path) -> _Info:
    if not root.is_dir():
        raise ObservationError(f"{root} is not a directory; give the one that holds {INFO}")
    raw = _read_json(root, INFO)
    version = raw.get("codebase_version") if isinstance(raw, dict) else None
    if version not in VERSIONS:
        raise ObservationError(
            f"{root / INFO} says codebase_version {version!r}; this version reads "
            f"{', '.join(VERSIONS)}: convert the dataset with LeRobot's own scripts"
        )
    return _validate(_Info, raw, root / INFO)


def _read_modality(root: Path) -> _Modality:
    if not contained(root, _MODALITY).exists():
        return _Modality()
    return _validate(_Modality, _read_json(root, _MODALITY), root / _MODALITY)


def _validate(model: Any, content: Any, where: Path) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ObservationError(f"{where}: {place}: {first['msg']}") from error


def _read_json(root: Path, relative: str) -> Any:
    path = contained(root, relative)
    if not path.is_file():
        raise ObservationError(
            f"{root} has no {relative}: it is not a LeRobot dataset, or was not downloaded whole"
        )
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ObservationError(f"{root / relative} is larger than {_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ObservationError(f"{root / relative} is not readable JSON: {error}") from error


def _read_lines(root: Path, relative: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON-lines file, each with its place for messages."""
    path = contained(root, relative)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                place = f"{root / relative}, line {number}"
                if not line.strip():
                    continue
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ObservationError(
                        f"{place} is not JSON ({error}); the file may be half-downloaded"
                    ) from error
                if not isinstance(content, dict):
                    raise ObservationError(f"{place} is no JSON object")
                yield place, content
    except (OSError, UnicodeDecodeError) as error:
        raise ObservationError(f"cannot read {root / relative}: {error}") from error


def _require_layout(root: Path, version: str, wanted: str, other: str) -> None:
    """The files of the stated version are there, or the message says what is there instead."""
    if contained(root, wanted).exists():
        return
    found = f", but there is {other} of another version" if (root / other).exists() else ""
    raise ObservationError(
        f"{root / INFO} says {version}, whose {wanted} is missing{found}: the dataset was not "
        "downloaded whole, or two versions are mixed; download it again into an empty directory"
    )


def _episodes_v2(root: Path, info: _Info, videos: Sequence[str]) -> Iterator[Episode]:
    _require_layout(root, info.codebase_version, _EPISODES, _EPISODES_FOLDER)
    for place, row in _read_lines(root, _EPISODES):
        index = _whole(row, "episode_index", place)
        values = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        yield Episode(
            index=index,
            length=_whole(row, "length", place),
            tasks=_texts(row.get("tasks")),
            data=_fill(info.data_path, values, root),
            clips={
                key: Clip(_fill(info.video_path or "", {**values, "video_key": key}, root))
                for key in videos
            },
        )


def _episodes_v3(root: Path, info: _Info, videos: Sequence[str]) -> Iterator[Episode]:
    _require_layout(root, info.codebase_version, _EPISODES_FOLDER, _EPISODES)
    files = sorted(path.relative_to(root) for path in (root / _EPISODES_FOLDER).glob("*/*.parquet"))
    if not files:
        raise ObservationError(
            f"{root / _EPISODES_FOLDER} has no parquet file; it was not downloaded whole"
        )
    required = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    optional = ["tasks", *(f"videos/{key}/{name}" for key in videos for name in _CLIP)]
    for file in files:
        where = f"{root / file}"
        for row in read_columns(contained(root, str(file)), where, required, optional):
            yield _episode_v3(root, info, videos, row, where)


_CLIP = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def _episode_v3(
    root: Path, info: _Info, videos: Sequence[str], row: Mapping[str, Any], where: str
) -> Episode:
    def place_of(prefix: str) -> dict[str, int]:
        names = ("chunk_index", "file_index")
        return {name: _whole(row, f"{prefix}/{name}", where) for name in names}

    return Episode(
        index=_whole(row, "episode_index", where),
        length=_whole(row, "length", where),
        tasks=_texts(row.get("tasks")),
        data=_fill(info.data_path, place_of("data"), root),
        clips={
            key: Clip(
                _fill(info.video_path or "", {**place_of(f"videos/{key}"), "video_key": key}, root),
                start=_seconds(row, f"videos/{key}/from_timestamp", where),
                end=_seconds(row, f"videos/{key}/to_timestamp", where),
            )
            for key in videos
            if row.get(f"videos/{key}/file_index") is not None
        },
    )


def _tasks(root: Path, version: str) -> Iterator[tuple[int, str]]:
    """Task index and instruction."""
    if version == "v3.0":
        _require_layout(root, version, _TASKS_TABLE, _TASKS)
        path, where = contained(root, _TASKS_TABLE), f"{root / _TASKS_TABLE}"
        # pandas writes an index without a name, which the instructions are, under this one.
        for row in read_columns(path, where, ["task_index"], ["task", "__index_level_0__"]):
            text = row.get("task", row.get("__index_level_0__"))
            yield _whole(row, "task_index", where), text if isinstance(text, str) else ""
        return
    _require_layout(root, version, _TASKS, _TASKS_TABLE)
    for place, row in _read_lines(root, _TASKS):
        text = row.get("task")
        yield _whole(row, "task_index", place), text if isinstance(text, str) else ""


_FIELD = re.compile(r"\{(\w+)(?::0(\d))?(?:d)?\}")


def _fill(template: str, values: Mapping[str, Any], root: Path) -> str:
    """A path template with ``{name}`` and ``{name:03d}`` filled in."""

    def put(match: re.Match[str]) -> str:
        name, digits = match.groups()
        if name not in values:
            raise ObservationError(
                f"{root / INFO}: the path {template!r} asks for {name!r}, which this version of "
                f"the format does not have (it has {', '.join(values)}); two versions are mixed"
            )
        return str(values[name]).zfill(int(digits or 0))

    filled = _FIELD.sub(put, template)
    if "{" in filled or "}" in filled:
        raise ObservationError(f"{root / INFO}: the path {template!r} is not a path template")
    return filled


def _whole(row: Mapping[str, Any], key: str, place: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ObservationError(f"{place}: {key} is {value!r}, not a whole number of at least 0")
    return value


def _seconds(row: Mapping[str, Any], key: str, place: str) -> float:
    value = row.get(key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ObservationError(f"{place}: {key} is {value!r}, not a number of seconds")
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()
