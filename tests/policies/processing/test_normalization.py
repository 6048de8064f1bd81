"""Normalization kinds: values by hand, inverses, dimensions without spread, and bad statistics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from omega_qvla.errors import PolicyError
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    Normalization,
    NormalizationStatistics,
    Part,
    Parts,
    Quantiles,
    Range,
    SineCosine,
    Unchanged,
)

X = np.array([1.0, 10.0, 7.0], np.float32)
ADAPTER: TypeAdapter[Any] = TypeAdapter(Normalization)


def close(found: np.ndarray, expected: list[float]) -> bool:
    """float64 rounded once to float32: half a unit in the last place, some 6e-8 of the value."""
    return found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_quantiles_by_hand() -> None:
    """Spreads 4, 10 and none; openpi adds 1e-6 to each: 7 lies 2e6 half-spreads above 5."""
    kind = Quantiles(q01=(-2.0, 0.0, 5.0), q99=(2.0, 10.0, 5.0))
    assert close(kind.normalize(X), [0.4999996, 0.9999998, 3_999_999.0])
    assert close(kind.unnormalize(np.array([0.5, 1.0, -1.0])), [1.0000008, 10.000001, 5.0])


def test_a_range_by_hand() -> None:
    """A dimension without spread: LeRobot divides by 1e-8, Isaac-GR00T says 0; both go back."""
    low, high = (-2.0, 0.0, 5.0), (2.0, 10.0, 5.0)
    gr00t, lerobot = Range(low=low, high=high), Range(low=low, high=high, flat_width=1e-8)
    assert close(gr00t.normalize(X), [0.5, 1.0, 0.0])
    assert close(lerobot.normalize(X), [0.5, 1.0, 4e8 - 1])
    for kind in (gr00t, lerobot):
        assert close(kind.unnormalize(np.array([0.5, 1.0, -1.0])), [1.0, 10.0, 5.0])


def test_mean_and_deviation_by_hand() -> None:
    """Margins as openpi, LeRobot and Isaac-GR00T have them."""
    mean, std = (0.0, 4.0, 5.0), (2.0, 3.0, 0.0)
    gr00t = MeanStd(mean=mean, std=std)
    lerobot = MeanStd(mean=mean, std=std, margin=1e-8)
    openpi = MeanStd(mean=mean, std=std, margin=1e-6, inverse_margin=1e-6)
    assert close(gr00t.normalize(X), [0.5, 2.0, 7.0])
    assert close(lerobot.normalize(X), [0.5, 2.0, 2e8])
    assert close(openpi.normalize(X), [0.49999975, 1.99999933, 2e6])
    ones = np.ones(3)
    assert close(gr00t.unnormalize(ones), [2.0, 7.0, 5.0])
    assert close(lerobot.unnormalize(ones), [2.0, 7.0, 5.0])
    assert close(openpi.unnormalize(ones), [2.000001, 7.000001, 5.000001])


def test_the_other_kinds_by_hand() -> None:
    x = np.array([[0.2, 0.5, 0.51]])
    assert close(Binary(width=3).normalize(x), [[0.0, 0.0, 1.0]])
    assert close(Binary(width=3).unnormalize(x), [[0.0, 0.0, 1.0]])
    angles = np.array([0.0, np.pi / 2])
    assert np.allclose(SineCosine(width=2).normalize(angles), [0, 1, 1, 0], atol=1e-7)
    with pytest.raises(PolicyError, match="cannot be mapped back"):
        SineCosine(width=2).unnormalize(angles)
    assert close(Unchanged(width=3).normalize(x), x.tolist())


def test_parts_are_normalized_each_in_its_own_way() -> None:
    kind = Parts(
        parts=(
            Part(name="arm", normalization=Range(low=(0.0, 0.0), high=(4.0, 2.0))),
            Part(name="gripper", normalization=Binary(width=1)),
        )
    )
    assert kind.width == 3
    assert close(kind.normalize(np.array([1.0, 2.0, 0.7])), [-0.5, 1.0, 1.0])
    chunk = np.array([[-0.5, 1.0, 0.9], [0.0, 0.0, 0.1]])
    assert close(kind.unnormalize(chunk), [[1.0, 2.0, 1.0], [2.0, 1.0, 0.0]])
    with pytest.raises(PolicyError, match=r"4 numbers cannot be split into arm \[2\], gripper"):
        kind.normalize(np.zeros(4))


BOUNDED = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(BOUNDED, BOUNDED, BOUNDED), min_size=1, max_size=5))
def test_unnormalize_undoes_normalize(rows: list[tuple[float, float, float]]) -> None:
    """Within float32: the normalized value carries 6e-8 of itself, times the spread."""
    x, low, spread = (np.array(column) for column in zip(*rows, strict=True))
    spread = np.abs(spread) + 0.1
    low, high = tuple(map(float, low)), tuple(map(float, low + spread))
    kinds = [
        Quantiles(q01=low, q99=high),
        Range(low=low, high=high),
        Range(low=low, high=high, flat_width=1e-8),
        MeanStd(mean=low, std=tuple(map(float, spread))),
    ]
    for kind in kinds:
        normalized = kind.normalize(x)
        tolerance = 2e-7 * (np.abs(normalized) * spread + np.abs(x) + np.abs(low)) + 1e-30
        assert (np.abs(kind.unnormalize(normalized) - x) <= tolerance).all()


@pytest.mark.parametrize(
    "kind",
    [
        Quantiles(q01=(0.0,), q99=(1.0,)),
        Range(low=(0.0,), high=(1.0,), flat_width=1e-8),
        MeanStd(mean=(0.0,), std=(1.0,), margin=1e-6),
        Binary(width=2),
        SineCosine(width=2),
        Unchanged(width=2),
        Parts(parts=(Part(name="a", normalization=Quantiles(q01=(0.0,), q99=(1.0,))),)),
    ],
)
def test_every_kind_survives_json(kind: Any) -> None:
    statistics = NormalizationStatistics(state=kind, actions=kind)
    assert NormalizationStatistics.parse(statistics.dump(), "stats") == statistics


def test_quantiles_are_written_as_openpi_reads_them() -> None:
    quantiles = Quantiles(q01=(0.0,), q99=(1.0,))
    content = json.loads(NormalizationStatistics(state=quantiles, actions=quantiles).dump())
    assert content["norm_stats"]["state"] == {"q01": [0.0], "q99": [1.0]}


def test_statistics_of_padded_dimensions_are_left_out() -> None:
    kind = Quantiles(q01=(-1.0,) * 32, q99=(1.0,) * 32)
    assert kind.width == 32 and kind.normalize(np.zeros(8)).shape == (8,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"kind": "range", "low": [0.0], "high": [1.0, 2.0]}, "1 lower and 2 upper bounds"),
        ({"kind": "mean_std", "mean": [0.0], "std": []}, "1 means and 0 deviations"),
        ({"kind": "mean_std", "mean": [0.0], "std": [-1.0]}, "a deviation is negative"),
        ({"kind": "range", "low": [float("nan")], "high": [1.0]}, "finite"),
        ({"kind": "sigmoid"}, "sigmoid"),
        ({"mean": [0.0], "std": [1.0]}, "q01"),
        ({"kind": "binary", "width": 1, "more": 2}, "more"),
        ({"kind": "parts", "parts": [{"name": "a", "normalization": {"kind": "parts"}}]}, "parts"),
        (3, "Unable to extract|tag|dictionary"),
    ],
)
def test_invalid_statistics_are_refused(content: Any, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ADAPTER.validate_python(content)
