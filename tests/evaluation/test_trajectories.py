from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from omega_qvla.errors import PolicyError, SimulatorUnavailable
from omega_qvla.evaluation.rollout import EvaluationError, rollout
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.trajectories import (
    FRAMES,
    compare_tracks,
    replay,
    replay_pool,
    run_episode,
)


@pytest.fixture
def run(environment, point_policy):
    """Episodes of the point policy, on the fake simulator with the given options."""

    def episode(task="near", seed=3, gain=1.0, **options):
        with SimulatorPool(1, environment, options) as pool:
            return run_episode(point_policy(gain=gain), task, seed, pool)

    return episode


def test_an_episode_is_the_one_an_evaluation_counts(run, environment, point_policy):
    with SimulatorPool(2, environment) as pool:
        (counted,) = rollout(point_policy(), ["near"], [3], pool=pool)
    episode = run()
    assert replace(episode.record, ms_per_chunk=0.0) == replace(counted, ms_per_chunk=0.0)
    assert episode.actions.shape == (counted.steps, 3)
    executed = np.clip(episode.actions, -1.0, 1.0)
    assert hashlib.sha256(executed.tobytes()).hexdigest() == counted.actions_sha256


def test_a_replay_shows_the_hand_after_every_action(run, environment):
    """The fake simulator adds 0.3 × action to a position, and shows target − position as state."""
    episode = run()
    with replay_pool(environment, {}) as pool:
        track = replay(episode, pool)
    target = np.random.default_rng(3).uniform(0.5, 4.5, size=3)
    moved = np.cumsum(0.3 * np.clip(episode.actions, -1, 1).astype(np.float64), axis=0)
    expected = target - np.concatenate((np.zeros((1, 3)), moved))
    # the state is float32
    np.testing.assert_allclose(track.positions, expected, atol=1e-5)
    assert track.frames == []


def test_frames_are_spread_from_the_first_to_the_last_moment(run, environment):
    episode = run(seed=5)
    with replay_pool(environment, {}) as pool:
        frames = replay(episode, pool, frames=4).frames
    steps = [step for step, _ in frames]
    assert steps[0] == 0 and steps[-1] == episode.record.steps
    assert len(steps) == 4 and np.ptp(np.diff(steps)) <= 1
    assert all((image == 5).all() for _, image in frames)


def test_a_simulator_that_dies_changes_nothing(run, environment, tmp_path):
    undisturbed = run()
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    (deaths / "near-3-7").touch()
    episode = run(deaths=str(deaths))
    assert episode.record.reruns == 1
    np.testing.assert_array_equal(episode.actions, undisturbed.actions)

    (deaths / "near-3-2").touch()
    with replay_pool(environment, {"deaths": str(deaths)}) as pool:
        track = replay(episode, pool)
    assert list(deaths.iterdir()) == []
    assert len(track.positions) == episode.record.steps + 1


def test_a_replay_that_ends_otherwise_is_no_picture_of_the_episode(run, environment):
    episode = run()
    assert episode.record.success
    elsewhere = replace(episode, actions=-episode.actions)
    with replay_pool(environment, {}) as pool, pytest.raises(EvaluationError, match="not solved"):
        replay(elsewhere, pool)


def test_failures_of_the_simulator_are_told(run, environment):
    episode = run()
    failed = pytest.raises(EvaluationError, match="near, seed 3: the simulator failed")
    with replay_pool(environment, {"fail": "step"}) as pool, failed:
        replay(episode, pool)
    with replay_pool("nowhere:Nothing", {}) as pool, pytest.raises(SimulatorUnavailable):
        replay(episode, pool)


def test_policies_are_paired_and_the_film_shows_where_they_part(environment, point_policy):
    lines = []
    rollouts = compare_tracks(
        {"fp32": point_policy(), "lame": point_policy(gain=0.2)},
        ["near", "far"],
        range(2),
        environment=environment,
        replay_options={},
        progress=lambda done, total: lines.append((done, total)),
    )
    json.dumps(rollouts, allow_nan=False)
    assert lines[0] == (0, 8) and lines[-1] == (8, 8)
    told = [(e["task"], e["seed"], e["recipe"]) for e in rollouts["episodes"]]
    assert told[:3] == [("near", 0, "fp32"), ("near", 0, "lame"), ("near", 1, "fp32")]
    assert len(told) == 8
    for entry in rollouts["episodes"]:
        assert len(entry["positions"]) == entry["steps"] + 1
    outcomes = {(e["recipe"], e["task"], e["seed"]): e["success"] for e in rollouts["episodes"]}
    first, second = rollouts["films"]
    assert (first["recipe"], second["recipe"]) == ("fp32", "lame")
    case = (first["task"], first["seed"])
    assert case == (second["task"], second["seed"])
    assert outcomes[("fp32", *case)] != outcomes[("lame", *case)]
    assert len(first["frames"]) == FRAMES
    for frame in first["frames"]:
        assert base64.b64decode(frame["png"], validate=True).startswith(b"\x89PNG")


def test_a_state_without_a_hand_is_refused(run):
    episode = run()
    handless = replay_pool("fake_environment:StatelessEnvironment", {})
    with handless as pool, pytest.raises(PolicyError, match="position of the hand"):
        replay(episode, pool)
