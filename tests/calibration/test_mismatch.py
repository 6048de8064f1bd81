"""Observations against what the policy was trained on: numbers, warnings, refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import omega_qvla as oq
from omega_qvla.calibration.mismatch import check, examine, expected_range
from omega_qvla.calibration.observations import Observations
from omega_qvla.calibration.streamed import SourceReport
from omega_qvla.cli import main
from omega_qvla.errors import CalibrationWarning, ObservationError
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    Normalization,
    Part,
    Parts,
    Quantiles,
    Range,
    SineCosine,
    Unchanged,
)

pytestmark = pytest.mark.long

BUILTIN = "builtin:tiny-pi05"
LIMIT = 64


@pytest.fixture(scope="module", params=["builtin:tiny-pi05", "builtin:tiny-gr00t"])
def pair(request: pytest.FixtureRequest) -> tuple[NativePolicy, Observations]:
    return oq.load_policy(request.param), oq.Observations.load(request.param)


@pytest.fixture(scope="module")
def policy() -> NativePolicy:
    return oq.load_policy(BUILTIN)


@pytest.fixture(scope="module")
def observations() -> Observations:
    return oq.Observations.load(BUILTIN)


def changed(observations: Observations, change: Callable[[dict[str, Any]], None]) -> Observations:
    """The same observations, each changed."""

    def copy(item: Any) -> dict[str, Any]:
        new = {**item, "images": {k: v.copy() for k, v in item["images"].items()}}
        new["state"] = np.array(item["state"])
        change(new)
        return new

    return Observations(copy(item) for item in observations)


def test_a_policys_own_data_are_not_warned_of(pair: tuple[NativePolicy, Observations]) -> None:
    found = examine(*pair, LIMIT)
    assert found.refusal is None and found.warnings == ()
    assert "of the state outside" in found.facts and "4 instructions" in found.facts


def test_states_a_hundred_times_too_large_are_refused_with_numbers(
    pair: tuple[NativePolicy, Observations],
) -> None:
    policy, observations = pair

    def scale(item: dict[str, Any]) -> None:
        item["state"] = item["state"] * 100

    found = examine(policy, changed(observations, scale), LIMIT)
    assert found.refusal is not None
    assert "of the state outside the policy's statistics" in found.refusal
    assert "state[1] 100% outside [0.3" in found.refusal
    with pytest.raises(ObservationError, match=r"--allow-mismatch, in Python allow_mismatch=True"):
        found.admit(allow=False)
    assert found.admit(allow=True) == [f"allowed all the same: {found.refusal}"]


def test_one_dimension_of_another_unit_is_warned_of_by_its_number(
    policy: NativePolicy, observations: Observations
) -> None:
    def scale(item: dict[str, Any]) -> None:
        item["state"][2] *= 1000  # millimetres

    found = examine(policy, changed(observations, scale), LIMIT)
    assert found.refusal is None
    (warning,) = found.warnings
    assert "state[2] 100% outside" in warning and "state[0]" not in warning


@pytest.mark.parametrize("level", [0, 128, 255])
def test_images_of_one_colour_are_refused_naming_the_camera(
    policy: NativePolicy, observations: Observations, level: int
) -> None:
    def blank(item: dict[str, Any]) -> None:
        item["images"]["wrist"][:] = level

    found = examine(policy, changed(observations, blank), LIMIT)
    assert found.refusal is not None
    assert f"64 of 64 images of camera 'wrist' have one colour (mean {level} spread 0)" in (
        found.refusal
    )
    assert "'base'" not in found.refusal


def test_a_few_images_of_one_colour_and_a_camera_that_stands_still_are_warned_of(
    policy: NativePolicy, observations: Observations
) -> None:
    count = iter(range(len(observations)))
    still = observations[0]["images"]["base"]

    def change(item: dict[str, Any]) -> None:
        item["images"]["base"] = still
        if next(count) == 0:
            item["images"]["wrist"][:] = 0

    found = examine(policy, changed(observations, change), len(observations))
    assert found.refusal is None and len(found.warnings) == 2
    assert any("1 of 96 images of camera 'wrist' have one colour" in w for w in found.warnings)
    assert any("all 96 images of camera 'base' are the same" in w for w in found.warnings)


def test_a_camera_that_is_left_out_is_not_looked_at(
    policy: NativePolicy, observations: Observations
) -> None:
    def leave_out(item: dict[str, Any]) -> None:
        item["image_masks"] = {"wrist": False}
        item["images"]["wrist"][:] = 0

    found = examine(policy, changed(observations, leave_out), LIMIT)
    assert found.refusal is None and "wrist" not in found.facts


def test_only_the_observations_that_will_be_used_are_looked_at(
    policy: NativePolicy, observations: Observations
) -> None:
    count = iter(range(len(observations)))

    def blank_odd(item: dict[str, Any]) -> None:
        if next(count) not in (0, 95):
            item["images"]["base"][:] = 0

    assert examine(policy, changed(observations, blank_odd), 2).refusal is None


def test_noise_is_warned_of_whatever_its_numbers(policy: NativePolicy) -> None:
    noise = Observations.random(policy.config.cameras, policy.config.state_dim, count=2)
    found = examine(policy, noise, LIMIT)
    assert found.refusal is None
    assert found.warnings == ("the observations are noise: fit to measure speed and memory only",)


def test_quantize_refuses_before_any_work_and_goes_on_when_told(
    policy: NativePolicy, observations: Observations, tmp_path: Path
) -> None:
    def blank(item: dict[str, Any]) -> None:
        for image in item["images"].values():
            image[:] = 0

    black = changed(observations.spread(2), blank)
    with pytest.raises(ObservationError, match="have one colour"):
        oq.quantize(policy, black, "rtn", work_directory=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    with pytest.warns(CalibrationWarning, match="allowed all the same: .*have one colour"):
        quantized = oq.quantize(policy, black, "rtn", allow_mismatch=True)
    (kept,) = quantized.config["calibration"]["warnings"]
    assert "have one colour" in kept


def test_data_that_fit_leave_no_trace_in_the_artifact(
    policy: NativePolicy, observations: Observations
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        quantized = oq.quantize(policy, observations, "rtn")
    assert set(quantized.config["calibration"]) == {"fingerprint", "observations"}


def test_the_command_line_prints_numbers_warnings_and_what_allows_it(
    observations: Observations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scale(item: dict[str, Any]) -> None:
        item["state"] *= 100

    changed(observations, scale).save_npz(tmp_path / "far.npz")
    command = ["quantize", BUILTIN, "--calibration", str(tmp_path / "far.npz"), "--recipe", "rtn"]
    command += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(command)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "the observations do not fit the policy" in shown.err and shown.err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main([*command, "--allow-mismatch"])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and "warning  allowed all the same" in shown.out
    assert not shown.err
    config = json.loads((tmp_path / "out" / "omega_config.json").read_text())
    assert "of the state outside" in config["calibration"]["warnings"][0]
    assert "calibration: allowed all the same" in (tmp_path / "out" / "README.md").read_text()


def test_another_order_of_the_same_names_is_refused_and_other_names_are_warned_of(
    policy: NativePolicy, observations: Observations
) -> None:
    one = Unchanged(width=1)
    parts = Parts(
        parts=tuple(Part(name=name, normalization=one) for name in ("x", "y", "z", "gripper"))
    )
    statistics = policy.processor.statistics.model_copy(update={"state": parts})
    named = policy.clone()
    named.processor = replace(policy.processor, statistics=statistics)

    def examined(*state: str) -> Any:
        report = SourceReport("", state=state)
        return examine(named, Observations(observations, report), LIMIT)

    assert examined("x", "y", "z", "gripper").warnings == ()
    refusal = examined("gripper", "x", "y", "z").refusal
    assert refusal is not None and "the same numbers in another order" in refusal
    assert "x, y, z, gripper" in refusal and "gripper, x, y, z" in refusal
    (warning,) = examined("a", "b", "c", "d").warnings
    assert "4 names differ" in warning


def test_a_module_of_the_users_own_is_never_refused() -> None:
    assert check(object(), Observations([{"x": 1}]), LIMIT, allow=False) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("normalization", "low", "high"),
    [
        (Quantiles(q01=(0.0, -1.0, 5.0), q99=(1.0, 1.0, 6.0)), [0, -1], [1, 1]),
        (Range(low=(0.0, 2.0), high=(1.0, 2.0)), [0, -np.inf], [1, np.inf]),
        (Range(low=(0.0, 2.0), high=(1.0, 2.0), flat_width=1e-8), [0, 2], [1, 2]),
        (MeanStd(mean=(1.0, 0.0), std=(2.0, 0.0)), [-5, 0], [7, 0]),
        (SineCosine(width=2), [-2 * np.pi] * 2, [2 * np.pi] * 2),
        (Binary(width=2), [0, 0], [1, 1]),
        (Unchanged(width=2), [-np.inf] * 2, [np.inf] * 2),
        (
            Parts(
                parts=(
                    Part(name="arm", normalization=Range(low=(3.0,), high=(4.0,))),
                    Part(name="gripper", normalization=Binary(width=1)),
                )
            ),
            [3, 0],
            [4, 1],
        ),
    ],
    ids=lambda value: getattr(value, "kind", type(value).__name__),
)
def test_the_expected_range_is_that_of_the_statistics(
    normalization: Normalization, low: list[float], high: list[float]
) -> None:
    found = expected_range(normalization, 2)
    assert found.low.tolist() == low and found.high.tolist() == high


@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(-100, 100),
    width=st.floats(0.01, 100),
    inside=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_what_lies_within_the_statistics_is_never_warned_of(
    policy: NativePolicy, observations: Observations, low: float, width: float, inside: list[float]
) -> None:
    bounds = Quantiles(q01=(low,) * 4, q99=(low + width,) * 4)
    statistics = policy.processor.statistics.model_copy(update={"state": bounds})
    other = policy.clone()
    other.processor = replace(policy.processor, statistics=statistics)

    def place(item: dict[str, Any]) -> None:
        item["state"] = np.array([low + width * part for part in inside], np.float32)

    found = examine(other, changed(observations.spread(3), place), LIMIT)
    assert found.refusal is None and not [w for w in found.warnings if "state" in w]
