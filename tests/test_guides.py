"""The guides: every command of their sh blocks is run as it is written there.

They name a user's own checkpoints and datasets.  Small ones are put under those names: the formats
are real, sizes and weights are not (tests/helpers/checkpoint_formats.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_directories import (  # noqa: F401
    gr00t_directory,
    groot_directory,
    lerobot_directory,
    openpi_directory,
    sentencepiece_model,
    small_tower,
)
from documents import ROOT, blocks, commands, run, serving
from written_dataset import Written

import omega_qvla as oq

pytestmark = pytest.mark.long

Directory = Callable[..., Path]
PARTS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
TINY = "omega-qvla quantize builtin:tiny-pi05 --out out/tiny"
FRAMES = [(episode, frame) for episode in range(2) for frame in range(6)]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def run_all(text: str) -> None:
    """Every command in order; servers must come up and end when told to."""
    lines = commands(text)
    assert lines
    for line in lines:
        if line.startswith("omega-qvla serve "):
            with serving(line):
                pass
        else:
            run(line)


def run_python(text: str, **names: Any) -> dict[str, Any]:
    """The one Python block that loads a policy."""
    (code,) = [code for code in blocks(text, "python") if "load_policy" in code]
    found = {"oq": oq, **names}
    exec(code, found)
    return found


def dataset(root: Path, cameras: Sequence[str], states: dict[tuple[int, int], list[float]]) -> None:
    """Two episodes of six frames, as LeRobot 2.1 writes them."""
    for name in ("pyarrow", "av", "PIL"):
        pytest.importorskip(name, reason="the extra `data` is not installed")
    Written(
        root,
        lengths=(6, 6),
        told=(0, 1),
        cameras=[f"observation.images.{camera}" for camera in cameras],
        state_width=len(states[0, 0]),
        states=states,
    ).write()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def my_dataset(tmp_path: Path) -> None:
    """What the small pi05 checkpoints were trained on."""
    states = {(e, f): [f / 30 - e / 4, e / 2 - f / 20, 1 + e / 2] for e, f in FRAMES}
    dataset(tmp_path / "my_dataset", ("front", "wrist"), states)


@pytest.mark.usefixtures("my_dataset")
def test_quantize_my_pi05(
    lerobot_directory: Directory,  # noqa: F811
    openpi_directory: Directory,  # noqa: F811
) -> None:
    lerobot_directory("my_lerobot_pi05")
    openpi_directory("my_openpi_pi05")
    run_all(page("pi05.md"))
    quantized = run_python(page("pi05.md"))["quantized"]
    assert quantized.config["recipe"]["name"] == "omega-w4a4"


def test_quantize_my_gr00t(
    gr00t_directory: Directory,  # noqa: F811
    groot_directory: Directory,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gr00t_directory("my_gr00t")
    groot_directory("my_groot")
    moved = {(e, f): [f / 6 - e, *[e / 2 - f / 9] * 5, f / 6] for e, f in FRAMES}
    dataset(tmp_path / "my_gr00t_dataset", ("image", "wrist_image"), moved)
    slices = {part: {"start": i, "end": i + 1} for i, part in enumerate(PARTS)}
    modality = tmp_path / "my_gr00t_dataset" / "meta" / "modality.json"
    modality.write_text(json.dumps({"state": slices}))
    scaling = dict.fromkeys(PARTS, "min_max")
    configuration = {"cameras": ["image", "wrist_image"], "state": scaling, "actions": scaling}
    (tmp_path / "data.json").write_text(json.dumps(configuration))
    states = {(e, f): [f / 30 - e / 4, e / 2 - f / 20, 1 + e / 2] for e, f in FRAMES}
    dataset(tmp_path / "my_groot_dataset", ("front", "wrist"), states)
    run_all(page("gr00t.md"))


@pytest.mark.usefixtures("my_dataset")
def test_calibrate_on_my_dataset(lerobot_directory: Directory) -> None:  # noqa: F811
    lerobot_directory("my_lerobot_pi05")
    run_all(page("calibration.md"))
    observations = run_python(page("calibration.md"))["observations"]
    assert len(observations) == 6 and observations.report


def test_serve_to_a_robot() -> None:
    """The artifact is made as in README.md, where that command is run; here by a quicker recipe."""
    quantize, serve = commands(page("serving.md"))
    assert quantize == TINY
    run(f"{quantize} --recipe rtn")
    with serving(serve):
        pass


def test_the_first_page_shows_the_commands_of_the_readme() -> None:
    assert commands(page("index.md")) == commands((ROOT / "README.md").read_text("utf-8"))


def test_read_a_report() -> None:
    run_all(page("report.md"))
    assert "<html" in Path("out/report.html").read_text("utf-8")


def test_evaluate_in_my_simulator(tmp_path: Path) -> None:
    text = page("evaluate-your-robot.md")
    code = blocks(text, "python")[0]
    (tmp_path / "my_robot.py").write_text(code)
    run_all(text)


@pytest.mark.parametrize("name", ["look_inside", "own_module"])
def test_examples_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--recipe", "rtn"],
        capture_output=True,
        text=True,
        check=True,
    )
    errors = [float(error) for error in re.findall(r"error.*? (\d+\.\d+)", done.stdout)]
    assert errors and all(0 < error < 0.5 for error in errors), done.stdout
    assert "False" not in done.stdout


def test_every_page_with_commands_is_run_here() -> None:
    """A new guide has to be added above."""
    shown = {path.name for path in (ROOT / "docs").glob("**/*.md") if commands(path.read_text())}
    run_above = {"pi05.md", "gr00t.md", "calibration.md", "evaluate-your-robot.md"}
    run_above |= {"index.md", "serving.md", "report.md"}
    assert {name for name in shown if not name.startswith("add-")} == run_above
