"""LeRobot datasets written on the fly in the real layouts of versions 2.0, 2.1 and 3.0.

Every image carries its camera, episode and frame as black and white blocks, which survive lossy
coding, so that a test can say which frame it was given.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH, BLOCK, FPS = 48, 64, 8, 10
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

PANDAS_INDEX = {
    "index_columns": ["__index_level_0__"],
    "column_indexes": [],
    "columns": [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": stored}
        for name, field, kind, stored in (
            ("task_index", "task_index", "int64", "int64"),
            (None, "__index_level_0__", "unicode", "object"),
        )
    ],
}
"""What pandas writes beside a table whose nameless index is the instructions."""


def draw(camera: int, episode: int, frame: int) -> np.ndarray:
    """An image that says what it is, uint8 [H, W, 3]."""
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    for row, value in enumerate((camera, episode, frame)):
        for bit in range(8):
            shade = 235 if value >> bit & 1 else 20
            top, left = row * 2 * BLOCK, bit * BLOCK
            image[top : top + BLOCK, left : left + BLOCK] = shade
    return image


def what_is_shown(image: np.ndarray) -> tuple[int, int, int]:
    """(camera, episode, frame) of an image that was drawn by ``draw``."""
    values = []
    for row in range(3):
        blocks = [
            image[row * 2 * BLOCK + 2 : row * 2 * BLOCK + 6, b * BLOCK + 2 : b * BLOCK + 6].mean()
            for b in range(8)
        ]
        values.append(sum((shade > 128) << bit for bit, shade in enumerate(blocks)))
    return values[0], values[1], values[2]


def draw_state(episode: int, frame: int) -> list[float]:
    """The state of a frame; every number of it is exact in float32."""
    return [episode, frame / 4, -episode / 2, frame, 0.5, -0.25]


@dataclass
class Written:
    """A dataset on disk, and how it was made.

    Attributes:
        lengths: frames of each episode.
        told: task index of each episode.
    """

    root: Path
    version: str = "v2.1"
    lengths: Sequence[int] = (12, 30, 20)
    told: Sequence[int] = (0, 1, 0)
    instructions: Sequence[str] = ("open the door", "close the lid")
    cameras: Sequence[str] = ("observation.images.base", "observation.images.wrist")
    stored_as: str = "video"
    keyframes: int = 2
    codec: str = "libx264"
    file_episodes: int = 2
    state_width: int = 6
    states: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def write(self) -> Written:
        """Write everything."""
        (self.root / "meta").mkdir(parents=True)
        self._write_info()
        if self.version == "v3.0":
            self._write_v3()
        else:
            self._write_v2()
        return self

    def info(self) -> dict[str, Any]:
        return json.loads((self.root / "meta/info.json").read_text())

    def change_info(self, **changes: Any) -> None:
        """Replace entries of info.json."""
        (self.root / "meta/info.json").write_text(json.dumps({**self.info(), **changes}))

    def video(self, episode: int, camera: str = "observation.images.base") -> Path:
        """The video of an episode."""
        values = {"video_key": camera, "episode_chunk": 0, "episode_index": episode}
        values |= {"chunk_index": 0, "file_index": episode // self.file_episodes}
        return self.root / self.info()["video_path"].format(**values)

    def data(self, episode: int) -> Path:
        """The table of an episode."""
        values = {"episode_chunk": 0, "episode_index": episode, "chunk_index": 0}
        values["file_index"] = episode // self.file_episodes
        return self.root / self.info()["data_path"].format(**values)

    def _write_info(self) -> None:
        picture = {"shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
        numbers = {"shape": [1], "names": None}
        v3 = self.version == "v3.0"
        features = {key: {"dtype": self.stored_as, **picture} for key in self.cameras}
        features |= {
            "observation.state": {"dtype": "float32", "shape": [self.state_width]},
            "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            "timestamp": {"dtype": "float32", **numbers},
            **{
                name: {"dtype": "int64", **numbers}
                for name in ("frame_index", "episode_index", "index", "task_index")
            },
        }
        info = {
            "codebase_version": self.version,
            "robot_type": "test",
            "total_episodes": len(self.lengths),
            "total_frames": sum(self.lengths),
            "total_tasks": len(self.instructions),
            "chunks_size": 1000,
            "fps": FPS,
            "splits": {"train": f"0:{len(self.lengths)}"},
            "data_path": V3_DATA if v3 else V2_DATA,
            "video_path": (V3_VIDEO if v3 else V2_VIDEO) if self.stored_as == "video" else None,
            "features": features,
        }
        if not v3:
            info |= {"total_videos": len(self.lengths) * len(self.cameras), "total_chunks": 1}
        (self.root / "meta/info.json").write_text(json.dumps(info, indent=4))

    def _write_v2(self) -> None:
        rows = [
            {"episode_index": i, "tasks": [self.instructions[task]], "length": length}
            for i, (length, task) in enumerate(zip(self.lengths, self.told, strict=True))
        ]
        write_lines(self.root / "meta/episodes.jsonl", rows)
        tasks = [{"task_index": i, "task": text} for i, text in enumerate(self.instructions)]
        write_lines(self.root / "meta/tasks.jsonl", tasks)
        statistics = {"min": [0.0], "max": [1.0], "mean": [0.5], "std": [1.0], "count": [1]}
        stats = {"observation.state": statistics}
        write_lines(
            self.root / "meta/episodes_stats.jsonl",
            [{"episode_index": i, "stats": stats} for i in range(len(self.lengths))],
        )
        for episode in range(len(self.lengths)):
            self._write_table(self.data(episode), [episode])
            if self.stored_as == "video":
                for number, key in enumerate(self.cameras):
                    self._write_video(self.video(episode, key), number, [episode])

    def _write_v3(self) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        rows, begin, clock = [], 0, 0
        for i, (length, task) in enumerate(zip(self.lengths, self.told, strict=True)):
            file = i // self.file_episodes
            clock = 0 if i % self.file_episodes == 0 else clock
            row = {
                "episode_index": i,
                "tasks": [self.instructions[task]],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": begin,
                "dataset_to_index": begin + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
            for key in self.cameras if self.stored_as == "video" else ():
                row |= {
                    f"videos/{key}/chunk_index": 0,
                    f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": clock / FPS,
                    f"videos/{key}/to_timestamp": (clock + length) / FPS,
                }
            rows.append(row)
            begin, clock = begin + length, clock + length
        path = self.root / "meta/episodes/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(arrow.Table.from_pylist(rows), path)
        tasks = {
            "task_index": list(range(len(self.instructions))),
            "__index_level_0__": list(self.instructions),
        }
        table = arrow.table(tasks).replace_schema_metadata({"pandas": json.dumps(PANDAS_INDEX)})
        parquet.write_table(table, self.root / "meta/tasks.parquet")
        for begin in range(0, len(self.lengths), self.file_episodes):
            together = list(range(len(self.lengths)))[begin : begin + self.file_episodes]
            self._write_table(self.data(begin), together)
            for number, key in enumerate(self.cameras if self.stored_as == "video" else ()):
                self._write_video(self.video(begin, key), number, together)

    def _write_table(self, path: Path, episodes: Sequence[int]) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = [(episode, frame) for episode in episodes for frame in range(self.lengths[episode])]
        first = [sum(self.lengths[:episode]) for episode in range(len(self.lengths))]
        states = [self.states.get(p, draw_state(*p)[: self.state_width]) for p in pairs]
        columns: dict[str, Any] = {
            "observation.state": arrow.array(states, arrow.list_(arrow.float32())),
            "action": arrow.array([[0.0, 1.0]] * len(pairs), arrow.list_(arrow.float32())),
            "timestamp": arrow.array([f / FPS for _, f in pairs], arrow.float32()),
            "frame_index": [f for _, f in pairs],
            "episode_index": [e for e, _ in pairs],
            "index": [first[e] + f for e, f in pairs],
            "task_index": [self.told[e] for e, _ in pairs],
        }
        if self.stored_as == "image":
            for number, key in enumerate(self.cameras):
                columns[key] = [
                    {"bytes": png(draw(number, e, f)), "path": f"frame_{f:06d}.png"}
                    for e, f in pairs
                ]
        kinds = {name: {"dtype": "int64", "_type": "Value"} for name in columns}
        kinds["timestamp"] = {"dtype": "float32", "_type": "Value"}
        numbers = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        kinds |= {"observation.state": numbers, "action": numbers}
        kinds |= {key: {"_type": "Image"} for key in self.cameras if key in columns}
        features = json.dumps({"info": {"features": kinds}})
        table = arrow.table(columns).replace_schema_metadata({"huggingface": features})
        # Small row groups: an episode begins in the middle of one and spans several.
        parquet.write_table(table, path, row_group_size=8)

    def _write_video(self, path: Path, camera: int, episodes: Sequence[int]) -> None:
        images = [draw(camera, e, f) for e in episodes for f in range(self.lengths[e])]
        write_video(path, images, codec=self.codec, keyframes=self.keyframes)


def write_video(path: Path, images: Sequence[np.ndarray], codec: str, keyframes: int) -> None:
    """A constant-rate mp4 with a keyframe every ``keyframes`` frames, B-frames where it can."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = keyframes
        stream.codec_context.time_base = Fraction(1, FPS)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def png(image: np.ndarray) -> bytes:
    """An image as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
