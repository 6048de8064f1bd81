"""Episodes that advance together: shared passes, whole groups, deaths and resuming."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from omega_qvla.errors import ResourceError, ResumeError
from omega_qvla.evaluation.drift import hand_drift
from omega_qvla.evaluation.rollout import rollout, seed_groups
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.results.episodes import EpisodeJournal, EpisodeRecord
from omega_qvla.results.rows import HandDrift

TASKS = ["near", "far"]


def outcome(records):
    """Everything about the records but the clock and the reruns."""
    return [replace(record, ms_per_chunk=0.0, reruns=0) for record in records]


@pytest.fixture
def batched(point_policy):
    """A policy that answers several observations in one pass, and remembers which."""

    class Batched(point_policy):
        def encode(self, observation):
            return observation

        def __init__(self):
            super().__init__()
            self.passes = []

        def sample_batch(self, inputs, noises):
            self.passes.append(
                sorted((seen["prompt"], int(seen["images"]["base"][0, 0, 0])) for seen in inputs)
            )
            return [
                point_policy.sample_actions(self, seen, noise)
                for seen, noise in zip(inputs, noises, strict=True)
            ]

    return Batched


def test_the_outcome_is_that_of_episodes_alone_in_fewer_passes(environment, point_policy, batched):
    with SimulatorPool(2, environment) as pool:
        alone = rollout(point_policy(), TASKS, range(7), pool=pool)
    together = batched()
    with SimulatorPool(3, environment) as pool:
        records = rollout(together, TASKS, range(7), pool=pool, together=3)
    assert [record.key for record in records] == [(task, s) for task in TASKS for s in range(7)]
    assert outcome(records) == outcome(alone)
    assert max(map(len, together.passes)) == 3
    groups = [set(group) for group in seed_groups(range(7), 3)]
    assert all(
        len({task for task, _ in members}) == 1
        and any({seed for _, seed in members} <= group for group in groups)
        for members in together.passes
    )


def test_several_groups_run_side_by_side(environment, batched):
    with SimulatorPool(5, environment) as pool:
        records = rollout(batched(), TASKS, range(4), pool=pool, together=2)
        assert len(pool.pids) == 5
    assert [record.key for record in records] == [(task, s) for task in TASKS for s in range(4)]


@pytest.mark.parametrize("step", [0, 5])
def test_a_dead_simulator_starts_its_group_again(environment, batched, tmp_path, step):
    with SimulatorPool(3, environment) as pool:
        expected = rollout(batched(), ["near"], range(6), pool=pool, together=3)
    (tmp_path / f"near-4-{step + 1}").touch()
    options = {"deaths": str(tmp_path), "starts": str(tmp_path / "starts")}
    with SimulatorPool(3, environment, options) as pool:
        records = rollout(batched(), ["near"], range(6), pool=pool, together=3)
    assert outcome(records) == outcome(expected)
    started = [int(line.split()[1]) for line in (tmp_path / "starts").read_text().splitlines()]
    assert sorted(started) == [0, 1, 2, 3, 3, 4, 4, 5, 5]


def test_resuming_runs_a_group_as_a_whole_and_keeps_what_was_there(environment, batched, tmp_path):
    path = tmp_path / "journal.jsonl"
    with SimulatorPool(3, environment) as pool:
        expected = rollout(batched(), ["near"], range(6), pool=pool, together=3, journal=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"seed": 4' not in line) + "\n")
    seen, policy = [], batched()
    with SimulatorPool(3, environment) as pool:
        records = rollout(
            policy,
            ["near"],
            range(6),
            pool=pool,
            together=3,
            journal=path,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert records == [r if r.seed != 4 else replace(r, **clock(records[4])) for r in expected]
    assert seen == [(5, 6), (6, 6)]
    assert {seed for members in policy.passes for _, seed in members} == {3, 4, 5}
    assert len(path.read_text().splitlines()) == len(lines)
    other_size = pytest.raises(ResumeError, match="together: journal 3, now 2")
    with SimulatorPool(3, environment) as pool, other_size:
        rollout(batched(), ["near"], range(6), pool=pool, together=2, journal=path)


def clock(record):
    """The part of a record that is not a function of the episode."""
    return {"ms_per_chunk": record.ms_per_chunk}


def test_a_pool_that_is_too_small_is_refused(environment, batched):
    with SimulatorPool(2, environment) as pool, pytest.raises(ResourceError, match="3 episodes"):
        rollout(batched(), ["near"], range(6), pool=pool, together=3)
        assert not pool.pids


def test_states_are_kept_at_every_chunk(environment, point_policy, tmp_path):
    with SimulatorPool(1, environment) as pool:
        record = rollout(
            point_policy(), ["near"], [3], pool=pool, journal=tmp_path / "journal.jsonl"
        )[0]
    target = np.random.default_rng(3).uniform(0.5, 4.5, size=3)
    assert record.states[0] == pytest.approx(target, abs=1e-5)
    assert len(record.states) == record.chunks
    line = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[1])
    assert line["states"] == record.states


def walk(seed, places, task="near"):
    """An episode whose hand was at these places, every five steps."""
    return EpisodeRecord(
        task, seed, False, 5 * len(places), len(places), None, 1.0, [[*p, 9.0] for p in places]
    )


def test_drift_is_the_distance_of_the_hands_where_both_still_move():
    still = [(0.0, 0.0, 0.0)] * 11
    ours = [walk(0, still), walk(1, still[:6]), walk(2, still)]
    moved = [(0.0, 0.0, 0.0)] * 5 + [(0.03, 0.04, 0.0)] * 6
    theirs = [walk(0, moved), walk(1, moved), walk(2, still)]
    assert hand_drift(ours, theirs, execute=5) == {
        "25": HandDrift(median_m=0.05, p90_m=0.05, episodes=3),
        "50": HandDrift(median_m=0.025, p90_m=0.045, episodes=2),
    }
    with pytest.raises(ValueError, match="same episodes"):
        hand_drift(ours, theirs[:2], execute=5)


def test_a_journal_keeps_states(tmp_path):
    record = walk(0, [(0.1, 0.2, 0.3)])
    with EpisodeJournal(tmp_path / "j.jsonl", {}) as book:
        book.append(record)
    with EpisodeJournal(tmp_path / "j.jsonl", {}) as book:
        assert book.records[record.key] == record
