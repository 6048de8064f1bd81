"""Datasets written by LeRobot's own code, and what LeRobot itself reads from them.

Every case is a dataset made with ``create``, ``add_frame`` and ``save_episode``.  Some of its
videos are written anew afterwards, with other times than LeRobot gives them: they stand for
datasets that were converted from elsewhere.  ``LeRobotDataset[i]`` then reads every row (PyAV
backend, uint8) and what it gives is written beside the dataset, as ``lerobot.json``:

    {"tolerance_s": …, "rows": [{"episode", "frame", "state", "task",
                                 "images": {camera: SHA-256 of uint8 [H, W, 3]} or null,
                                 "plain": the same, where "images" is null}]}

``images`` is null where LeRobot refuses the row: it found no frame within its tolerance of the
row's time.  In an open group of pictures that is so although the file has the frame, because
LeRobot begins to decode in the wrong place.  ``plain`` is what LeRobot's decoder gives of such a
row when it is made to begin at the file's first frame, and null if it finds none then either.

Needs LeRobot 0.6.1.  As a script it reads what to write from its standard input:

    {"target": directory, "cases": [name, …]}      the cases, all of them if none is named
    {"target": "FILE.zip", "cases": []}            those of GOLDEN in one file

The second makes the golden data of ``tests/calibration/golden``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from lerobot.configs import DepthEncoderConfig, RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames

FPS = 10
HEIGHT, WIDTH = 48, 64
STATE = ["x", "y", "z", "gripper"]
TASKS = ("open the drawer", "turn the faucet open")
PERIOD = Fraction(1, FPS)
OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"}
CLOSED_GOP = {"x264-params": "open-gop=0:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"}

Times = Callable[[int], Fraction]
"""Number of a frame → its presentation time in seconds."""


@dataclass(frozen=True)
class Rewritten:
    """A video that is encoded anew with times of its own.

    Attributes:
        times: of its frames.
        per_row: how many frames it has for one row.
        options: of libx264.
        container: options of the mp4 muxer.
        skip: seconds cut off the front by copying packets from there on (an edit list).
    """

    times: Times
    per_row: int = 1
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    skip: float = 0.0


@dataclass(frozen=True)
class Case:
    """How a dataset is made.

    Attributes:
        kind: ``video`` or ``image``.
        encoder: of its videos.
        lengths: frames of its episodes, one file after the other.
        cameras: their names.
        rewritten: replaces every video by one with other times.
        tolerance: what LeRobot is given as ``tolerance_s``.
        depth: adds a depth camera.
    """

    kind: str = "video"
    encoder: dict[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = (14, 17)
    cameras: Sequence[str] = ("base", "wrist")
    rewritten: Rewritten | None = None
    tolerance: float = 1e-4
    depth: bool = False


def _h264(**extra: Any) -> dict[str, Any]:
    return {"vcodec": "h264", "g": 8, "crf": 23, **extra}


def _shifted(number: int) -> Fraction:
    return (number + 2) * PERIOD


def _regular(number: int) -> Fraction:
    return number * PERIOD


def _thirty(number: int) -> Fraction:
    return Fraction(number, 30)


def _uneven(number: int) -> Fraction:
    """Every row has its frame, and between them are others at odd places."""
    return (number // 2) * PERIOD + (number % 2) * Fraction(7 + number % 5, 200)


def _late(number: int) -> Fraction:
    """A clock that runs 1 % slow."""
    return number * PERIOD * Fraction(101, 100)


CASES: dict[str, Case] = {
    "png": Case(kind="image"),
    "av1": Case(),
    "av1-libaom": Case(encoder={"vcodec": "libaom-av1", "g": 5, "preset": 8}),
    "h264-closed": Case(encoder=_h264(extra_options=CLOSED_GOP)),
    "h264-open": Case(encoder=_h264(extra_options=OPEN_GOP), lengths=(31,)),
    "h264-open-joined": Case(encoder=_h264(extra_options=OPEN_GOP), lengths=(31, 14, 17)),
    "h264-default": Case(encoder={"vcodec": "h264", "g": None}, lengths=(31, 17)),
    "h264-intra": Case(encoder=_h264(g=1)),
    "h264-10-bit": Case(encoder=_h264(pix_fmt="yuv420p10le", extra_options=CLOSED_GOP)),
    "h264-444": Case(encoder=_h264(pix_fmt="yuv444p")),
    "hevc-default": Case(encoder={"vcodec": "hevc", "g": 8, "crf": 28}, lengths=(31,)),
    "hevc-default-joined": Case(encoder={"vcodec": "hevc", "g": 8, "crf": 28}, lengths=(31, 17)),
    "hevc-closed": Case(
        encoder={"vcodec": "hevc", "g": 8, "extra_options": {"x265-params": "open-gop=0"}}
    ),
    "hevc-10-bit": Case(encoder={"vcodec": "hevc", "g": 8, "pix_fmt": "yuv420p10le"}),
    "30-fps-video": Case(rewritten=Rewritten(_thirty, per_row=3), lengths=(20,)),
    "30-fps-video-open": Case(
        rewritten=Rewritten(_thirty, per_row=3, options=OPEN_GOP), lengths=(20,)
    ),
    "5-fps-video": Case(rewritten=Rewritten(lambda n: n * 2 * PERIOD), lengths=(20,)),
    "5-fps-video-wide": Case(
        rewritten=Rewritten(lambda n: n * 2 * PERIOD), lengths=(20,), tolerance=0.049
    ),
    "first-pts-2": Case(rewritten=Rewritten(_shifted), lengths=(20,)),
    "first-pts-2-without-edit-list": Case(
        rewritten=Rewritten(_shifted, container={"use_editlist": "0"}), lengths=(20,)
    ),
    "b-frames-without-edit-list": Case(
        rewritten=Rewritten(_regular, options=CLOSED_GOP, container={"use_editlist": "0"}),
        lengths=(20,),
    ),
    "first-pts-2-open": Case(rewritten=Rewritten(_shifted, options=OPEN_GOP), lengths=(31,)),
    "first-pts-2-early-rows": Case(rewritten=Rewritten(_shifted), lengths=(20,), tolerance=0.2001),
    "intra-refresh": Case(
        encoder=_h264(extra_options={"x264-params": "intra-refresh=1:keyint=10:bframes=0"}),
        lengths=(31,),
    ),
    "hevc-many-leading": Case(
        encoder={
            "vcodec": "hevc",
            "g": 12,
            "extra_options": {"x265-params": "open-gop=1:bframes=6:b-adapt=0:b-pyramid=1:radl=0"},
        },
        lengths=(31, 17),
    ),
    "h264-refs": Case(
        encoder=_h264(
            extra_options={
                "x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=7:b-adapt=0:"
                "b-pyramid=normal:ref=6:scenecut=0:weightp=2"
            }
        ),
        lengths=(47, 17),
    ),
    "bt709": Case(
        encoder=_h264(extra_options={**CLOSED_GOP, "colorspace": "bt709", "color_range": "tv"})
    ),
    "full-range": Case(encoder=_h264(pix_fmt="yuvj420p")),
    "uneven": Case(rewritten=Rewritten(_uneven, per_row=2), lengths=(20,)),
    "uneven-open": Case(rewritten=Rewritten(_uneven, per_row=2, options=OPEN_GOP), lengths=(20,)),
    "late": Case(rewritten=Rewritten(_late), lengths=(20,)),
    "late-wide": Case(rewritten=Rewritten(_late), lengths=(20,), tolerance=0.03),
    "half-way": Case(
        rewritten=Rewritten(lambda n: n * PERIOD + PERIOD / 2), lengths=(20,), tolerance=0.0501
    ),
    "fragmented": Case(
        rewritten=Rewritten(
            _regular,
            options=CLOSED_GOP,
            container={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
        ),
        lengths=(20,),
    ),
    "fragmented-open": Case(
        rewritten=Rewritten(
            _regular,
            options=OPEN_GOP,
            container={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
        ),
        lengths=(31,),
    ),
    "cut-in-front": Case(rewritten=Rewritten(_regular, options=CLOSED_GOP, skip=0.45)),
    "cut-in-front-open": Case(rewritten=Rewritten(_regular, options=OPEN_GOP, skip=1.05)),
    "depth-video": Case(depth=True, lengths=(8,)),
    "depth-image": Case(kind="image", depth=True, lengths=(8,)),
}

GOLDEN = (
    "png",
    "av1",
    "bt709",
    "h264-open-joined",
    "hevc-default",
    "intra-refresh",
    "30-fps-video-open",
    "uneven-open",
    "first-pts-2-open",
    "late",
    "depth-video",
)
"""The cases whose data are kept, for tests without LeRobot."""


def write_case(name: str, root: Path) -> None:
    """Make the dataset of a case and write what LeRobot reads from it.

    Args:
        name: of ``CASES``.
        root: directory of the dataset; replaced.
    """
    case = CASES[name]
    shutil.rmtree(root, ignore_errors=True)
    _write_dataset(case, root)
    if case.rewritten is not None:
        for path in sorted(root.glob("videos/*base/*/*.mp4")) + sorted(
            root.glob("videos/*wrist/*/*.mp4")
        ):
            _rewrite(path, sum(case.lengths), case.rewritten)
    shutil.rmtree(root / "images", ignore_errors=True)
    (root / "lerobot.json").write_text(json.dumps(_read_by_lerobot(case, root), indent=1))


def _write_dataset(case: Case, root: Path) -> None:
    picture = {"dtype": case.kind, "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {
        f"observation.images.{name}": {**picture, "shape": (HEIGHT, WIDTH, 3)}
        for name in case.cameras
    }
    if case.depth:
        info = {"is_depth_map": True}
        depth = {**picture, "shape": (HEIGHT, WIDTH, 1), "info": info}
        features["observation.images.depth"] = depth
    features["observation.state"] = {"dtype": "float32", "shape": (len(STATE),), "names": STATE}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": ["x", "gripper"]}
    dataset = LeRobotDataset.create(
        repo_id="golden/case",
        fps=FPS,
        features=features,
        root=root,
        robot_type="panda",
        use_videos=case.kind == "video",
        rgb_encoder=RGBEncoderConfig(**case.encoder),
        depth_encoder=DepthEncoderConfig() if case.depth else None,
        encoder_threads=1,
    )
    random = np.random.default_rng(0)
    for episode, length in enumerate(case.lengths):
        for number in range(length):
            frame: dict[str, Any] = {
                f"observation.images.{name}": picture_of(camera, episode, number)
                for camera, name in enumerate(case.cameras)
            }
            if case.depth:
                frame["observation.images.depth"] = _depth_of(number)
            frame["observation.state"] = random.uniform(-1, 1, len(STATE)).astype(np.float32)
            frame["action"] = random.uniform(-1, 1, 2).astype(np.float32)
            frame["task"] = TASKS[episode % len(TASKS)]
            dataset.add_frame(frame)
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def picture_of(camera: int, episode: int, number: int) -> np.ndarray:
    """An image that no other frame has, smooth enough to be small: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    red = 127 + 100 * np.sin(x / 9 + number / 5 + camera)
    green = 127 + 100 * np.cos(y / 7 + number / 3 - episode)
    image = np.stack([red, green, (x * y / 12 + 5 * number) % 256], axis=-1)
    left = (number * 3) % (WIDTH - 8)
    image[20:28, left : left + 8] = (250, 20, (30 * episode + 90 * camera) % 256)
    return image.clip(0, 255).astype(np.uint8)


def _depth_of(number: int) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return (500 + 20 * x + 10 * y + 40 * number).astype(np.uint16)[..., None]


def _rewrite(path: Path, rows: int, how: Rewritten) -> None:
    """A video of as many rows, with times of its own, in place of one that LeRobot wrote."""
    base = Fraction(1, 12_000)
    camera = int("wrist" in str(path))
    with av.open(str(path), "w", options=how.container) as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options=how.options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        for number in range(rows * how.per_row):
            frame = av.VideoFrame.from_ndarray(picture_of(camera, 0, number), format="rgb24")
            frame.pts, frame.time_base = round(how.times(number) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if how.skip:
        _cut(path, how.skip)


def _cut(path: Path, seconds: float) -> None:
    """Copy packets from the keyframe before a time on, which an edit list then hides."""
    whole = path.with_suffix(".whole.mp4")
    path.rename(whole)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copied: Any = target.add_stream_from_template(stream)
        start = round(seconds / stream.time_base)
        source.seek(start, stream=stream, backward=True)
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = copied
            target.mux(packet)
    whole.unlink()


def _read_by_lerobot(case: Case, root: Path) -> dict[str, Any]:
    dataset = LeRobotDataset(
        "golden/case",
        root=root,
        video_backend="pyav",
        return_uint8=True,
        tolerance_s=case.tolerance,
    )
    names = [f"observation.images.{name}" for name in case.cameras]
    rows = []
    for i in range(len(dataset)):
        numbers = dataset.hf_dataset[i]
        row: dict[str, Any] = {
            "episode": int(numbers["episode_index"]),
            "frame": int(numbers["frame_index"]),
            "state": numbers["observation.state"].tolist(),
            "task": dataset.meta.tasks.iloc[int(numbers["task_index"])].name,
            "images": None,
        }
        try:
            item = dataset[i]
        except (ValueError, av.FFmpegError) as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:100]}"
            row["plain"] = _decoded_plainly(dataset, numbers, names, case.tolerance)
        else:
            assert item["task"] == row["task"]
            row["images"] = {name: digest_of(item[name].numpy()) for name in names}
        rows.append(row)
    return {"tolerance_s": case.tolerance, "rows": rows}


def _decoded_plainly(
    dataset: LeRobotDataset, numbers: dict[str, Any], names: Sequence[str], tolerance: float
) -> dict[str, str] | None:
    """The images of a row, decoded by LeRobot from the first frame of their files on."""
    episode = int(numbers["episode_index"])
    images = {}
    for name in names:
        path = dataset.root / dataset.meta.get_video_file_path(episode, name)
        start = dataset.meta.episodes[episode][f"videos/{name}/from_timestamp"]
        with av.open(str(path)) as container:
            first = next(container.decode(video=0))
            times = [float(first.pts * first.time_base), start + float(numbers["timestamp"])]
        try:
            both = decode_video_frames(path, times, tolerance, "pyav", return_uint8=True)
        except ValueError:
            return None
        images[name] = digest_of(both[1].numpy())
    return images


def digest_of(image: np.ndarray) -> str:
    """SHA-256 of an image [3, H, W], uint8 or float in [0, 1], as uint8 [H, W, 3]."""
    if image.dtype != np.uint8:
        image = (image * 255).round().astype(np.uint8)
    return hashlib.sha256(np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes()).hexdigest()


def write_golden(archive: Path) -> None:
    """The cases of ``GOLDEN`` as one file."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w") as target:
        for name in GOLDEN:
            write_case(name, Path(folder) / name)
            for path in sorted((Path(folder) / name).rglob("*")):
                if path.is_file():
                    target.write(path, path.relative_to(folder), zipfile.ZIP_LZMA)


def main(target: Path, chosen: Sequence[str]) -> None:
    """See the head of this file."""
    if target.suffix == ".zip":
        write_golden(target)
        return
    for name in chosen or CASES:
        write_case(name, target / name)
        rows = json.loads((target / name / "lerobot.json").read_text())["rows"]
        given = sum(row["images"] is not None for row in rows)
        print(f"{name}: LeRobot gives {given} of {len(rows)} rows", flush=True)


if __name__ == "__main__":
    job = json.load(sys.stdin)
    main(Path(job["target"]), job["cases"])
