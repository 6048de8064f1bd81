"""A sweep by several processes: the document of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fake_policy import PointPolicy
from wired_executor import WiredExecutor

from omega_qvla.errors import PolicyError, ResourceError, ResumeError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, SweepRow
from omega_qvla.evaluation.execution.processes import ProcessExecutor
from omega_qvla.evaluation.rollout import EvaluationError
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.sweep import run_sweep

pytestmark = pytest.mark.long

TASKS = ["near", "far"]


def point_row(recipe, gain=1.0, condition="plain", **arguments):
    return SweepRow(
        "point",
        recipe,
        lambda _: Built(PointPolicy(gain), Footprint(7, int(100 * gain))),
        condition,
        blueprint=Blueprint("fake_policy:build", {"gain": gain, **arguments}),
    )


@pytest.fixture
def rows():
    return [point_row("halved", 0.1), point_row("fp32"), point_row("twin", condition="stress:30")]


@pytest.fixture
def open_loop():
    generator = np.random.default_rng(5)
    return OpenLoop([{"state": generator.uniform(-2, 2, 3)} for _ in range(6)], seed=1)


@pytest.fixture
def closed_loop(environment):
    with SimulatorPool(1, environment) as pool:
        yield ClosedLoop(pool, TASKS, range(6))


def deterministic(document):
    """Everything but the clock."""
    rows = [row.model_copy(update={"ms_per_chunk": None}) for row in document.rows]
    return document.model_copy(update={"rows": rows})


def test_several_processes_give_the_document_of_one(rows, closed_loop, open_loop):
    alone = run_sweep(rows, closed_loop=closed_loop, open_loop=open_loop)
    seen = []
    executor = ProcessExecutor(2, seeds_per_job=2)
    together = run_sweep(
        rows,
        closed_loop=closed_loop,
        open_loop=open_loop,
        progress=lambda label, done, total: seen.append((label, done, total)),
        executor=executor,
    )
    assert deterministic(together) == deterministic(alone)
    assert executor.pids == []
    assert ("building", 1, 1) in seen
    for row in rows:
        counts = [done for label, done, _ in seen if label == row.label]
        assert counts == list(range(13))


def test_killed_workers_lose_nothing_and_count_nothing_twice(
    rows, closed_loop, open_loop, environment, tmp_path
):
    """One dies building, one in the middle of its episodes, one is killed from outside."""
    alone = run_sweep(rows, closed_loop=closed_loop, open_loop=open_loop)
    building, driving, starts = tmp_path / "building", tmp_path / "driving", tmp_path / "starts"
    building.touch()
    driving.touch()
    mortal = [
        point_row("halved", 0.1, dies_building=str(building)),
        point_row("fp32", dies_at=str(driving)),
        rows[2],
    ]
    executor, killed = ProcessExecutor(2, seeds_per_job=3), []

    def kill_one(label, done, total):
        if "twin" in label and done == 4 and not killed:
            killed.extend(executor.pids)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with SimulatorPool(1, environment, {"starts": str(starts)}) as pool:
        watched = ClosedLoop(pool, TASKS, range(6), journals=tmp_path / "journals")
        survived = run_sweep(
            mortal,
            closed_loop=watched,
            open_loop=open_loop,
            progress=kill_one,
            executor=executor,
        )
    assert deterministic(survived) == deterministic(alone)
    assert killed and not building.exists() and not driving.exists()
    for journal in (tmp_path / "journals").iterdir():
        lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        keys = [(line["task"], line["seed"]) for line in lines]
        assert len(keys) == len(set(keys)) == 12
    # what the dead had begun was begun again: more starts than episodes
    assert len(starts.read_text().splitlines()) > 36


@pytest.mark.parametrize("first", ["alone", "together"])
def test_an_interrupted_sweep_continues_on_either_side(
    first, rows, closed_loop, open_loop, environment, tmp_path
):
    def stop(label, done, total):
        if "fp32" in label and done == 5:
            raise KeyboardInterrupt

    sides = {
        "alone": lambda: None,
        "together": lambda: WiredExecutor(seeds_per_job=4),
    }
    second = "together" if first == "alone" else "alone"
    starts = tmp_path / "starts"
    with SimulatorPool(1, environment, {"starts": str(starts)}) as pool:
        kept = ClosedLoop(pool, TASKS, range(6), journals=tmp_path / "journals")
        with pytest.raises(KeyboardInterrupt):
            run_sweep(
                rows, closed_loop=kept, open_loop=open_loop, progress=stop, executor=sides[first]()
            )
        starts.unlink()
        resumed = run_sweep(rows, closed_loop=kept, open_loop=open_loop, executor=sides[second]())
    alone = run_sweep(rows, closed_loop=closed_loop, open_loop=open_loop)
    assert deterministic(resumed) == deterministic(alone)
    assert len(starts.read_text().splitlines()) <= 36 - 5


def test_a_journal_of_another_comparison_is_refused(rows, closed_loop, tmp_path):
    kept = replace(closed_loop, journals=tmp_path, identity={"weights": "a"}, seeds=range(1))
    run_sweep(rows, closed_loop=kept, open_loop=None, executor=WiredExecutor())
    other = replace(kept, identity={"weights": "b"})
    with pytest.raises(ResumeError, match="weights"):
        run_sweep(rows, closed_loop=other, open_loop=None, executor=WiredExecutor())


def test_without_a_simulator_the_open_loop_half_runs(rows, open_loop):
    alone = run_sweep(rows, closed_loop=None, open_loop=open_loop)
    together = run_sweep(rows, closed_loop=None, open_loop=open_loop, executor=WiredExecutor())
    assert deterministic(together) == deterministic(alone)


def test_a_policy_is_built_once_per_worker_and_row(closed_loop, tmp_path):
    log = tmp_path / "log"
    rows = [point_row("fp32", log=str(log)), point_row("half", 0.5, log=str(log))]
    run_sweep(
        rows,
        closed_loop=closed_loop,
        open_loop=None,
        executor=ProcessExecutor(1, seeds_per_job=1),
    )
    assert len(log.read_text().splitlines()) <= 3  # fp32, half, and fp32 again if it had to wait


def test_a_row_begins_with_the_task_its_workers_simulators_stand_at(environment, tmp_path):
    """Becoming another task costs a simulator more than an episode of a small policy does."""
    starts = tmp_path / "starts"
    rows = [point_row("fp32"), point_row("half", 0.5), point_row("third", 0.3)]
    with SimulatorPool(1, environment, {"starts": str(starts)}) as pool:
        run_sweep(
            rows,
            closed_loop=ClosedLoop(pool, TASKS, range(4)),
            open_loop=None,
            executor=ProcessExecutor(1, seeds_per_job=2),
        )
    tasks = [line.split()[0] for line in starts.read_text().splitlines()]
    assert len(tasks) == 3 * 2 * 4
    changes = sum(before != after for before, after in pairwise(tasks))
    assert changes == 3, "once within each row, never between two"


def test_an_error_in_a_worker_arrives_with_its_kind_and_the_row(rows, open_loop):
    broken = [*rows, point_row("broken", fail=True)]
    with pytest.raises(PolicyError, match=r"point, broken, plain: no such policy"):
        run_sweep(broken, closed_loop=None, open_loop=open_loop, executor=WiredExecutor())


def test_a_job_that_kills_every_worker_is_named(rows, closed_loop):
    executor = WiredExecutor(deadly=lambda message: message.get("record", {}).get("seed") == 4)
    with pytest.raises(EvaluationError, match=r"fp32, plain, near, .* 5: 3 workers died.*signal 9"):
        run_sweep(rows[1:2], closed_loop=closed_loop, open_loop=None, executor=executor)


def test_a_worker_that_dies_after_its_last_episode_is_not_asked_again(rows, closed_loop):
    sent = []

    def deadly(message):
        sent.append(next(iter(message)))
        return "done" in message

    run_sweep(
        rows[1:2],
        closed_loop=closed_loop,
        open_loop=None,
        executor=WiredExecutor(deadly),
    )
    assert sent.count("record") == 12


def test_workers_of_another_version_are_refused(rows, open_loop):
    class Outdated(WiredExecutor):
        def request(self, job):
            request = super().request(job)
            return {**request, "versions": {**request["versions"], "torch": "0.4"}}

    executor = Outdated()
    with pytest.raises(ResourceError, match=r"torch .* here, 0\.4 there.*same versions"):
        run_sweep(rows, closed_loop=None, open_loop=open_loop, executor=executor)


def test_rows_that_cannot_be_built_elsewhere_are_refused(rows, closed_loop, open_loop):
    executor = WiredExecutor()
    lone = replace(rows[1], blueprint=None)
    with pytest.raises(PolicyError, match="blueprint"):
        run_sweep([lone], closed_loop=None, open_loop=open_loop, executor=executor)
    unknown = replace(rows[1], blueprint=Blueprint("nowhere:build", {}))
    with pytest.raises(PolicyError, match="nowhere:build"):
        run_sweep([unknown], closed_loop=None, open_loop=open_loop, executor=executor)


def test_an_executor_needs_a_worker():
    with pytest.raises(ValueError, match="at least one"):
        ProcessExecutor(0)
