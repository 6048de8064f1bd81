"""Incomplete, damaged and hostile datasets: what can be skipped is counted, the rest is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omega_qvla.calibration.lerobot import map_cameras
from omega_qvla.calibration.lerobot_frames import (
    Frame,
    ObservationReader,
    RowReader,
    UnreadableError,
    decode_image,
)
from omega_qvla.calibration.lerobot_metadata import read_dataset
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError

Write = Callable[..., Any]
EVEN = (20, 20, 20, 20)


def episodes_of(observations: Observations) -> set[int]:
    return {int(o["state"][0]) for o in observations}


def report_of(observations: Observations) -> str:
    assert observations.report is not None
    return "\n".join(observations.report.lines())


def cut(path: Path, part: float = 0.5) -> None:
    """Leave the first part of a file, as an interrupted download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


@pytest.mark.parametrize("part", [0.0, 0.5, 0.8])
def test_a_truncated_video_costs_its_own_frames_and_is_reported(
    write_dataset: Write, part: float
) -> None:
    written = write_dataset("v2.1", lengths=EVEN, told=(0, 1, 0, 1))
    cut(written.video(1), part)
    observations = Observations.from_lerobot(written.root, limit=16)
    assert episodes_of(observations) == {0, 2, 3} and len(observations) == 12
    assert observations.report is not None and len(observations.report.skipped) == 4
    assert "skipped 4 in videos/chunk-000/observation.images.base/episode_000001.mp4" in report_of(
        observations
    )


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_an_unreadable_table_costs_its_own_frames(write_dataset: Write, version: str) -> None:
    written = write_dataset(version, lengths=EVEN, told=(0, 1, 0, 1))
    cut(written.data(0))
    observations = Observations.from_lerobot(written.root, limit=16)
    lost = {0} if version == "v2.1" else {0, 1}  # which lie in one file there
    assert episodes_of(observations) == {0, 1, 2, 3} - lost
    assert "half-downloaded or damaged" in report_of(observations)


def test_too_few_readable_frames_are_an_error_that_says_what_is_wrong(write_dataset: Write) -> None:
    written = write_dataset("v2.1", lengths=EVEN, told=(0, 1, 0, 1))
    for episode in range(3):
        cut(written.video(episode))
    with pytest.raises(ObservationError, match=r"only 4 of the 16 frames.*at least 8.*000000\.mp4"):
        Observations.from_lerobot(written.root, limit=16)


@pytest.mark.parametrize("kind", ["video", "data"])
def test_episodes_whose_files_are_missing_are_left_out_before_frames_are_chosen(
    write_dataset: Write, kind: str
) -> None:
    written = write_dataset("v2.1", lengths=EVEN, told=(0, 1, 0, 1))
    lost = written.video(2) if kind == "video" else written.data(2)
    lost.unlink()
    observations = Observations.from_lerobot(written.root, limit=16)
    assert len(observations) == 16 and episodes_of(observations) == {0, 1, 3}
    assert "1 of 4 episodes left out, their files are missing" in report_of(observations)
    assert str(lost.relative_to(written.root)) in report_of(observations)


def test_a_camera_without_any_video_is_an_error(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    for episode in range(3):
        written.video(episode, "observation.images.wrist").unlink()
    with pytest.raises(ObservationError, match=r"declares camera 'observation\.images\.wrist'"):
        Observations.load(written.root)
    assert len(Observations.from_lerobot(written.root, cameras=["base"], limit=4)) == 4


def test_a_camera_that_was_not_recorded_everywhere_costs_those_episodes(
    write_dataset: Write,
) -> None:
    """Version 3.0 describes clips in the columns of its episodes: empty, or not there at all."""
    import pyarrow as arrow
    from pyarrow import parquet

    written = write_dataset("v3.0", lengths=EVEN, told=(0, 1, 0, 1))
    path = written.root / "meta/episodes/chunk-000/file-000.parquet"
    rows = parquet.read_table(path)
    prefix = "videos/observation.images.wrist/"
    names = [name for name in rows.schema.names if name.startswith(prefix)]
    emptied = rows.to_pylist()
    emptied[1] |= dict.fromkeys(names)
    parquet.write_table(arrow.Table.from_pylist(emptied, rows.schema), path)
    observations = Observations.from_lerobot(written.root, limit=16)
    assert episodes_of(observations) == {0, 2, 3}
    assert "first a video of observation.images.wrist in episode 1" in report_of(observations)
    parquet.write_table(rows.drop_columns(names), path)
    with pytest.raises(ObservationError, match=r"declares camera 'observation\.images\.wrist'"):
        Observations.load(written.root)
    assert episodes_of(Observations.from_lerobot(written.root, cameras=["base"])) == {0, 1, 2, 3}


def test_a_dataset_without_any_file_left_is_an_error(write_dataset: Write) -> None:
    written = write_dataset("v2.1", stored_as="image")
    shutil.rmtree(written.root / "data")
    with pytest.raises(ObservationError, match=r"no episode whose files.*episode_000000\.parquet"):
        Observations.load(written.root)


@pytest.mark.parametrize("version", ["v1.6", "v4.0", None, 3])
def test_other_versions_are_refused(write_dataset: Write, version: Any) -> None:
    written = write_dataset("v2.1")
    written.change_info(codebase_version=version)
    with pytest.raises(ObservationError, match=r"codebase_version.*reads v2\.0, v2\.1, v3\.0"):
        Observations.load(written.root)


@pytest.mark.parametrize(("written_as", "said"), [("v2.1", "v3.0"), ("v3.0", "v2.1")])
def test_mixed_versions_are_refused(write_dataset: Write, written_as: str, said: str) -> None:
    written = write_dataset(written_as)
    written.change_info(codebase_version=said)
    with pytest.raises(ObservationError, match=rf"says {said}.*is missing, but there is.*mixed"):
        Observations.load(written.root)


def test_paths_of_another_version_are_refused(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    written.change_info(data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    with pytest.raises(ObservationError, match=r"asks for 'chunk_index'.*versions are mixed"):
        Observations.load(written.root)


def test_frames_without_an_instruction_are_skipped(write_dataset: Write) -> None:
    written = write_dataset("v2.1", lengths=EVEN, told=(0, 0, 0, 1))
    (written.root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "open"}\n')
    observations = Observations.from_lerobot(written.root, limit=16)
    assert episodes_of(observations) == {0, 1, 2}
    assert "task_index 1 has no instruction" in report_of(observations)
    told = Observations.from_lerobot(written.root, limit=16, instruction="do it")
    assert len(told) == 16 and {o["prompt"] for o in told} == {"do it"}


def test_a_dataset_without_tasks_is_an_error(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    (written.root / "meta/tasks.jsonl").unlink()
    with pytest.raises(ObservationError, match=r"tasks\.jsonl is missing"):
        Observations.load(written.root)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_state_that_is_not_finite_costs_its_frame(write_dataset: Write, value: float) -> None:
    bad = {(0, frame): [0.0, 0.0, value, 0.0, 0.0, 0.0] for frame in range(4)}
    written = write_dataset("v2.1", lengths=(10, 40), told=(0, 1), states=bad)
    observations = Observations.from_lerobot(written.root, limit=10)
    assert observations.report is not None
    assert [s.place.split(",")[0] for s in observations.report.skipped] == ["episode 0"] * 2
    assert "the state has NaN or Inf at [2]" in report_of(observations)


def test_a_state_of_another_width_is_refused(write_dataset: Write) -> None:
    written = write_dataset("v2.1", states={(0, frame): [0.0] * 5 for frame in range(12)})
    with pytest.raises(ObservationError, match=r"observation\.state has 5 numbers.*declares 6"):
        Observations.load(written.root)


def test_an_episode_shorter_than_its_description_costs_the_frames_it_lacks(
    write_dataset: Write,
) -> None:
    written = write_dataset("v2.1", lengths=(20, 20), told=(0, 1))
    lines = (
        (written.root / "meta/episodes.jsonl")
        .read_text()
        .replace('"length": 20', '"length": 40', 1)
    )
    (written.root / "meta/episodes.jsonl").write_text(lines)
    observations = Observations.from_lerobot(written.root, limit=20)
    assert "the file has 20 rows of 40" in report_of(observations)
    assert len(observations) == 15


def test_rows_out_of_order_are_skipped(write_dataset: Write) -> None:
    from pyarrow import parquet

    written = write_dataset("v2.1", lengths=(20, 20, 20), told=(0, 1, 0))
    table = parquet.read_table(written.data(1))
    parquet.write_table(table.take(list(range(19, -1, -1))), written.data(1))
    observations = Observations.from_lerobot(written.root, limit=12)
    assert episodes_of(observations) == {0, 2}
    assert "rows are out of order" in report_of(observations)


def test_a_time_past_the_episode_never_shows_the_next_one(write_dataset: Write) -> None:
    """In version 3.0 the next episode follows in the same video."""
    import pyarrow as arrow
    from pyarrow import parquet

    written = write_dataset("v3.0", lengths=(20, 20), told=(0, 1))
    table = parquet.read_table(written.data(0))
    times = [(f + 10) / 10 for f in range(20)] * 2
    place = table.schema.get_field_index("timestamp")
    late = table.set_column(place, "timestamp", arrow.array(times, arrow.float32()))
    parquet.write_table(late, written.data(0))
    observations = Observations.from_lerobot(written.root, limit=20)
    assert all(o["state"][3] < 10 for o in observations)
    assert "past the end of its video" in report_of(observations)


def test_a_damaged_encoded_image_costs_its_frame(write_dataset: Write) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    written = write_dataset("v2.1", stored_as="image", lengths=(8, 40), told=(0, 1))
    table = parquet.read_table(written.data(0))
    key = "observation.images.base"
    cells = [{**c, "bytes": c["bytes"][:60]} for c in table[key].to_pylist()]
    broken = table.set_column(table.schema.get_field_index(key), key, arrow.array(cells))
    parquet.write_table(broken, written.data(0))
    observations = Observations.from_lerobot(written.root, limit=12)
    assert episodes_of(observations) == {1}
    assert "the image is damaged" in report_of(observations)


@pytest.mark.parametrize(
    "template",
    [
        "../outside/{episode_index}.parquet",
        "/etc/{episode_index}.parquet",
        "data/../../{episode_index}",
        "data/{episode_index.__class__}",
        "data/{episode_index:099999999999d}",
        "data/{episode_index!r:>99}",
        "data/{}",
        "data/\0{episode_index}",
    ],
)
def test_paths_that_lead_out_or_are_no_templates_are_refused(
    write_dataset: Write, template: str
) -> None:
    written = write_dataset("v2.1", stored_as="image")
    written.change_info(data_path=template)
    with pytest.raises(ObservationError, match=r"leads out|not a path template|no usable path"):
        Observations.load(written.root)


def test_feature_names_cannot_lead_out(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    features = written.info()["features"]
    picture = features["observation.images.base"]
    written.change_info(features={**features, "../../../../../etc": picture})
    with pytest.raises(ObservationError, match="leads out"):
        Observations.load(written.root)


@pytest.mark.parametrize("name", ["meta/info.json", "meta/episodes.jsonl", "data", "videos"])
def test_links_that_lead_out_are_refused(write_dataset: Write, tmp_path: Path, name: str) -> None:
    written = write_dataset("v2.1")
    outside = tmp_path / "outside"
    (written.root / name).rename(outside)
    (written.root / name).symlink_to(outside)
    with pytest.raises(ObservationError, match="leads out of the dataset"):
        Observations.load(written.root)


def test_the_links_of_a_download_cache_are_followed(write_dataset: Write, tmp_path: Path) -> None:
    written = write_dataset("v2.1", lengths=(12,), told=(0,))
    cache = tmp_path / "datasets--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(written.root, snapshot)
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert Observations.load(snapshot).fingerprint == Observations.load(written.root).fingerprint


def test_other_directories_are_refused_saying_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ObservationError, match=r"neither meta/info\.json.*nor any \.npz"):
        Observations.load(tmp_path)
    (tmp_path / "meta").mkdir()
    with pytest.raises(ObservationError, match=r"has no meta/info\.json"):
        Observations.load(tmp_path)
    with pytest.raises(ObservationError, match="is not a directory"):
        Observations.from_lerobot(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("meta/info.json", "{", "not readable JSON"),
        ("meta/info.json", "[" * 100_000, "not readable JSON"),
        ("meta/info.json", '{"codebase_version": "v2.1"}', "fps: Field required"),
        ("meta/episodes.jsonl", '{"episode_index": 0, "len', "line 1 is not JSON.*half-downloaded"),
        ("meta/episodes.jsonl", "[]", "line 1 is no JSON object"),
        ("meta/episodes.jsonl", "", "describes no episode"),
        ("meta/episodes.jsonl", '{"episode_index": -1, "length": 3}', "episode_index is -1"),
        ("meta/episodes.jsonl", '{"episode_index": 0, "length": "3"}', "length is '3'"),
        ("meta/tasks.jsonl", '{"task": "open"}', "task_index is None"),
        ("meta/modality.json", '{"state": {"arm": {"start": -1, "end": 2}}}', r"state\.arm\.start"),
        ("meta/modality.json", '{"state": 3}', "modality.json: state"),
    ],
)
def test_descriptions_that_are_not_what_they_should_be_are_refused(
    write_dataset: Write, name: str, content: str, expected: str
) -> None:
    written = write_dataset("v2.1")
    (written.root / name).write_text(content)
    with pytest.raises(ObservationError, match=expected):
        Observations.load(written.root)


def test_a_slice_beyond_the_state_is_refused(write_dataset: Write) -> None:
    written = write_dataset("v2.1")
    part = {"state": {"arm": {"start": 4, "end": 7}}}
    (written.root / "meta/modality.json").write_text(json.dumps(part))
    with pytest.raises(ObservationError, match=r"state 'arm'.*\[4:7\], which has 6 numbers"):
        Observations.from_lerobot(written.root, state=["arm"])


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_mutated_description_is_refused_or_read_but_never_crashes(
    write_dataset: Write, tmp_path: Path, version: str, data: Any
) -> None:
    """One file of ``meta`` with flipped, dropped or doubled bytes; only our errors come out."""
    if not (tmp_path / "dataset").exists():
        write_dataset(version, lengths=(6, 4), told=(0, 1))
        shutil.copytree(tmp_path / "dataset" / "meta", tmp_path / "whole")
    root = tmp_path / "dataset"
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    name = data.draw(st.sampled_from(files))
    content = bytearray((tmp_path / "whole" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (root / "meta" / name).write_bytes(content)
    try:
        read_dataset(root)
    except ObservationError as error:
        assert str(root) in str(error)
    finally:
        (root / "meta" / name).write_bytes((tmp_path / "whole" / name).read_bytes())


def test_an_image_before_the_beginning_of_its_episode_is_not_shown(write_dataset: Write) -> None:
    """The description lets the second episode begin between two frames; the nearest is before."""
    from pyarrow import parquet

    written = write_dataset("v3.0", lengths=(20, 20), told=(0, 1))
    path = written.root / "meta/episodes/chunk-000/file-000.parquet"
    table = parquet.read_table(path)
    rows = table.to_pylist()
    for camera in written.cameras:
        rows[1][f"videos/{camera}/from_timestamp"] = 2.04
    parquet.write_table(type(table).from_pylist(rows), path)
    dataset = read_dataset(written.root)
    frames = RowReader(dataset, dataset.state_parts(None)).frames(dataset.episodes[1], [0, 1])
    reader = ObservationReader(dataset, map_cameras(dataset, None))
    before, after = (frame for frame in frames if isinstance(frame, Frame))
    with pytest.raises(UnreadableError, match="belongs to another episode"):
        reader.read(before)
    reader.read(after)
    assert reader.displaced == {(1, 1): pytest.approx(0.04)}


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P", "LA"])
def test_images_that_are_not_rgb_are_refused_by_their_kind(mode: str) -> None:
    """LeRobot shows a policy another number of channels there, or raw depths."""
    image = pytest.importorskip("PIL.Image", reason="the extra `data` is not installed")
    buffer = io.BytesIO()
    image.new(mode, (4, 3)).save(buffer, "PNG")
    with pytest.raises(ObservationError, match=rf"of kind {mode}, not RGB"):
        decode_image({"bytes": buffer.getvalue()})


def test_an_image_is_turned_as_its_exif_data_say(write_dataset: Write) -> None:
    """As the ``datasets`` library does, with which LeRobot reads images."""
    image = pytest.importorskip("PIL.Image", reason="the extra `data` is not installed")
    pixels = np.zeros((3, 4, 3), np.uint8)
    pixels[0, 0] = 255
    exif = image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    turned = decode_image({"bytes": buffer.getvalue()})
    assert turned.shape == (4, 3, 3) and np.array_equal(turned, np.rot90(pixels, -1))
