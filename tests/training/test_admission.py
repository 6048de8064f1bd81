"""The admission rule and the controls it rests on."""

from __future__ import annotations

import pytest

from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.results.statistics import wilson_interval
from omega_qvla.training.admission import _shuffle, _swaps, admitted
from omega_qvla.training.embedded import EMBEDDED, EmbeddedPolicy

recipes = pytest.mark.parametrize("recipe", EMBEDDED.values(), ids=EMBEDDED)


def row(plain: int, blank: int, shuffled: int) -> dict:
    def rate(solved: int, episodes: int) -> dict:
        return {"success": [solved, episodes], "ci95": wilson_interval(solved, episodes)}

    return {"plain": rate(plain, 100), "blank": rate(blank, 30), "shuffled": rate(shuffled, 30)}


@pytest.mark.parametrize(
    ("plain", "blank", "shuffled", "verdict"),
    [
        (80, 0, 0, True),
        (79, 0, 0, False),  # below 80 %
        (95, 18, 0, False),  # solved without seeing
        (95, 0, 18, False),  # solved whatever it is told
    ],
)
def test_a_task_is_admitted_if_it_is_solved_because_of_images_and_words(
    plain: int, blank: int, shuffled: int, verdict: bool
):
    assert admitted(row(plain, blank, shuffled)) is verdict


@recipes
def test_the_shuffled_control_never_uses_the_words_of_the_same_scene(recipe: EmbeddedPolicy):
    told = _shuffle(recipe.tasks)
    scene_of = {task.instruction: task.scene for task in TASKS.values()}
    assert all(scene_of[text] != TASKS[task].scene for task, text in told.items())


def test_the_swapped_control_exchanges_the_words_of_the_same_scene():
    swaps = _swaps(EMBEDDED["tiny-pi05"].tasks)
    assert swaps["faucet-open-v3"] == TASKS["faucet-close-v3"].instruction
    assert swaps["pick-place-v3"] == TASKS["push-v3"].instruction
    assert "door-open-v3" not in swaps


@recipes
def test_every_trained_task_has_its_share_of_corrections(recipe: EmbeddedPolicy):
    assert set(recipe.corrections) == set(recipe.tasks)
