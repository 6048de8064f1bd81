"""The command line on a LeRobot dataset: nothing to say when names agree, clear words otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omega_qvla.cli import main

pytestmark = pytest.mark.long

POLICY = "builtin:tiny-pi05"
TOLD = ("open the drawer", "turn the faucet open")

Write = Callable[..., Any]


def run(*arguments: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code if isinstance(stop.value.code, int) else 1


def quantize(root: Path, out: Path, *options: str) -> int:
    """``rtn`` is the quickest recipe; the states of these datasets are numbers of frames."""
    command = ("quantize", POLICY, "--calibration", str(root), "--out", str(out))
    return run(*command, "--recipe", "rtn", "--allow-mismatch", *options)


def test_where_names_agree_only_the_dataset_and_the_output_are_named(
    write_dataset: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_dataset("v3.0", instructions=TOLD, state_width=4)
    assert quantize(written.root, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "omega_config.json").read_text())
    assert config["calibration"]["observations"] == 31
    assert "31 calibration observations of 2 tasks from 3 episodes" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_what_was_skipped_is_printed(
    write_dataset: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_dataset("v2.1", instructions=TOLD, state_width=4)
    written.video(0).write_bytes(written.video(0).read_bytes()[:500])
    assert quantize(written.root, tmp_path / "out") == 0
    assert "skipped 6 in videos/chunk-000/observation.images.base/episode_000000.mp4" in (
        capsys.readouterr().out
    )


def test_cameras_and_state_are_chosen_by_name(write_dataset: Write, tmp_path: Path) -> None:
    cameras = ("observation.images.front", "observation.images.hand")
    written = write_dataset("v2.0", instructions=TOLD, cameras=cameras)
    parts = {"state": {"arm": {"start": 0, "end": 4}}}
    (written.root / "meta/modality.json").write_text(json.dumps(parts))
    options = ("--cameras", "base=front,wrist=none", "--state", "arm")
    assert quantize(written.root, tmp_path / "out", *options) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "the policy has 'base', 'wrist', the dataset 'observation.images.front'"),
        (("--cameras", "base=front,wrist=none"), "must have shape [4], got [6]. --state names"),
        (("--cameras", "base:front"), "give POLICYNAME=FEATURE; the policy has base, wrist"),
        (("--cameras", "top=front"), "give POLICYNAME=FEATURE; the policy has base, wrist"),
        (("--cameras", "base=front,wrist=none", "--state", "arm"), "no state 'arm'; known:"),
    ],
)
def test_what_does_not_fit_is_one_message_and_leaves_nothing_behind(
    options: tuple[str, ...],
    told: str,
    write_dataset: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = write_dataset("v2.1", instructions=TOLD, cameras=("observation.images.front",))
    assert quantize(written.root, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_choices_are_refused_where_there_is_nothing_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "some.npz", state=np.zeros((1, 4)))
    assert quantize(tmp_path / "some.npz", tmp_path / "out", "--state", "arm") == 2
    assert "are for LeRobot datasets" in capsys.readouterr().err


def test_compare_holds_out_frames_between_those_it_calibrates_on(
    write_dataset: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_dataset("v2.1", lengths=(6, 6, 6), instructions=TOLD, state_width=4)
    command = ("compare", POLICY, "--calibration", str(written.root), "--recipes", "rtn")
    command += ("--allow-mismatch",)  # the states are numbers of frames
    assert run(*command, "--episodes", "0", "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "9 calibration observations" in shown and "9 heldout observations" in shown
