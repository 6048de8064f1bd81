"""From a published checkpoint to an artifact on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_formats import TRAINING
from openpi_cases import GOLDEN, STEP, TOKENIZER

from omega_qvla.cli import main


def run(*arguments: Any) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code if isinstance(stop.value.code, int) else 1


def test_openpis_policy_asks_for_its_training_configuration_and_writes_nothing_before(
    openpi_directory: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, out = openpi_directory(), tmp_path / "artifact"
    assert run("quantize", directory, "--calibration", "random:2", "--out", out) == 2
    assert "--training-config" in " ".join(capsys.readouterr().err.split())
    assert not out.exists() and not (tmp_path / ".artifact.journal").exists()
    training = tmp_path / "training.json"
    training.write_text(json.dumps(TRAINING))
    command = ("quantize", directory, "--training-config", training, "--out", out)
    assert run(*command, "--calibration", "random:2") == 0
    assert out.is_dir()


def test_a_dry_run_reads_headers_alone(
    gr00t_directory: Callable[..., Path], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    command = ("quantize", gr00t_directory(), "--data-config", "libero", "--out", tmp_path / "a")
    assert run(*command, "--dry-run", "--json", report) == 0
    assert json.loads(report.read_text())["total_bytes"] > 0
    assert not (tmp_path / "a").exists()


def test_a_step_of_openpis_jax_trainer_is_quantized_as_it_is_on_disk(tmp_path: Path) -> None:
    step, training = GOLDEN / "lora" / str(STEP), GOLDEN / "lora" / "training.json"
    told = ("--training-config", training, "--tokenizer", TOKENIZER, "--calibration", "random:1")
    report = tmp_path / "report.json"
    command = ("quantize", step, *told, "--recipe", "rtn", "--out", tmp_path / "a")
    assert run(*command, "--json", report) == 0
    assert run("inspect", tmp_path / "a", "--json", report, "--overwrite") == 0
    assert run("verify", tmp_path / "a") == 0
    config = json.loads((tmp_path / "a" / "omega_config.json").read_text())
    assert config["policy"]["decisions"]["layout"] == "openpi, JAX"
