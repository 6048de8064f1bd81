"""Which tiles a product is cut into: candidates, a first guess, and a measured choice kept on disk.

The best tiling depends on the shape and on the GPU.  It is measured once per shape, when that shape
is first multiplied, and written to a folder the caller names; the next process reads it.  A choice
is only as good as what it was measured with, so the file says GPU, Triton version and a hash of the
programs, and a file that says something else is measured anew.  Without a folder nothing is
measured and the first guess is used.

Rows are counted in powers of two: prompts differ by a few tokens, tilings do not.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omega_qvla.errors import ResourceError

SPLIT_ROWS = 64
"""Products of at most this many rows may be cut along K as well."""
_LEAST_SHARE = 256
"""Bytes of weight per row that a part of K should have at least (512 inputs)."""
_SCHEMA = 1

Shape = tuple[int, int, int]
"""(M, N, K) of y [M, N] = x [M, K] Wᵀ."""


@dataclass(frozen=True)
class Tiling:
    """How one product is cut.

    Attributes:
        rows, outputs: sides of an output tile.
        bytes: bytes of weight per output in one step along K; two inputs each.
        parts: how many parts K is cut into; 1 for a product in one piece.
        warps, stages: warps per program, and how many steps are loaded ahead.
    """

    rows: int
    outputs: int
    bytes: int
    parts: int
    warps: int
    stages: int

    def share(self, width: int) -> int:
        """Bytes of a row of ``width`` inputs in one part: whole steps."""
        steps = -(-(width // 2) // self.bytes)
        return -(-steps // self.parts) * self.bytes

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Tiling:
        """A tiling from a file.

        Raises:
            ValueError: not a tiling these programs can run.
        """
        found = cls(**{key: int(value) for key, value in content.items()})
        fits = (
            found.rows in (16, 32, 64, 128)
            and found.outputs in (64, 128)
            and found.bytes in (64, 128)
            and 1 <= found.parts <= 64
            and found.warps in (4, 8)
            and 1 <= found.stages <= 8
        )
        if not fits:
            raise ValueError(f"no such tiling: {dict(content)}")
        return found


def first_guess(shape: Shape, processors: int) -> Tiling:
    """A tiling from arithmetic alone: small products are cut until every processor has a piece."""
    m, n, _ = shape
    if m > SPLIT_ROWS:
        return Tiling(rows=128, outputs=128, bytes=64, parts=1, warps=8, stages=4)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    tiles = -(-n // 64)
    parts = _parts(shape, tiles, processors)
    return Tiling(rows=rows, outputs=64, bytes=128, parts=parts, warps=4, stages=4)


def candidates(shape: Shape, processors: int) -> list[Tiling]:
    """Tilings worth measuring for a shape, the first guess first."""
    guess = first_guess(shape, processors)
    m, n, _ = shape
    if m > SPLIT_ROWS:
        sides = ((128, 128), (64, 128), (128, 64), (64, 64))
        found = [
            Tiling(rows, outputs, size, 1, warps, stages)
            for rows, outputs in sides
            for size, stages in ((64, 4), (128, 3))
            for warps in ((4, 8) if rows * outputs > 64 * 64 else (4,))
        ]
    else:
        found = [
            Tiling(guess.rows, outputs, size, parts, 4, stages)
            for outputs in (64, 128)
            for size, stages in ((64, 5), (128, 4))
            for parts in sorted({1, _parts(shape, -(-n // outputs), processors), guess.parts})
        ]
    return [guess, *(tiling for tiling in dict.fromkeys(found) if tiling != guess)]


def _parts(shape: Shape, tiles: int, processors: int) -> int:
    most = max(1, shape[2] // 2 // _LEAST_SHARE)
    return max(1, min(most, processors // tiles, 16))


def rounded_rows(count: int) -> int:
    """A number of rows, up to the next power of two and at least 16."""
    return max(16, 1 << (count - 1).bit_length())


class Tuner:
    """Chooses tilings by measuring, and remembers.

    Args:
        folder: where choices are kept; it is made if it is not there.
        identity: what a choice depends on beside the shape (GPU, Triton, programs).
        processors: multiprocessors of the GPU.
        seconds: measures a call.

    Raises:
        ResourceError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        processors: int,
        seconds: Callable[[Callable[[], object]], float],
    ) -> None:
        self._identity, self._processors, self._seconds = dict(identity), processors, seconds
        name = re.sub(r"[^a-z0-9]+", "-", identity["gpu"].lower()).strip("-")
        self.path = folder / f"tilings-{name}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot keep tilings in {folder}: {error}") from error
        if not os.access(folder, os.W_OK):
            raise ResourceError(f"cannot keep tilings in {folder}: it is not writable")
        self._known = self._read()

    def choose(
        self, shape: Shape, run: Callable[[Tiling], object], *, gated: bool = False
    ) -> Tiling:
        """The fastest tiling for a shape.

        Args:
            gated: whether both halves of the outputs are summed in one program, which takes twice
                the registers.
            run: multiplies with a given tiling.  One that the GPU cannot hold may raise; it is
                passed over.

        Raises:
            ResourceError: no candidate ran.
        """
        shape = (rounded_rows(shape[0]), *shape[1:])
        key = ",".join(map(str, shape)) + (",gated" if gated else "")
        if key not in self._known:
            self._known[key] = self._fastest(shape, run)
            self._write()
        return self._known[key]

    def _fastest(self, shape: Shape, run: Callable[[Tiling], object]) -> Tiling:
        times: dict[Tiling, float] = {}
        failures: list[str] = []
        for tiling in candidates(shape, self._processors):
            try:
                times[tiling] = self._seconds(lambda tiling=tiling: run(tiling))
            except Exception as error:  # too much shared memory has an exception of Triton's own
                failures.append(f"{type(error).__name__}: {error}")
        if not times:
            raise ResourceError(f"no tiling of {shape} runs on this GPU: {failures[0]}")
        return min(times, key=times.__getitem__)

    def _read(self) -> dict[str, Tiling]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
            if content["schema"] != _SCHEMA or content["identity"] != self._identity:
                return {}
            return {key: Tiling.parse(value) for key, value in content["tilings"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{self.path} cannot be read ({type(error).__name__}: {error}); tilings are "
                "measured again and it is replaced",
                stacklevel=3,
            )
            return {}

    def _write(self) -> None:
        """Replace the file as a whole: another process may be reading it."""
        content = {
            "schema": _SCHEMA,
            "identity": self._identity,
            "tilings": {key: asdict(tiling) for key, tiling in sorted(self._known.items())},
        }
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self.path)
        except OSError as error:
            warnings.warn(
                f"the measured tilings could not be kept in {self.path}: {error}", stacklevel=4
            )
