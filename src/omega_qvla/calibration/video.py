"""Single frames of a video by timestamp, through PyAV: the frames LeRobot shows.

**Which frame.**  The one whose presentation time is nearest to the time asked for, the earlier one
of two equally near.  As in LeRobot, times are the file's own (a video whose first frame is at 0.2 s
has none at 0), and distances are compared in float32.

**Where to begin.**  A decoder needs a keyframe and everything after it.  Videos differ widely
there: LeRobot writes a keyframe every second frame, others one in 250.  A second, undecoded reader
of the same file therefore looks up where the keyframe lies; if the decoder has passed it already
it goes on from where it is, otherwise it jumps.  Ascending times thus decode no frame twice.

In an open group of pictures the keyframe is followed by pictures that are shown before it and
predicted from the group before; a decoder that begins at the keyframe cannot make them.  So
decoding begins at a keyframe that is shown at or before the time asked for, and what is shown
before that keyframe is left aside.  Some streams have "keyframes" after which the picture is whole
only later (periodic intra refresh): where the first whole frame comes too late, decoding begins
one further back.  LeRobot begins at the last keyframe *stored* before the time, and finds no frame
there.

**Damage.**  Decoders conceal it by default.  Here they are told not to (``err_detect=explode``),
and any damage between the keyframe and the frame counts against the frame, which was predicted
from it.

**Colours** are converted as LeRobot's PyAV does it, by ITU-R BT.601 whatever the file says of
itself (later versions of PyAV go by the file).  Videos with more than 8 bits per channel are
refused: how their colours are converted depends on the version of PyAV, and LeRobot's depth maps,
which are stored so, are no colours at all.

A file may come from anybody.  It is read as MP4, which is what LeRobot writes, whatever it looks
like: other formats (playlists, concatenations) are lists of further files and addresses to open.
Source: FFmpeg's documentation, codec options; PyAV's ``Container.seek``; LeRobot 0.6.1,
``datasets/video_utils.py``; ITU-T H.265, leading pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from omega_qvla.errors import ObservationError
from omega_qvla.extras import needing

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_PIXELS = 1 << 26
"""A frame of 8192 × 8192; what claims to be larger is damaged or hostile."""

_BT601 = 5
"""FFmpeg's number of the matrix (``AVCOL_SPC_BT470BG``)."""


@dataclass(frozen=True)
class Shown:
    """A frame and when it is shown.

    Attributes:
        image: RGB, uint8 [H, W, 3].
        time: seconds on the video's own clock.
    """

    image: np.ndarray
    time: float


class Video:
    """An open video file.

    Args:
        path: the file.
        where: what to call it in messages.

    Raises:
        ObservationError: missing, not a video, of an unreasonable size, or not in 8 bits.
        ResourceError: PyAV is not installed.
    """

    def __init__(self, path: Path, where: str) -> None:
        with needing("reading the videos of a LeRobot dataset", "data"):
            import av
            from av.error import FFmpegError
        if not path.is_file():
            raise ObservationError(f"{where} is missing; the dataset was not downloaded whole")
        self.where = where
        self._failures = (FFmpegError, OSError, ValueError, IndexError)
        self._containers: list[Any] = []
        try:
            self._decoder, self._stream = self._open(av, path)
            self._index, self._index_stream = self._open(av, path)
        except self._failures as error:
            self.close()
            raise ObservationError(
                f"cannot read {where}: {error}; it may be half-downloaded or damaged"
            ) from error
        try:
            _require_usable(self._stream, where)
        except ObservationError:
            self.close()
            raise
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        for container in self._containers:
            container.close()

    def frame_at(self, time: float, tolerance: float) -> Shown:
        """The frame nearest to ``time``.

        Args:
            time: seconds on the video's own clock.
            tolerance: how far the frame's time may be away, in seconds.

        Raises:
            ObservationError: there is no such frame, or it or what it is predicted from is damaged.
        """
        try:
            self._surround(time)
            near = [frame for frame in (self._before, self._after) if frame is not None]
            if not near:
                raise ObservationError(f"{self.where} has no frame at {time:.3f} s, nor any other")
            nearest = min(near, key=lambda frame: _distance(time, self._time(frame)))
            shown = self._time(nearest)
            if _distance(time, shown) > tolerance:
                raise ObservationError(
                    f"{self.where} has no frame at {time:.3f} s; the nearest is at {shown:.3f} s"
                )
            return Shown(_rgb(nearest), shown)
        except self._failures as error:
            self._forget()
            raise ObservationError(
                f"{self.where} is damaged before {time:.3f} s: {error}"
            ) from error

    def _open(self, av: Any, path: Path) -> tuple[Any, Any]:
        local = {"protocol_whitelist": "file"}
        container = av.open(str(path), mode="r", format="mp4", options=local)
        self._containers.append(container)
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("no decoder is known for its video")
        strict = {"err_detect": "explode", "max_pixels": str(_MAX_PIXELS)}
        stream.codec_context.options = strict
        return container, stream

    def _time(self, frame: Any) -> float:
        return float(frame.pts * self._stream.time_base)

    def _tick(self, time: float) -> int:
        """The moment of the video's clock nearest to a time; the earlier of two."""
        return ceil(time / self._stream.time_base - 0.5)

    def _forget(self) -> None:
        """The decoder's place is unknown; what comes next is a jump."""
        self._frames: Iterator[Any] = iter(())
        self._before: Any = None
        self._after: Any = None

    def _surround(self, time: float) -> None:
        """Decode to the last frame before ``time`` and the first one at or after it."""
        if not self._can_go_on(time):
            self._jump(time)
        while self._after is not None and self._time(self._after) < time:
            self._before, self._after = self._after, next(self._frames, None)

    def _can_go_on(self, time: float) -> bool:
        """Whether the frames around a time are here, or next to come without a jump."""
        begin = self._before if self._before is not None else self._after
        if begin is None or self._time(begin) > time:
            return False
        if self._after is None or self._time(self._after) >= time:
            return True
        found = self._keyframe(self._tick(time))
        return found is None or found.pts <= self._after.pts

    def _jump(self, time: float) -> None:
        """Put the decoder on a keyframe from which the frame at ``time`` can be made."""
        tick = self._tick(time)
        start = self._keyframe(tick)
        while start is not None:
            self._decoder.seek(start.dts, stream=self._stream, backward=True)
            self._frames = self._decode(start.pts)
            self._before, self._after = None, next(self._frames, None)
            if self._after is not None and self._after.pts <= tick:
                return
            start = self._earlier(start)

    def _keyframe(self, tick: int) -> Any:
        """The packet that decoding of what is shown at ``tick`` begins with, undecoded.

        The last keyframe shown at or before ``tick``; the first of the file where there is none;
        None in a file without packets.
        """
        found = self._stored_before(tick)
        while found is not None and found.pts > tick:
            earlier = self._earlier(found)
            if earlier is None:
                break
            found = earlier
        return found

    def _earlier(self, packet: Any) -> Any:
        """The keyframe stored before this one, or None."""
        found = self._stored_before(packet.dts - 1)
        return found if found is not None and found.dts < packet.dts else None

    def _stored_before(self, tick: int) -> Any:
        """The last keyframe whose place in the file is at or before a moment, else the first."""
        self._index.seek(tick, stream=self._index_stream, backward=True)
        for packet in self._index.demux(self._index_stream):
            if packet.pts is not None and packet.dts is not None:
                return packet
        return None

    def _decode(self, first: int) -> Iterator[Any]:
        """Whole frames from the decoder's place on, from those shown at tick ``first``."""
        for packet in self._decoder.demux(self._stream):
            if packet.is_corrupt:
                raise ValueError("the file ends in the middle of a frame")
            aside = packet.pts is not None and packet.pts < first
            try:
                frames = packet.decode()
            except self._failures:
                if aside:
                    continue
                raise
            for frame in frames:
                if frame.pts is None or frame.pts < first:
                    continue
                if frame.is_corrupt:
                    raise ValueError("a frame's references are missing")
                yield frame


def _distance(time: float, shown: float) -> float:
    """Between two times, in LeRobot's arithmetic, which decides what is nearest."""
    return float(abs(np.float32(time) - np.float32(shown)))


def _require_usable(stream: Any, where: str) -> None:
    if stream.width * stream.height > _MAX_PIXELS:
        raise ObservationError(f"{where} claims frames of {stream.width} × {stream.height}")
    form = stream.codec_context.format
    bits = max((component.bits for component in form.components), default=8) if form else 8
    if bits > 8:
        raise ObservationError(
            f"{where} has {bits} bits per channel ({form.name}): a depth map, or colours whose "
            "conversion depends on the version of PyAV; encode colours with 8 bits (yuv420p)"
        )


def _rgb(frame: Any) -> np.ndarray:
    """A decoded frame as RGB, uint8 [H, W, 3]."""
    return frame.to_ndarray(format="rgb24", src_colorspace=_BT601, dst_colorspace=_BT601)
