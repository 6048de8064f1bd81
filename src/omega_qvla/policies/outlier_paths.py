"""How a policy family says which producers feed which linears, for the outlier stress twin."""

from __future__ import annotations

from typing import Literal, NamedTuple


class OutlierPath(NamedTuple):
    """A producer of channels and all linears that read it, as dotted module paths.

    It has the shape ``quantization.outliers`` asks for; policies do not import later rooms.
    """

    kind: Literal["rms_norm", "layer_norm", "adaptive_norm", "adaptive_layer_norm", "linear"]
    producer: str
    consumers: tuple[str, ...]


def under(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of several modules below one."""
    return tuple(f"{prefix}.{name}" for name in names)
