"""The same sweep on Ray; `make test-scale` installs it and runs what starts a real one."""

from __future__ import annotations

import json
import os
import socket
import sys

import numpy as np
import pytest
from fake_policy import PointPolicy

from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.evaluation.execution import ray_cluster
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, SweepRow
from omega_qvla.evaluation.execution.ray_cluster import RayExecutor
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.sweep import run_sweep

TASKS = ["near", "far"]


def point_row(recipe, gain=1.0, **arguments):
    return SweepRow(
        "point",
        recipe,
        lambda _: Built(PointPolicy(gain), Footprint(7, int(100 * gain))),
        blueprint=Blueprint("fake_policy:build", {"gain": gain, **arguments}),
    )


def deterministic(document):
    rows = [row.model_copy(update={"ms_per_chunk": None}) for row in document.rows]
    return document.model_copy(update={"rows": rows})


@pytest.fixture
def ray(monkeypatch):
    """Ray's processes find the tests' own modules."""
    found = pytest.importorskip("ray", reason="Ray is not installed: make test-scale")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return found


@pytest.mark.scale
def test_a_worker_killed_on_ray_loses_nothing_and_counts_nothing_twice(ray, environment, tmp_path):
    """Two workers; one is killed building a policy, one in the middle of its episodes."""
    generator = np.random.default_rng(5)
    open_loop = OpenLoop([{"state": generator.uniform(-2, 2, 3)} for _ in range(4)], seed=1)
    healthy = [point_row("fp32"), point_row("halved", 0.1)]
    building, driving, starts = tmp_path / "building", tmp_path / "driving", tmp_path / "starts"
    building.touch()
    driving.touch()
    mortal = [
        point_row("fp32", dies_at=str(driving)),
        point_row("halved", 0.1, dies_building=str(building)),
    ]
    with SimulatorPool(1, environment) as pool:
        alone = run_sweep(
            healthy, closed_loop=ClosedLoop(pool, TASKS, range(4)), open_loop=open_loop
        )
    seen = []
    with SimulatorPool(1, environment, {"starts": str(starts)}) as pool:
        survived = run_sweep(
            mortal,
            closed_loop=ClosedLoop(pool, TASKS, range(4), journals=tmp_path / "journals"),
            open_loop=open_loop,
            progress=lambda *report: seen.append(report),
            executor=RayExecutor("local", cores=2, seeds_per_job=4),
        )
    assert deterministic(survived) == deterministic(alone)
    assert not building.exists() and not driving.exists()
    assert len(starts.read_text().splitlines()) > 16
    for row in healthy:
        assert [done for label, done, _ in seen if label == row.label] == list(range(9))
    for journal in (tmp_path / "journals").iterdir():
        lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        keys = [(line["task"], line["seed"]) for line in lines]
        assert len(keys) == len(set(keys)) == 8
    assert not ray.is_initialized()


@pytest.mark.scale
def test_an_error_on_ray_arrives_with_its_kind(ray):
    row = point_row("fp32", fail=True)
    with pytest.raises(PolicyError, match="point, fp32, plain: no such policy"):
        run_sweep(
            [row],
            closed_loop=None,
            open_loop=OpenLoop([{"state": np.ones(3)}]),
            executor=RayExecutor("local", cores=1),
        )


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"pip install 'ray>="):
        RayExecutor("local")


class _Ray:
    """As much of Ray as joining a cluster needs."""

    def __init__(self, error):
        self._error = error

    def init(self, **_):
        raise self._error


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), "ray start --head"),
        (
            "auto",
            RuntimeError("Version mismatch:\n  Ray: 2.1\n  Ray: 2.2"),
            "Version mismatch: Ray",
        ),
        ("ray://head:10001", None, "machine of the cluster"),
        ("head", None, "HOST:PORT"),
        ("head:0x7", None, "HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_clear_message(address, error, told, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: _Ray(error))
    with pytest.raises(ResourceError, match=told) as caught:
        RayExecutor(address)
    assert "\n" not in str(caught.value)


def test_an_address_where_nothing_listens_is_found_out_at_once(monkeypatch):
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: _Ray(AssertionError("asked Ray first")))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}"):
            RayExecutor(f"127.0.0.1:{port}")
