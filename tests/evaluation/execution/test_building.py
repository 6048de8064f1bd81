"""What worker processes build is what the comparison in one process builds, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wired_executor import WiredExecutor

from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import ArtifactError, PolicyError
from omega_qvla.evaluation.comparison import Compared, comparison_rows, discard_simulations
from omega_qvla.evaluation.execution.building import artifact_blueprint, origin_of, saved
from omega_qvla.evaluation.execution.plan import OpenLoop
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.quantization.pipeline import weights_fingerprint

pytestmark = pytest.mark.long

SOURCE = "builtin:tiny-pi05"


def silent(label: str, done: int, total: int) -> None:
    del label, done, total


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The number of threads is part of what the bits depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def comparison(tmp_path: Path) -> Compared:
    policy = load_policy(SOURCE)
    return Compared(
        label=SOURCE,
        policy=policy,
        choices=CheckpointOptions(),
        weights=weights_fingerprint(policy),
        checkpoint_bytes=123,
        calibration=Observations.load(SOURCE)[:1],
        recipes=["rtn", "omega-paper"],
        magnitudes=[30.0],
        scope="paper",
        artifacts=tmp_path / "artifacts",
    )


@pytest.fixture
def open_loop() -> OpenLoop:
    return OpenLoop(Observations.load(SOURCE, split="heldout")[:1])


def test_integers_simulations_and_injected_outliers_are_the_same_elsewhere(
    comparison: Compared, open_loop: OpenLoop, tmp_path: Path
) -> None:
    here = run_sweep(comparison_rows(comparison), closed_loop=None, open_loop=open_loop)
    away = replace(comparison, artifacts=tmp_path / "elsewhere")
    labels: list[str] = []
    there = run_sweep(
        comparison_rows(away),
        closed_loop=None,
        open_loop=open_loop,
        progress=lambda label, done, total: labels.append(label),
        executor=WiredExecutor(),
    )
    assert here == there
    assert {"quantizing rtn, stress:30", "quantizing omega-paper, stress:30"} <= set(labels)
    saved_as = [path.name for path in away.artifacts.iterdir() if not path.name.startswith(".")]
    assert saved_as == ["rtn-stress-30"]
    discard_simulations(away)
    left = {".rtn-stress-30.origin.json", "rtn-stress-30"}
    assert {path.name for path in away.artifacts.iterdir()} == left


def test_a_simulation_is_put_together_again_without_quantizing(
    comparison: Compared, open_loop: OpenLoop
) -> None:
    rows = comparison_rows(replace(comparison, magnitudes=[0.0]))
    (simulation,) = (row for row in rows if row.recipe == "omega-paper")
    assert simulation.blueprint is not None
    reports: list[tuple[str, int, int]] = []
    first = simulation.blueprint.build(lambda *report: reports.append(report))
    quantizing = len(reports)
    second = first.again.build(lambda *report: reports.append(report))
    assert quantizing > 10 and len(reports) == quantizing
    noise = np.random.default_rng(0).standard_normal(comparison.policy.noise_shape)
    chunks = [
        built.policy.sample_actions(open_loop.observations[0], noise=noise.astype(np.float32))
        for built in (first, second)
    ]
    assert np.array_equal(*chunks)


def test_other_weights_under_the_same_name_are_refused(comparison: Compared) -> None:
    rows = comparison_rows(replace(comparison, weights="0" * 64))
    assert rows[0].blueprint is not None
    with pytest.raises(PolicyError, match="other weights"):
        rows[0].blueprint.build(silent)


def test_an_artifact_that_somebody_else_wrote_is_refused(
    comparison: Compared, tmp_path: Path
) -> None:
    rows = comparison_rows(replace(comparison, magnitudes=[0.0], recipes=["rtn"]))
    built: Any = rows[1].build(silent).policy
    directory = comparison.artifacts / "rtn-plain"
    blueprint = artifact_blueprint(directory, built.content_hash)
    assert blueprint.build(silent).again == blueprint
    with pytest.raises(ArtifactError, match="file system that all machines share"):
        saved(silent, directory=str(directory), content_hash="0" * 64)
    with pytest.raises(ArtifactError):
        saved(silent, directory=str(tmp_path / "nowhere"), content_hash=None)


def test_a_resumed_comparison_takes_whole_artifacts_of_the_same_origin(
    comparison: Compared,
) -> None:
    def quantizes(given: Compared) -> bool:
        """Whether a row is quantized when it is built here; elsewhere it must come out the same."""
        reports: list[str] = []
        rows = comparison_rows(given)
        row = next(row for row in rows if row.recipe == "rtn")
        here: Any = row.build(lambda label, *_: reports.append(label)).policy
        assert row.blueprint is not None
        there: Any = row.blueprint.build(silent).policy
        assert here.content_hash == there.content_hash
        return bool(reports)

    again = replace(comparison, resume=True)
    assert quantizes(again), "there is nothing yet"
    assert not quantizes(again)
    assert quantizes(comparison), "without --resume everything is made anew"
    assert quantizes(replace(again, calibration=Observations.load(SOURCE)[1:2]))
    assert quantizes(again), "an artifact of other observations stood there"
    weights = next((comparison.artifacts / "rtn-stress-30").glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert quantizes(again), "one bit was wrong"
    origin_of(comparison.artifacts / "rtn-stress-30").write_text("{")
    assert quantizes(again)
    assert not quantizes(again)
