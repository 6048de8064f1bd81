"""Closed loop with a tiny simulator in real processes: pairing, deaths, resuming, cleaning up."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from omega_qvla.errors import (
    NonFiniteError,
    PolicyError,
    ResourceError,
    ResumeError,
    SimulatorUnavailable,
)
from omega_qvla.evaluation.rollout import (
    EvaluationError,
    blank_images,
    replaced_instruction,
    rollout,
    shifted,
)
from omega_qvla.evaluation.simulators.pool import SimulatorPool

pytestmark = pytest.mark.long

TASKS = ["near", "far"]


def outcome(records):
    """Everything about the records but the clock and the reruns."""
    return [replace(record, ms_per_chunk=0.0, states=[], reruns=0) for record in records]


@pytest.fixture
def pool(environment):
    with SimulatorPool(2, environment) as simulators:
        yield simulators


def wait_until_gone(pids):
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "simulator processes were left behind"
        time.sleep(0.02)


def test_episodes_come_in_order_and_do_not_depend_on_the_number_of_workers(
    pool, point_policy, environment
):
    seen = []
    records = rollout(
        point_policy(),
        TASKS,
        range(6),
        pool=pool,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [record.key for record in records] == [(t, s) for t in TASKS for s in range(6)]
    assert seen == [(n, 12) for n in range(13)]
    assert {record.success for record in records} == {True, False}
    assert all(record.steps == 13 for record in records if not record.success)
    assert all(record.chunks == -(-record.steps // 5) for record in records)
    assert all(record.ms_per_chunk > 0 and record.reruns == 0 for record in records)
    with SimulatorPool(1, environment) as single:
        again = rollout(point_policy(), TASKS[::-1], range(6), pool=single)
    assert {one.key: one for one in outcome(again)} == {one.key: one for one in outcome(records)}


def test_an_environment_that_can_turns_to_the_next_task_and_is_made_anew_after_a_failure(
    environment,
):
    turning = environment.replace("FakeEnvironment", "TurningEnvironment")

    def turns(pool, task):
        (simulator,) = pool.idle([], 1)
        pool.start(simulator, task, 0)
        reply = simulator.channel.receive()
        return reply["error"]["kind"] if "error" in reply else reply["observation"]["state"][0]

    with SimulatorPool(1, turning) as pool:
        assert [turns(pool, task) for task in ("near", "far", "far", "near")] == [0, 1, 1, 2]
        assert turns(pool, "broken") == "failed"
        assert [turns(pool, task) for task in ("near", "far")] == [0, 1]


def test_noise_depends_on_seed_and_chunk_alone(pool, point_policy):
    first, second = point_policy(), point_policy(gain=0.5)
    rollout(first, ["near"], [4], pool=pool)
    rollout(second, ["near"], [4], pool=pool)
    shared = min(len(first.noises), len(second.noises))
    assert shared >= 2
    assert np.array_equal(first.noises[:shared], second.noises[:shared])
    assert not np.array_equal(first.noises[0], first.noises[1])
    expected = np.random.default_rng((4, 1)).standard_normal((8, 3), dtype=np.float32)
    assert np.array_equal(first.noises[1], expected)


def test_smoothness_and_digest_are_of_the_clipped_executed_actions(pool):
    class Saturated:
        noise_shape = (5, 3)

        def sample_actions(self, observation, noise=None):
            return np.float32(np.tile([[9], [-9], [9], [-9], [9]], (1, 3)))

    record = rollout(Saturated(), ["near"], [0], pool=pool, execute=4)[0]
    # four of the five actions alternate ±1, so successive chunks continue the alternation
    actions = np.tile([1.0, -1.0], 7)[:13]
    assert record.jerk == pytest.approx(np.mean(np.diff(actions, n=3) ** 2))
    executed = np.tile(actions[:, None], (1, 3)).astype(np.float32)
    assert len(executed) == record.steps
    assert record.actions_sha256 == hashlib.sha256(executed.tobytes()).hexdigest()


def test_observations_can_be_changed_for_controls(pool, point_policy):
    class Watching(point_policy):
        def __init__(self):
            super().__init__()
            self.prompts, self.brightest = [], 0

        def sample_actions(self, observation, noise=None):
            self.prompts.append(observation["prompt"])
            self.brightest = max(self.brightest, observation["images"]["base"].max())
            return super().sample_actions(observation, noise)

    swap = replaced_instruction(shifted(["do near", "do far"]))
    policy = Watching()
    changed = rollout(
        policy, ["near"], [9], pool=pool, transform=lambda seen: swap(blank_images(seen))
    )
    assert set(policy.prompts) == {"do far"} and policy.brightest == 0
    assert outcome(changed) == outcome(rollout(point_policy(), ["near"], [9], pool=pool))


def test_killed_simulators_lose_nothing_and_count_nothing_twice(
    environment, point_policy, tmp_path
):
    """Every one of 10 episodes kills its simulator, half of them twice: 15 deaths."""
    with SimulatorPool(2, environment) as healthy:
        expected = rollout(point_policy(), TASKS, range(5), pool=healthy)
    deaths, starts = tmp_path / "deaths", tmp_path / "starts"
    deaths.mkdir()
    planned = {}
    for index, (task, seed) in enumerate((t, s) for t in TASKS for s in range(5)):
        planned[task, seed] = 1 + index % 2
        for step in (2, 4)[: planned[task, seed]]:
            (deaths / f"{task}-{seed}-{step}").touch()
    options = {"deaths": str(deaths), "starts": str(starts)}
    with SimulatorPool(2, environment, options) as pool:
        records = rollout(
            point_policy(), TASKS, range(5), pool=pool, journal=tmp_path / "journal.jsonl"
        )
        assert len(pool.pids) <= 2
    assert outcome(records) == outcome(expected)
    assert {record.key: record.reruns for record in records} == planned
    assert len(starts.read_text().splitlines()) == 10 + sum(planned.values())
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert sorted((line["task"], line["seed"]) for line in lines[1:]) == sorted(planned)


def test_simulators_killed_from_outside_are_replaced(environment, point_policy):
    with SimulatorPool(2, environment) as pool:
        expected = rollout(point_policy(), ["near"], range(8), pool=pool)
        killed = set()

        def kill_all(done, total):
            if done in (2, 5):
                killed.update(pool.pids)
                for pid in pool.pids:
                    os.kill(pid, signal.SIGKILL)

        records = rollout(point_policy(), ["near"], range(8), pool=pool, progress=kill_all)
        assert len(killed) >= 3
        assert not killed & set(pool.pids)
        assert outcome(records) == outcome(expected)


def test_an_episode_that_always_kills_its_simulator_is_named(environment, point_policy, tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"far-7-{step}").touch()
    with SimulatorPool(2, environment, {"deaths": str(tmp_path)}) as pool:
        with pytest.raises(EvaluationError, match=r"far, seed 7: 3 .* killed by signal 9"):
            rollout(point_policy(), TASKS, [6, 7], pool=pool)
        assert pool.pids == []
        assert len(rollout(point_policy(), TASKS, [6, 7], pool=pool)) == 4


def test_a_silent_simulator_counts_as_dead(environment, point_policy):
    with (
        SimulatorPool(1, environment, {"sleep_s": 30.0}, timeout_s=0.4) as pool,
        pytest.raises(EvaluationError, match="stopped answering"),
    ):
        rollout(point_policy(), ["near"], [0], pool=pool)


@pytest.mark.parametrize("stage", ["construct", "step"])
def test_an_exception_in_the_simulator_is_reported_once_and_not_retried(
    environment, point_policy, stage
):
    message = {"construct": "no scene", "step": "ZeroDivisionError: physics"}[stage]
    with (
        SimulatorPool(1, environment, {"fail": stage}) as pool,
        pytest.raises(EvaluationError, match=f"near, seed 3: .*{message}"),
    ):
        rollout(point_policy(), ["near"], [3], pool=pool)


def test_a_simulator_that_cannot_be_imported_is_unavailable(point_policy):
    for path in ("no_such_module:Thing", "json:nothing", "json"):
        with SimulatorPool(1, path) as pool, pytest.raises(SimulatorUnavailable, match=path):
            rollout(point_policy(), ["near"], [0], pool=pool)


def test_interrupting_leaves_no_process_behind(environment, point_policy):
    class Interrupted(point_policy):
        def sample_actions(self, observation, noise=None):
            if len(self.noises) == 3:
                raise KeyboardInterrupt
            return super().sample_actions(observation, noise)

    pool = SimulatorPool(2, environment)
    pids = []
    with pytest.raises(KeyboardInterrupt):
        rollout(
            Interrupted(),
            TASKS,
            range(4),
            pool=pool,
            progress=lambda done, total: pids.extend(pool.pids),
        )
    assert pool.pids == []
    wait_until_gone(pids)


def test_simulator_processes_do_not_import_torch(point_policy):
    """It would cost each of them seconds and hundreds of megabytes."""
    with SimulatorPool(1, "fake_environment:without_torch") as pool:
        assert len(rollout(point_policy(), ["near"], [0], pool=pool)) == 1


def test_an_environment_may_still_use_the_public_api(point_policy):
    with SimulatorPool(1, "fake_environment:with_public_api") as pool:
        assert len(rollout(point_policy(), ["near"], [0], pool=pool)) == 1


def test_leaving_the_pool_ends_its_processes(environment, point_policy):
    with SimulatorPool(2, environment) as pool:
        rollout(point_policy(), TASKS, [0], pool=pool)
        pids = pool.pids
        assert len(pids) == 2
    wait_until_gone(pids)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_policy_that_returns_non_finite_actions_is_named(pool, point_policy, bad):
    class Broken(point_policy):
        def sample_actions(self, observation, noise=None):
            chunk = super().sample_actions(observation, noise)
            return chunk * bad if len(self.noises) == 2 else chunk

    with pytest.raises(NonFiniteError, match="near, seed 9, chunk 1"):
        rollout(Broken(), ["near"], [9], pool=pool)


def test_chunks_shorter_than_what_is_executed_are_refused(pool, point_policy):
    with pytest.raises(PolicyError, match="horizon of 8"):
        rollout(point_policy(), ["near"], [0], pool=pool, execute=9)

    class Short(point_policy):
        def sample_actions(self, observation, noise=None):
            return np.zeros((2, 3), np.float32)

    with pytest.raises(PolicyError, match="shape"):
        rollout(Short(), ["near"], [0], pool=pool)


def test_an_interrupted_evaluation_continues_where_it_stopped(pool, point_policy, tmp_path):
    journal = tmp_path / "runs" / "journal.jsonl"

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(point_policy(), TASKS, range(5), pool=pool, journal=journal, progress=interrupt)
    with journal.open("a") as file:
        file.write('{"task": "near", "se')
    seen = []
    records = rollout(
        point_policy(),
        TASKS,
        range(6),
        pool=pool,
        journal=journal,
        progress=lambda done, total: seen.append(done),
    )
    assert seen == list(range(5, 13))
    assert outcome(records) == outcome(rollout(point_policy(), TASKS, range(6), pool=pool))
    assert len(journal.read_text().splitlines()) == 13
    untouched = point_policy()
    assert rollout(untouched, TASKS, range(6), pool=pool, journal=journal) == records
    assert untouched.noises == []


def test_a_journal_of_something_else_is_refused_with_the_difference(pool, point_policy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    rollout(point_policy(), ["near"], [0], pool=pool, journal=journal, identity={"recipe": "rtn"})
    before = journal.read_bytes()
    with pytest.raises(ResumeError, match=r"identity.*rtn.*omega.*execute|execute.*rtn.*omega"):
        rollout(
            point_policy(),
            ["near"],
            [0],
            pool=pool,
            execute=4,
            journal=journal,
            identity={"recipe": "omega"},
        )
    assert journal.read_bytes() == before


def test_a_journal_damaged_before_its_last_line_is_refused(pool, point_policy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + "garbage\n" + lines[2])
    with pytest.raises(ResumeError, match="line 2"):
        rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal)


def test_a_journal_from_before_the_digests_can_be_continued(pool, point_policy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    first = rollout(point_policy(), ["near"], [0], pool=pool, journal=journal)
    header, line = journal.read_text().splitlines()
    entry = json.loads(line)
    assert len(entry.pop("actions_sha256")) == 64
    journal.write_text(f"{header}\n{json.dumps(entry)}\n")
    old, new = rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal)
    assert old == replace(first[0], actions_sha256=None) and new.actions_sha256
    del entry["jerk"]
    journal.write_text(f"{header}\n{json.dumps(entry)}\n")
    with pytest.raises(ResumeError, match="line 2"):
        rollout(point_policy(), ["near"], [0], pool=pool, journal=journal)


def test_a_journal_repeated_or_in_use_counts_nothing_twice(pool, point_policy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    first = rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal)
    with journal.open("a") as file:
        file.write(journal.read_text().splitlines()[1] + "\n")
    assert rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal) == first

    def again(done, total):
        rollout(point_policy(), ["near"], [0, 1], pool=pool, journal=journal)

    with pytest.raises(ResumeError, match="another evaluation"):
        rollout(point_policy(), ["near"], [0, 2], pool=pool, journal=journal, progress=again)
    with pytest.raises(ResourceError, match="cannot open"):
        rollout(point_policy(), ["near"], [0], pool=pool, journal=tmp_path)


def test_a_pool_needs_a_worker(environment):
    with pytest.raises(ValueError, match="at least one"):
        SimulatorPool(0, environment)
