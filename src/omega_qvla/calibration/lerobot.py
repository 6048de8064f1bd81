"""Observations from a LeRobot dataset: mapped names, chosen frames, read when they are needed.

What is read, in this order: the description (``lerobot_metadata``), a plan of frames over all tasks
and over whole episodes (``sampling``), those frames' rows, and their images, one at a time
(``lerobot_frames``).  Every image is decoded once here, so that a damaged one is known, counted and
left out before any work starts; after that only numbers and digests stay in memory and images are
decoded again on access.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.calibration.lerobot_frames import (
    LEROBOT_TOLERANCE,
    Frame,
    ObservationReader,
    RowReader,
    UnreadableError,
)
from omega_qvla.calibration.lerobot_metadata import (
    INFO,
    Episode,
    LeRobotDataset,
    StatePart,
    contained,
    read_dataset,
)
from omega_qvla.calibration.sampling import SPLITS, Span, plan_frames
from omega_qvla.calibration.streamed import Skipped, SourceReport, Streamed
from omega_qvla.errors import ObservationError

Cameras = Sequence[str] | Mapping[str, str | None] | None
"""The policy's cameras: names, or name → the dataset's camera; None leaves that camera out."""

ENOUGH = 0.5
"""The part of the chosen frames that must be readable."""


def stream_lerobot(
    root: Path,
    *,
    cameras: Cameras = None,
    state: Sequence[str] | None = None,
    wanted: Sequence[str] = (),
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
        wanted: what the policy calls the numbers of its state, if it has names; the state is put
            in this order where nothing else is asked for and the dataset has the same names.
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
    parts, matched = (
        (dataset.state_parts(state), []) if state is not None else match_state(dataset, wanted)
    )
    episodes, remarks = _available(dataset, [key for key in mapping.values() if key is not None])
    spans = [Span(episode.tasks, episode.length) for episode in episodes]
    plan = plan_frames(spans, limit, seed, split)
    if not plan:
        raise ObservationError(f"{root} has too few frames for any of the {split!r} split")
    frames, skipped = _read_rows(RowReader(dataset, parts, instruction), episodes, plan)
    reader = ObservationReader(dataset, mapping)
    kept: list[Frame] = []
    digests: list[bytes] = []
    for frame in frames:
        try:
            digests.append(content_digest(reader.read(frame)))
            kept.append(frame)
        except UnreadableError as error:
            skipped.append(error.skipped)
    _require_enough(root, len(plan), len(kept), skipped)
    if cameras is None and dataset.depth:
        remarks.append(f"depth maps are left out: {_listed(dataset.depth)}")
    remarks += [*matched, *_displacement(reader, kept)]
    report = SourceReport(
        _summary(dataset, kept, split),
        tuple(skipped),
        tuple(remarks),
        dataset.state_dimensions(parts),
    )
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
    for name, key in wanted.items():
        if key in dataset.depth_names:
            raise ObservationError(
                f"{dataset.root}: camera {name!r} would be {key!r}, which is a depth map; policies "
                f"are shown colours. The dataset has {_listed(dataset.cameras)}"
            )
    lost = [name for name, key in wanted.items() if key is not None and key not in known]
    if lost or all(key is None for key in wanted.values()):
        first = next(iter(dataset.default_cameras().values()), "FEATURE")
        example = f"{(lost or ['NAME'])[0]}={first}"
        robot = "" if dataset.robot is None else f" (robot {dataset.robot!r})"
        raise ObservationError(
            f"{dataset.root} has no camera {_listed(wanted[name] for name in lost)}: the policy "
            f"has {_listed(wanted)}, the dataset {_listed(dataset.cameras)}{robot}. Say which is "
            f"which with --cameras {example} (in Python a mapping from the policy's names to the "
            "dataset's); NAME=none (in Python None) leaves a camera of the policy out"
        )
    return {name: None if key is None else known[key] for name, key in wanted.items()}


def match_state(
    dataset: LeRobotDataset, wanted: Sequence[str]
) -> tuple[list[StatePart], list[str]]:
    """What a state is put together from, so that its numbers are those a policy wants by name.

    Args:
        dataset: the dataset.
        wanted: what the policy calls the numbers of its state; empty if it has no names.

    Returns:
        The parts, the whole state where the policy or the dataset has no names or they have none
        in common; and remarks.

    Raises:
        ObservationError: some of the names are in the dataset and others are not.
    """
    places = dataset.named_numbers()
    missing = [name for name in wanted if name not in places]
    if not wanted or len(missing) == len(wanted):
        return dataset.state_parts(None), []
    if missing:
        raise ObservationError(
            f"{dataset.root} has no {', '.join(missing)} of the policy's state "
            f"({', '.join(wanted)}); it has {', '.join(places)}. Say which parts the state is put "
            "together from, in the policy's order: --state A,B (in Python state=['A', 'B'])"
        )
    parts = [StatePart(feature, i, i + 1) for feature, i in (places[name] for name in wanted)]
    whole = [] if dataset.whole_state is None else dataset.state_parts(None)
    if [(p.feature, i) for p in whole for i in range(p.start, p.end)] == [
        (p.feature, p.start) for p in parts
    ]:
        return parts, []
    return parts, [f"the state is put in the policy's order, by name: {', '.join(wanted)}"]


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join(repr(name) for name in names if name is not None) or "none"


def _available(dataset: LeRobotDataset, keys: Sequence[str]) -> tuple[list[Episode], list[str]]:
    """The episodes whose files are there, and a remark on the others."""
    seen: dict[str, bool] = {}

    def there(path: str) -> bool:
        if path not in seen:
            seen[path] = contained(dataset.root, path).is_file()
        return seen[path]

    def has_video(episode: Episode, key: str) -> bool:
        return key in episode.clips and there(episode.clips[key].path)

    videos = [key for key in keys if key in dataset.videos]
    for key in videos:
        if not any([has_video(episode, key) for episode in dataset.episodes]):
            raise ObservationError(
                f"{dataset.root / INFO} declares camera {key!r}, but the dataset has no video of "
                f"it (looked for {_video_name(dataset.episodes[0], key)} and the like)"
            )
    found: list[Episode] = []
    lost: list[str] = []
    for episode in dataset.episodes:
        absent = [_video_name(episode, key) for key in videos if not has_video(episode, key)]
        absent = absent if there(episode.data) else [episode.data]
        if absent:
            lost.append(absent[0])
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


def _video_name(episode: Episode, key: str) -> str:
    """The file of a video, or in words what there should be a file of."""
    if key in episode.clips:
        return episode.clips[key].path
    return f"a video of {key} in episode {episode.index}"


def _read_rows(
    rows: RowReader, episodes: Sequence[Episode], plan: Sequence[tuple[int, int]]
) -> tuple[list[Frame], list[Skipped]]:
    """The frames of a plan, and those that have no usable row."""
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for position, group in groupby(plan, key=lambda pair: pair[0]):
        for found in rows.frames(episodes[position], [number for _, number in group]):
            if isinstance(found, Frame):
                frames.append(found)
            else:
                skipped.append(found)
    return frames, skipped


def _require_enough(root: Path, chosen: int, kept: int, skipped: Sequence[Skipped]) -> None:
    if kept and kept >= ENOUGH * chosen:
        return
    lines = SourceReport("", tuple(skipped)).lines()[1:]
    raise ObservationError(
        f"only {kept} of the {chosen} frames chosen from {root} can be read, at least "
        f"{math.ceil(ENOUGH * chosen)} are needed: {'; '.join(lines[:3])}"
        + (f"; and {len(lines) - 3} more files" if len(lines) > 3 else "")
    )


def _displacement(reader: ObservationReader, kept: Sequence[Frame]) -> list[str]:
    """A remark on images that are shown at another time than their row's, if there are any."""
    if not reader.displaced:
        return []
    largest = 1000 * max(reader.displaced.values())
    return [
        f"the images of {len(reader.displaced)} of {len(kept)} frames are up to {largest:.1f} ms "
        f"away from their rows in time; LeRobot refuses more than tolerance_s={LEROBOT_TOLERANCE}, "
        "unless it is told another"
    ]


def _summary(dataset: LeRobotDataset, kept: Sequence[Frame], split: str) -> str:
    prompts = {frame.prompt for frame in kept}
    episodes = {frame.episode.index for frame in kept}
    return (
        f"{len(kept)} {split} observations of {len(prompts)} tasks from {len(episodes)} episodes "
        f"of {dataset.root} (LeRobot {dataset.version}"
        f"{'' if dataset.robot is None else f', robot {dataset.robot}'})"
    )
