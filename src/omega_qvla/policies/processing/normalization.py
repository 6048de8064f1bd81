"""Between the robot's units and the network's, per dimension, and back.

Every policy was trained on normalized states and actions, and the inverse must be the one of the
code it was trained with, down to how a dimension that never moved is treated:

| class | normalized | a dimension without spread | as in |
|---|---|---|---|
| ``Quantiles`` | 2 (x - q01)/(q99 - q01 + 1e-6) - 1 | spread 1e-6 | openpi ``transforms.py`` |
| ``Range`` | 2 (x - low)/(high - low) - 1 | see its ``flat_width`` | LeRobot, Isaac-GR00T |
| ``MeanStd`` | (x - mean)/(std + ε) | x itself where std + ε = 0 | openpi, LeRobot, Isaac-GR00T |
| ``Binary`` | 1 if x > 0.5 else 0 | – | Isaac-GR00T |
| ``SineCosine`` | (sin x, cos x) | – | Isaac-GR00T, states only |
| ``Unchanged`` | x | – | all |

Isaac-GR00T normalizes named parts of a vector differently; ``Parts`` concatenates such pieces.

Values are computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from omega_qvla.errors import PolicyError

_OPENPI_MARGIN = 1e-6
Vector = tuple[float, ...]


class _Kind(BaseModel):
    """Common to all kinds: immutable, finite numbers, nothing unknown."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="forbid")


class Quantiles(BaseModel):
    """1 % and 99 % quantiles per dimension of one quantity, in the robot's units (openpi)."""

    # openpi's own file, which has more statistics beside these, is parsed with it.
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    q01: Vector
    q99: Vector

    @property
    def width(self) -> int:
        """How many dimensions there are statistics for."""
        return min(len(self.q01), len(self.q99))

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., n] → about [-1, 1], float32."""
        low, high = (_first(x, v) for v in (self.q01, self.q99))
        return ((x - low) / (high - low + _OPENPI_MARGIN) * 2.0 - 1.0).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32."""
        low, high = (_first(x, v) for v in (self.q01, self.q99))
        return ((x + 1.0) / 2.0 * (high - low + _OPENPI_MARGIN) + low).astype(np.float32)


class Range(_Kind):
    """[low, high] ↔ [-1, 1]: minima and maxima, or quantiles, of LeRobot and Isaac-GR00T.

    Attributes:
        low, high: per dimension, in the robot's units.
        flat_width: the spread given to a dimension with low = high (LeRobot: 1e-8); None maps such
            a dimension to 0, and back to low (Isaac-GR00T).
    """

    kind: Literal["range"] = "range"
    low: Vector
    high: Vector
    flat_width: float | None = None

    @model_validator(mode="after")
    def _same_width(self) -> Range:
        if len(self.low) != len(self.high):
            raise ValueError(f"{len(self.low)} lower and {len(self.high)} upper bounds")
        return self

    @property
    def width(self) -> int:
        """How many dimensions there are statistics for."""
        return len(self.low)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., n] → [-1, 1] within the bounds, float32."""
        low, spread, flat = self._spread(x)
        scaled = 2.0 * (x - low) / np.where(flat, self.flat_width or 1.0, spread) - 1.0
        if self.flat_width is None:
            scaled = np.where(flat, 0.0, scaled)
        return scaled.astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32; a flat dimension gives ``low``."""
        low, spread, flat = self._spread(x)
        spread = np.where(flat, self.flat_width or 0.0, spread)
        return ((x + 1.0) / 2.0 * spread + low).astype(np.float32)

    def _spread(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = (_first(x, v) for v in (self.low, self.high))
        return low, high - low, high == low


class MeanStd(_Kind):
    """Zero mean and unit variance.

    Attributes:
        mean, std: per dimension, in the robot's units.
        margin: added to the deviation when normalizing (openpi 1e-6, LeRobot 1e-8, GR00T 0).
        inverse_margin: added when unnormalizing (openpi 1e-6, the others 0).
    """

    kind: Literal["mean_std"] = "mean_std"
    mean: Vector
    std: Vector
    margin: float = 0.0
    inverse_margin: float = 0.0

    @model_validator(mode="after")
    def _same_width(self) -> MeanStd:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations")
        return self

    @field_validator("std")
    @classmethod
    def _not_negative(cls, std: Vector) -> Vector:
        if any(value < 0 for value in std):
            raise ValueError(f"a deviation is negative: {std}")
        return std

    @property
    def width(self) -> int:
        """How many dimensions there are statistics for."""
        return len(self.mean)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., n] → unit variance, float32; without any spread x stays as it is."""
        mean, divisor = _first(x, self.mean), _first(x, self.std) + self.margin
        flat = divisor == 0.0
        return np.where(flat, x, (x - mean) / np.where(flat, 1.0, divisor)).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32; a dimension without any spread gives its mean."""
        mean, std = _first(x, self.mean), _first(x, self.std)
        return (x * (std + self.inverse_margin) + mean).astype(np.float32)


class Binary(_Kind):
    """Values above one half are 1, the others 0, in both directions (grippers of Isaac-GR00T)."""

    kind: Literal["binary"] = "binary"
    width: int

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[..., n] → 0 or 1, float32."""
        return (x > 0.5).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The same threshold, float32."""
        return (x > 0.5).astype(np.float32)


class SineCosine(_Kind):
    """Joint angles x [n] become (sin x, cos x) [2 n]; for states, which nobody maps back."""

    kind: Literal["sine_cosine"] = "sine_cosine"
    width: int

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Angles in radians [..., n] → [..., 2 n], float32."""
        return np.concatenate((np.sin(x), np.cos(x)), axis=-1).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Not defined.

        Raises:
            PolicyError: always.
        """
        raise PolicyError("sine and cosine of a state cannot be mapped back to actions")


class Unchanged(_Kind):
    """Units the network works in as they are."""

    kind: Literal["unchanged"] = "unchanged"
    width: int

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """x, float32."""
        return x.astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """x, float32."""
        return x.astype(np.float32)


class Part(_Kind):
    """One named piece of a vector (``left_arm``, ``gripper``) and its normalization."""

    name: str
    normalization: Simple


class Parts(_Kind):
    """Pieces one after the other, each with a normalization of its own (Isaac-GR00T)."""

    kind: Literal["parts"] = "parts"
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Dimensions of the whole vector, in the robot's units."""
        return sum(part.normalization.width for part in self.parts)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., width] → normalized, float32."""
        return np.concatenate(
            [part.normalization.normalize(piece) for part, piece in self._split(x)], axis=-1
        )

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32."""
        return np.concatenate(
            [part.normalization.unnormalize(piece) for part, piece in self._split(x)], axis=-1
        )

    def _split(self, x: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        if x.shape[-1] != self.width:
            names = ", ".join(f"{part.name} [{part.normalization.width}]" for part in self.parts)
            raise PolicyError(f"a vector of {x.shape[-1]} numbers cannot be split into {names}")
        ends = np.cumsum([part.normalization.width for part in self.parts])[:-1]
        return list(zip(self.parts, np.split(x, ends, axis=-1), strict=True))


def numbered(name: str, width: int) -> list[str]:
    """What the numbers of a named part are called: its name, or ``name[0]``, ``name[1]``, …"""
    return [name] if width == 1 else [f"{name}[{i}]" for i in range(width)]


def dimension_names(normalization: Normalization) -> tuple[str, ...]:
    """What the numbers of a vector are called; empty where its normalization has no names."""
    if not isinstance(normalization, Parts):
        return ()
    return tuple(
        name
        for part in normalization.parts
        for name in numbered(part.name, part.normalization.width)
    )


def _kind_of(value: Any) -> str | None:
    if isinstance(value, dict):
        return value.get("kind", "quantiles")
    return getattr(value, "kind", "quantiles")


Simple = Annotated[
    Annotated[Quantiles, Tag("quantiles")]
    | Annotated[Range, Tag("range")]
    | Annotated[MeanStd, Tag("mean_std")]
    | Annotated[Binary, Tag("binary")]
    | Annotated[SineCosine, Tag("sine_cosine")]
    | Annotated[Unchanged, Tag("unchanged")],
    Discriminator(_kind_of),
]
Normalization = Annotated[
    Annotated[Quantiles, Tag("quantiles")]
    | Annotated[Range, Tag("range")]
    | Annotated[MeanStd, Tag("mean_std")]
    | Annotated[Binary, Tag("binary")]
    | Annotated[SineCosine, Tag("sine_cosine")]
    | Annotated[Unchanged, Tag("unchanged")]
    | Annotated[Parts, Tag("parts")],
    Discriminator(_kind_of),
]
"""How one quantity is normalized: any of the kinds above, distinguished by ``kind``."""

Part.model_rebuild()
Parts.model_rebuild()


class NormalizationStatistics(BaseModel):
    """How a policy's state and actions are normalized; by quantiles this is openpi's own file."""

    model_config = ConfigDict(frozen=True)
    state: Normalization
    actions: Normalization

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> NormalizationStatistics:
        """Parse openpi's ``norm_stats.json``, or what ``dump`` wrote; ``where`` names it.

        Raises:
            PolicyError: not such a file.
        """
        try:
            content = json.loads(text)
            return cls.model_validate(content["norm_stats"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise PolicyError(
                f"{where} is not an openpi norm_stats.json with q01/q99 for state and actions: "
                f"{error}"
            ) from error

    @classmethod
    def parse_means(cls, text: str | bytes, where: str) -> NormalizationStatistics:
        """Parse openpi's ``norm_stats.json`` for a policy that is normalized by mean and deviation.

        Raises:
            PolicyError: not such a file.
        """
        try:
            found = json.loads(text)["norm_stats"]
            state, actions = (
                MeanStd(
                    mean=found[key]["mean"],
                    std=found[key]["std"],
                    margin=_OPENPI_MARGIN,
                    inverse_margin=_OPENPI_MARGIN,
                )
                for key in ("state", "actions")
            )
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise PolicyError(
                f"{where} is not an openpi norm_stats.json with mean/std for state and actions: "
                f"{error}"
            ) from error
        return cls(state=state, actions=actions)

    def dump(self) -> str:
        """The file's text, openpi's layout."""
        return json.dumps({"norm_stats": self.model_dump(mode="json")}, indent=1)


def _first(x: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """Statistics of the dimensions that x has; padded policies have more."""
    return np.asarray(values, dtype=np.float64)[: x.shape[-1]]


def unit_quantiles(width: int) -> Quantiles:
    """Quantiles of -1 and 1, which change nothing; for policies with random weights."""
    return Quantiles(q01=(-1.0,) * width, q99=(1.0,) * width)
