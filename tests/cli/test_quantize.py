"""``quantize`` says first what it will do, at the end what came out, and changes nothing by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.calibration.observations import Observations
from omega_qvla.cli import main
from omega_qvla.evaluation import held_out
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.coverage import coverage

pytestmark = pytest.mark.long

POLICY = "builtin:tiny-pi05"


def quantize(out: Path, *more: str) -> dict[str, object]:
    """The document of a quantization with the quickest recipe."""
    target = out.with_suffix(".json")
    words = ["quantize", POLICY, "--recipe", "rtn", "--out", str(out), "--json", str(target)]
    with pytest.raises(SystemExit) as stop:
        main([*words, *more])
    assert stop.value.code == 0
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two observations in a file that has no splits."""
    path = tmp_path_factory.mktemp("npz") / "two.npz"
    few = Observations.load(POLICY)[:2]
    Observations({k: v for k, v in one.items() if k != "split"} for one in few).save_npz(path)
    return path


def test_first_what_is_done_last_how_well_and_what_to_type(
    tmp_path: Path, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = quantize(out, "--held-out", "1", "--calibration", str(npz))
    shown = capsys.readouterr().out
    parts = ("16 of 16 sites to W4A4", "quantizing with rtn", "smaller", "action error", "next: ")
    places = [shown.index(part) for part in parts]
    assert places == sorted(places) and "norms, biases" in shown
    assert "of calibration (there are no others; such figures flatter)" in shown
    assert shown.endswith(f"next: omega-qvla inspect {out}, or omega-qvla serve {out}\n")
    glance = found["held_out"]
    assert isinstance(glance, dict)
    assert (glance["observations"], glance["noises"], glance["rtn_error"]) == (1, 2, None)
    assert glance["seen_in_calibration"] and glance["action_error"] > 0 < glance["noise_floor"]

    without = quantize(tmp_path / "none", "--held-out", "0", "--calibration", str(npz))
    assert "not measured: --held-out 0" in capsys.readouterr().out
    assert "held_out" not in without and without["content_hash"] == found["content_hash"]


def test_noise_is_not_measured_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "held_out" not in quantize(tmp_path / "out", "--calibration", "random:1")
    assert "not measured: calibrated on noise" in capsys.readouterr().out


def observation(number: int) -> dict[str, object]:
    image = np.full((2, 2, 3), number, np.uint8)
    state = np.zeros(1, np.float32)
    return {"images": {"base": image}, "state": state, "prompt": "go"}


def test_what_calibration_used_is_never_called_held_out() -> None:
    used = Observations(observation(n) for n in (0, 2, 4))
    everything = Observations(observation(n) for n in range(5))
    left = held_out.unused(used, [used, everything])
    assert left is not None
    assert [int(one["images"]["base"][0, 0, 0]) for one in left] == [1, 3]
    assert held_out.unused(used, [used]) is None


def test_what_is_kept_is_said_with_the_reason() -> None:
    policy = stream_policy(POLICY)
    parts = ["vision", "backbone", "action_head", "token embedding", "adaptive norms"]
    whole = coverage(policy, Recipe.load("omega-w4a4"), parts)
    assert whole["vision"] == "16 of 16 sites to W4A4"
    assert whole["token embedding"] == "quantized to 4 bits"
    paper = coverage(policy, Recipe.load("omega-w4a4").scoped("paper"), parts)
    assert paper["vision"] == "16 sites kept: not quantized by omega-w4a4"
    assert (
        paper["token embedding"] == paper["adaptive norms"] == "kept: not quantized by omega-w4a4"
    )
    matched = coverage(policy, Recipe.load("quantvla"), parts)
    assert matched["action_head"].endswith("its attention kept: not quantized by quantvla")
