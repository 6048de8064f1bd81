"""Single frames by timestamp: the right one, in any order, without decoding more than needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.calibration.video import Video
from omega_qvla.errors import ObservationError

LENGTH, FPS = 60, 10
TOLERANCE = 0.5 / FPS

Shown = Callable[[np.ndarray], tuple[int, int, int]]


@pytest.fixture(params=[("libx264", 2), ("libx264", 250), ("mpeg4", 7)], ids=str)
def video(request: pytest.FixtureRequest, write_dataset: Callable[..., Any]) -> Path:
    """One episode; H.264 here has B-frames, so frames are not stored in the order shown."""
    codec, keyframes = request.param
    written = write_dataset(lengths=(LENGTH,), told=(0,), codec=codec, keyframes=keyframes)
    return written.video(0)


@pytest.mark.parametrize("order", ["ascending", "descending", "drawn", "repeated"])
def test_every_frame_is_found_by_its_time_in_any_order(
    video: Path, order: str, shown: Shown
) -> None:
    numbers = {
        "ascending": range(LENGTH),
        "descending": range(LENGTH - 1, -1, -1),
        "drawn": np.random.default_rng(0).permutation(LENGTH),
        "repeated": [5, 5, 59, 59, 0, 0],
    }[order]
    with Video(video, "video") as opened:
        for number in numbers:
            time = float(np.float32(number / FPS))  # as the tables of LeRobot store it
            assert shown(opened.frame_at(time, TOLERANCE).image) == (0, 0, number)


def test_ascending_times_decode_no_frame_twice(
    write_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_dataset(lengths=(LENGTH,), told=(0,), keyframes=250)
    with Video(written.video(0), "video") as opened:
        decoded: list[float] = []
        frames = opened._decode

        def counted(first: int) -> Any:
            for frame in frames(first):
                decoded.append(frame.time)
                yield frame

        monkeypatch.setattr(opened, "_decode", counted)
        for number in (10, 20, 40, 59):
            opened.frame_at(number / FPS, TOLERANCE)
    assert decoded == sorted(set(decoded)) and decoded[-1] == 5.9


def test_a_far_frame_is_reached_through_its_keyframe_alone(
    write_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_dataset(lengths=(LENGTH,), told=(0,), keyframes=6, codec="mpeg4")
    with Video(written.video(0), "video") as opened:
        decoded: list[float] = []
        frames = opened._decode

        def counted(first: int) -> Any:
            for frame in frames(first):
                decoded.append(frame.time)
                yield frame

        monkeypatch.setattr(opened, "_decode", counted)
        for number in (3, 52):
            opened.frame_at(number / FPS, TOLERANCE)
    assert len(decoded) <= 4 + 6


@pytest.mark.parametrize("time", [-1.0, 6.0, 1e9])
def test_a_time_without_a_frame_is_refused_and_the_video_stays_usable(
    video: Path, time: float, shown: Shown
) -> None:
    with Video(video, "video") as opened:
        with pytest.raises(ObservationError, match="no frame at"):
            opened.frame_at(time, TOLERANCE)
        assert shown(opened.frame_at(1.0, TOLERANCE).image) == (0, 0, 10)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra `data` is not installed")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(ObservationError, match=rf"cannot read {name}.*half-downloaded"):
            Video(tmp_path / name, name)
    with pytest.raises(ObservationError, match="is missing"):
        Video(tmp_path / "none.mp4", "none.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6.0,\n{other}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{other}'\n",
    ],
    ids=["playlist", "concatenation"],
)
def test_a_list_of_other_files_is_no_video(
    write_dataset: Callable[..., Any], tmp_path: Path, text: str
) -> None:
    """FFmpeg would open what it names, inside the dataset or not."""
    other = write_dataset("v2.1", lengths=(8,), told=(0,)).video(0)
    (tmp_path / "list.mp4").write_text(text.format(other=other))
    with pytest.raises(ObservationError, match=r"cannot read list\.mp4"):
        Video(tmp_path / "list.mp4", "list.mp4")


def test_damage_counts_against_the_frames_that_depend_on_it_and_no_others(
    write_dataset: Callable[..., Any], shown: Shown
) -> None:
    """Bytes in the middle are overwritten: what decodes is right, what does not is refused."""
    written = write_dataset(lengths=(LENGTH,), told=(0,), keyframes=4)
    content = bytearray(written.video(0).read_bytes())
    begin = content.index(b"mdat") + 4
    middle = begin + (len(content) - begin) // 3
    content[middle : middle + 400] = bytes(400)
    written.video(0).write_bytes(content)
    refused = []
    with Video(written.video(0), "video") as opened:
        for number in range(LENGTH):
            try:
                assert shown(opened.frame_at(number / FPS, TOLERANCE).image) == (0, 0, number)
            except ObservationError:
                refused.append(number)
    assert 0 < len(refused) < LENGTH // 2
    assert np.ptp(refused) < LENGTH // 2


def test_a_file_cut_short_gives_the_frames_it_still_has(
    write_dataset: Callable[..., Any], shown: Shown, tmp_path: Path
) -> None:
    """An interrupted download of a file whose index comes first, as LeRobot 3.0 writes them."""
    import av

    written = write_dataset(lengths=(LENGTH,), told=(0,), keyframes=4, codec="mpeg4")
    front = tmp_path / "front.mp4"
    with (
        av.open(str(written.video(0))) as source,
        av.open(str(front), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = front.read_bytes()
    front.write_bytes(content[: len(content) * 2 // 3])
    with Video(front, "front") as opened:
        for number in range(20):
            assert shown(opened.frame_at(number / FPS, TOLERANCE).image) == (0, 0, number)
        with pytest.raises(ObservationError, match=r"front (is damaged|has no frame)"):
            opened.frame_at(5.5, TOLERANCE)


def test_more_than_8_bits_are_refused_by_name(tmp_path: Path) -> None:
    """Depth maps are stored so, and how such colours are converted depends on the decoder."""
    av = pytest.importorskip("av", reason="the extra `data` is not installed")
    with av.open(str(tmp_path / "deep.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ObservationError, match=r"deep has 10 bits per channel \(yuv420p10le\)"):
        Video(tmp_path / "deep.mp4", "deep")


@pytest.mark.parametrize(("time", "number"), [(0.26, 3), (0.24, 2), (0.25, 2), (-0.04, 0)])
def test_the_nearest_frame_is_shown_the_earlier_of_two(
    video: Path, time: float, number: int, shown: Shown
) -> None:
    with Video(video, "video") as opened:
        found = opened.frame_at(time, TOLERANCE + 1e-4)
        assert shown(found.image) == (0, 0, number)
        assert found.time == pytest.approx(number / FPS)
