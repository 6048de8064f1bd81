"""Single frames of a video by timestamp, through PyAV.

To get the frame at time t a decoder needs the last keyframe at or before t and everything between.
Videos differ widely there: LeRobot writes a keyframe every second frame, others one in 250.  A
second, undecoded reader of the same file therefore looks up where the keyframe lies; if the decoder
has passed it already it goes on from where it is, otherwise it jumps.  Ascending timestamps thus
decode no frame twice, and at most one group of pictures is decoded for any of them.

Decoders conceal damage by default.  Here they are told not to (``err_detect=explode``), and any
damage between the keyframe and the frame counts against the frame, which was predicted from it.

A file may come from anybody.  It is read as MP4, which is what LeRobot writes, whatever it looks
like: other formats (playlists, concatenations) are lists of further files and addresses to open.
Source: FFmpeg's documentation, codec options; PyAV's ``Container.seek``.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Video:
    """An open video file.

    Args:
        path: the file.
        where: what to call it in messages.

    Raises:
        ObservationError: missing, not a video, or of an unreasonable size.
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
        if self._stream.width * self._stream.height > _MAX_PIXELS:
            self.close()
            raise ObservationError(
                f"{where} claims frames of {self._stream.width} × {self._stream.height}"
            )
        self._frames: Iterator[Any] = iter(())
        self._position = float("inf")

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

    def frame_at(self, time: float, tolerance: float) -> np.ndarray:
        """The frame shown at ``time``.

        Args:
            time: seconds on the video's own clock.
            tolerance: how far the frame's timestamp may be away, in seconds.

        Returns:
            RGB, uint8 [H, W, 3].

        Raises:
            ObservationError: there is no such frame, or it or what it is predicted from is damaged.
        """
        try:
            frame = self._find(time, tolerance)
            return frame.to_ndarray(format="rgb24")
        except self._failures as error:
            self._position = float("inf")
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

    def _find(self, time: float, tolerance: float) -> Any:
        if not self._position < time - tolerance or self._keyframe(time) > self._position:
            self._jump(time)
        for frame in self._frames:
            self._position = frame.time
            if frame.time >= time - tolerance:
                if frame.time <= time + tolerance:
                    return frame
                break
        self._position = float("inf")
        raise ObservationError(f"{self.where} has no frame at {time:.3f} s")

    def _jump(self, time: float) -> None:
        """Put the decoder on the last keyframe at or before ``time``."""
        self._seek(self._decoder, self._stream, time)
        self._frames = self._decode()

    def _keyframe(self, time: float) -> float:
        """Presentation time of the keyframe that decoding ``time`` begins at."""
        self._seek(self._index, self._index_stream, time)
        packet = next(self._index.demux(self._index_stream))
        return float("inf") if packet.pts is None else float(packet.pts * packet.time_base)

    def _seek(self, container: Any, stream: Any, time: float) -> None:
        container.seek(int(max(time, 0.0) / stream.time_base), stream=stream, backward=True)

    def _decode(self) -> Iterator[Any]:
        for packet in self._decoder.demux(self._stream):
            if packet.is_corrupt:
                raise ValueError("the file ends in the middle of a frame")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError("a frame's references are missing")
                if frame.time is not None:
                    yield frame
