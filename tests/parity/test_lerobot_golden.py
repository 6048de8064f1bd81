"""pi05 and pi0 checkpoints that LeRobot wrote, and what it computed of them (docs/parity.md).

``make test-lerobot`` runs LeRobot itself; here are its records of the same cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_formats import module_of
from guided_cases import GUIDED, SETTINGS, STEP_SETTINGS, Setting
from guided_parity import (
    FILE,
    TOLERANCE,
    chunk_difference,
    left_over_difference,
    loaded,
    step_difference,
)
from lerobot_cases import VOCABULARY, Case, Policy, golden_cases
from lerobot_golden import WEIGHTS, Golden, draw_weights, golden_file
from lerobot_parity import Record, choices_of, compare, know_small_tower, read_record

from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.sizes import GEMMA_VARIANTS
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi05.config import Pi05Config

GOLDEN = (*golden_cases("pi05"), *golden_cases("pi0"))
UNTOLD = tuple(case for case in GOLDEN if choices_of(case).written_by is not None)

pytest.importorskip("sentencepiece", reason="the extra hub is not installed")


@pytest.fixture(scope="module")
def goldens() -> dict[Policy, Golden]:
    policies: tuple[Policy, ...] = ("pi05", "pi0")
    return {policy: Golden(golden_file(policy)) for policy in policies}


@pytest.fixture
def golden(goldens: dict[Policy, Golden], case: Case) -> Golden:
    return goldens[case.policy]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[Policy, Path]:
    """The network of every case."""
    dummy = GEMMA_VARIANTS["dummy"]
    pi05 = Pi05Config(
        vision=VisionConfig(width=64, hidden=72, heads=2, depth=2, image_size=28),
        backbone=dummy,
        expert=dummy,
        depth=2,
        vocabulary=VOCABULARY,
        horizon=5,
        action_dim=32,
        robot_action_dim=7,
        state_dim=8,
        cameras=("image",),
        prompt_length=200,
        state_in_prompt=True,
    )
    pi0 = Pi0Config(
        **pi05.model_dump(exclude={"family", "state_in_prompt", "prompt_state_dim"}),
        padded_state_dim=32,
    )
    paths: dict[Policy, Path] = {}
    configs: dict[Policy, PaligemmaConfig] = {"pi05": pi05, "pi0": pi0}
    for policy, config in configs.items():
        paths[policy] = tmp_path_factory.mktemp("weights") / WEIGHTS
        draw_weights(module_of(config), paths[policy])
    return paths


@pytest.fixture
def checkpoint(
    golden: Golden, weights: dict[Policy, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], Path]:
    """Puts a case's checkpoint together again."""
    know_small_tower(monkeypatch)

    def write(case: Case) -> Path:
        for name, data in golden.files(case).items():
            (tmp_path / name).write_bytes(data)
        os.link(weights[case.policy], tmp_path / WEIGHTS)
        return tmp_path

    return write


@pytest.mark.parametrize("case", GOLDEN, ids=[case.name for case in GOLDEN])
def test_ours_computes_what_lerobot_computed(
    case: Case, golden: Golden, checkpoint: Callable[[Case], Path]
) -> None:
    found = compare(checkpoint(case), golden.record(case), case)
    assert found.within_bounds(), found


@pytest.mark.parametrize("case", UNTOLD, ids=[case.name for case in UNTOLD])
def test_a_release_that_nothing_tells_must_be_said_and_matters(
    case: Case, golden: Golden, checkpoint: Callable[[Case], Path]
) -> None:
    """Taken for the other release, prompts and bars are others: the comparison would see it."""
    directory, right = checkpoint(case), choices_of(case)
    with pytest.raises(PolicyError, match="give --written-by lerobot"):
        compare(directory, golden.record(case), case, replace(right, written_by=None))
    other: Any = {"lerobot-0.4": "lerobot-0.5", "lerobot-0.5": "lerobot-0.4"}[right.written_by]
    found = compare(directory, golden.record(case), case, replace(right, written_by=other))
    assert (found.tokens > 0) == (case.policy == "pi05")  # whose prompt has the state
    assert found.pixels > 1.0 and found.actions > 1e-3


@pytest.fixture(scope="module")
def guided() -> Record:
    return read_record(FILE)


@pytest.mark.parametrize("setting", STEP_SETTINGS, ids=lambda setting: setting.name)
def test_a_guided_denoising_step_is_lerobots(setting: Setting, guided: Record) -> None:
    assert step_difference(guided, setting) <= TOLERANCE


@pytest.mark.parametrize("case", GUIDED, ids=lambda case: case.name)
def test_a_chunk_continues_another_as_lerobots_does(
    case: Case, guided: Record, checkpoint: Callable[[Case], Path]
) -> None:
    """From the same left-over, in the robot's units and in the network's."""
    policy = loaded(checkpoint(case), case)
    assert left_over_difference(policy, guided, case) <= TOLERANCE
    for setting in SETTINGS:
        assert chunk_difference(policy, guided, case, setting) <= TOLERANCE, setting.name
