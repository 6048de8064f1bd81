"""A policy that answers late, in closed loop: waiting, switching, blending, real-time chunking.

    python benchmarks/real_time_chunking.py --out out/real-time-chunking.json --episodes 10

The simulator does not wait for a policy, so a delay is counted in its control steps: an observation
is made at step k, its chunk is there at step k + delay.  What the robot does meanwhile is the mode:

* ``waiting``: it holds still while a chunk is computed, then carries out the chunk from its first
  action on;
* ``switching``: it goes on with the chunk before, and takes the new one as soon as it is there;
* ``blending``: the same, but over two steps from one chunk to the other;
* ``real-time``: the same as switching, and the new chunk continues the old one.

Robots are the client's own bookkeeping (``ActionQueue``) in front of the evaluation's own episodes
(``rollout``): every chunk is asked for with what ``drive`` would send.  A chunk is asked for every
five steps, or every ``delay`` steps where that is more, since one is computed at a time.  A step
without a planned action holds still, which in Meta-World is a zero action.  The first chunk of an
episode is waited for in every mode.  Observations, noises and seeds are paired over all cells.

Each cell (policy, precision, delay, mode) has a journal in ``OUT.episodes/``.  A run that was cut
short continues with the same command; a larger ``--episodes`` adds to what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_kit import build_artifact, new_document, say

import omega_qvla as oq
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.rollout import chunk_noise, rollout
from omega_qvla.evaluation.simulators.metaworld_tasks import ACTION_DIM
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.files import write_json
from omega_qvla.policies.native import NativePolicy
from omega_qvla.real_time_chunking import LeftOver
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.statistics import relative_smoothness, wilson_interval
from omega_qvla.serving.client.action_queue import ActionQueue, Blending

POLICIES = ("builtin:tiny-pi05", "builtin:tiny-gr00t")
PRECISIONS = ("full precision", DEFAULT_RECIPE)
MODES = ("waiting", "switching", "blending", "real-time")
EXECUTE = 5
"""Steps between two questions, as everywhere in this project."""
STILL = np.zeros(ACTION_DIM, np.float32)
BLENDED_TICKS = {"switching": 0, "blending": 2, "real-time": 0}
GRIPPER = ACTION_DIM - 1

Array = Any


# --- robots ----------------------------------------------------------------------------------


class WaitingRobot:
    """Holds still while a chunk is computed."""

    def __init__(self, delay: int) -> None:
        self._delay = delay
        self.steps = delay + EXECUTE

    def left_over(self) -> LeftOver | None:
        """Nothing: a chunk begins anew."""
        return None

    def plan(self, chunk: Array) -> Array:
        """What it does until it asks again, [steps, action_dim]."""
        return np.concatenate((np.tile(STILL, (self._delay, 1)), chunk[:EXECUTE]))


class MovingRobot:
    """Goes on with the chunk before until the new one is there."""

    def __init__(self, delay: int, mode: str) -> None:
        self._delay, self._guided = delay, mode == "real-time"
        self.steps = max(EXECUTE, delay)
        hold = tuple(STILL.tolist())
        ticks = BLENDED_TICKS[mode]
        self._queue = ActionQueue(Blending(ticks, (GRIPPER,), late="hold", hold_action=hold))
        self._tick = 0

    def left_over(self) -> LeftOver | None:
        """What a guided chunk continues."""
        planned = self._queue.left_over(self._tick) if self._guided else None
        return None if planned is None else LeftOver(planned, min(self._delay, len(planned)))

    def plan(self, chunk: Array) -> Array:
        """What it does until it asks again, [steps, action_dim]."""
        there = self._tick + self._delay
        # It stands still until the first chunk is there, whose observation is then still true.
        observed = self._tick if self._tick else there
        done: list[Array] = []
        for tick in range(self._tick, self._tick + self.steps):
            if tick == there:
                self._queue.merge(chunk, observed, tick)
            done.append(self._queue.next(tick)[0])
        if there == self._tick + self.steps:
            self._queue.merge(chunk, observed, there)
        self._tick += self.steps
        return np.stack(done)


def robot_of(mode: str, delay: int) -> WaitingRobot | MovingRobot:
    """A robot at the beginning of an episode."""
    return WaitingRobot(delay) if mode == "waiting" else MovingRobot(delay, mode)


class LatePolicy:
    """A policy as robots see it whose chunks are late; answers what ``rollout`` asks.

    The noise of a chunk is a function of (seed, number), so it says which episode asks.

    Args:
        policy: answers at once.
        mode, delay: of the robots.
        seeds: of all episodes.
    """

    def __init__(self, policy: NativePolicy, mode: str, delay: int, seeds: Sequence[int]) -> None:
        self._policy, self._mode, self._delay = policy, mode, delay
        self._horizon, width = policy.noise_shape
        # What robots do between two questions may be longer than a chunk; the first rows of a
        # larger noise are the smaller one.
        self.noise_shape = max(self._horizon, robot_of(mode, delay).steps), width
        self._expected = {self._noise(seed, 0): (seed, 0) for seed in seeds}
        self._robots: dict[int, WaitingRobot | MovingRobot] = {}

    def _noise(self, seed: int, number: int) -> bytes:
        return chunk_noise(seed, number, self.noise_shape).tobytes()

    def _robot(self, noise: np.ndarray) -> WaitingRobot | MovingRobot:
        seed, number = self._expected[noise.tobytes()]
        if number == 0:
            self._robots[seed] = robot_of(self._mode, self._delay)
        self._expected[self._noise(seed, number + 1)] = seed, number + 1
        return self._robots[seed]

    def encode(self, observation: Any) -> Any:
        """As it is: what it continues is known only with its noise."""
        return observation

    def sample_actions(self, observation: Any, noise: Any = None) -> Array:
        """What one robot does until it asks again."""
        return self.sample_batch([observation], [noise])[0]

    def sample_batch(self, observations: Sequence[Any], noises: Sequence[Any]) -> list[Array]:
        """What several robots do until they ask again."""
        robots = [self._robot(noise) for noise in noises]
        pairs = zip(observations, robots, strict=True)
        encoded = [self._policy.encode(seen, robot.left_over()) for seen, robot in pairs]
        chunks = self._policy.sample_batch(encoded, [noise[: self._horizon] for noise in noises])
        return [robot.plan(chunk) for robot, chunk in zip(robots, chunks, strict=True)]


# --- cells -----------------------------------------------------------------------------------


def run_cell(
    policy: NativePolicy,
    identity: Mapping[str, Any],
    tasks: Sequence[str],
    episodes: int,
    pool: SimulatorPool,
    journal: Path,
) -> list[EpisodeRecord]:
    """The episodes of one cell, those of the journal included."""
    mode, delay, seeds = identity["mode"], identity["delay"], range(episodes)
    name = f"{identity['policy']}, {identity['recipe']}, delay {delay}, {mode}"
    return rollout(
        LatePolicy(policy, mode, delay, seeds),
        tasks,
        seeds,
        pool=pool,
        execute=robot_of(mode, delay).steps,
        together=pool.workers,
        journal=journal,
        identity=identity,
        progress=lambda done, total: say(f"{name}: {done} of {total} episodes"),
    )


def cell_of(identity: Mapping[str, Any], records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """What the document says of a cell."""
    successes = sum(record.success for record in records)
    solved = [record.steps for record in records if record.success]
    jerk = [record.jerk for record in records if record.jerk is not None]
    return {
        **identity,
        "episodes": len(records),
        "successes": successes,
        "ci95": wilson_interval(successes, len(records)),
        "jerk": statistics.fmean(jerk),
        "steps_of_solved": statistics.fmean(solved) if solved else None,
        "per_episode": [
            {key: getattr(record, key) for key in ("task", "seed", "success", "steps", "jerk")}
            for record in records
        ],
    }


def jerk_ratio(cell: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    """Jerk of a cell over that of another one, on the episodes that both have."""
    other = {(one["task"], one["seed"]): one["jerk"] for one in reference["per_episode"]}
    pairs = [
        (one["jerk"], other[one["task"], one["seed"]])
        for one in cell["per_episode"]
        if (one["task"], one["seed"]) in other
    ]
    return relative_smoothness(*zip(*pairs, strict=True)) if pairs else None


def table(document: Mapping[str, Any]) -> str:
    """The document's cells in Markdown, one row per policy, precision and delay."""
    cells = {
        (cell["delay"], cell["policy"], cell["recipe"], cell["mode"]): cell
        for cell in document["cells"]
    }
    lines = [
        f"| delay | policy | precision | {' | '.join(MODES)} |",
        f"|---|---|---|{'---|' * len(MODES)}",
    ]
    for delay, policy, recipe in sorted({key[:3] for key in cells}):
        row = [cells.get((delay, policy, recipe, mode)) for mode in MODES]
        shown = [_shown(cell, cells.get((delay, policy, recipe, "switching"))) for cell in row]
        name = policy.removeprefix("builtin:")
        lines.append(f"| {delay} | {name} | {recipe} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(cell: Mapping[str, Any] | None, switching: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    low, high = (100 * bound for bound in cell["ci95"])
    ratio = None if switching is None else jerk_ratio(cell, switching)
    jerk = "–" if ratio is None else f"{ratio:.2f}"
    return f"{cell['successes']}/{cell['episodes']} ({low:.0f}–{high:.0f} %), {jerk}"


# --- run -------------------------------------------------------------------------------------


def load(policy: str, recipe: str, folder: Path) -> tuple[NativePolicy, str | None]:
    """A policy and the content hash of its artifact, which is made where it is absent."""
    if recipe == PRECISIONS[0]:
        return oq.load_policy(policy), None
    place = folder / policy.rpartition(":")[2]
    if not (place / "artifact").exists():
        say(f"{policy}: quantizing with {recipe}")
        build_artifact(place, policy, recipe)
    quantized = oq.load(place / "artifact", threads=1)
    assert isinstance(quantized.policy, NativePolicy)
    return quantized.policy, quantized.content_hash


def main() -> None:
    """Run what is missing and write the document after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="builtin:NAME")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--delays", nargs="+", type=int, default=[4, 2, 6], help="control steps")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--episodes", type=int, default=100, help="per task")
    parser.add_argument("--together", type=int, default=5, help="episodes in one pass")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of --out, run none")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(1)
    work = options.out.with_suffix(".episodes")
    document = new_document({"execute": EXECUTE, "together": options.together})
    del document["parts"], document["bars"]
    document["cells"] = []
    if options.out.exists():
        document["cells"] = json.loads(options.out.read_text())["cells"]
    told = ["FILE" if word == str(options.out) else word for word in sys.argv]
    document["command"] = shlex.join(["python", *told])
    kept = {cell["name"]: cell for cell in document["cells"]}
    with SimulatorPool(options.together) as pool:
        for delay, policy, precision in itertools.product(
            options.delays, options.policies, options.precisions
        ):
            sampled, artifact = load(policy, precision, work / "artifacts")
            for mode in options.modes:
                name = f"{policy.rpartition(':')[2]}, {precision}, delay {delay}, {mode}"
                identity = {
                    "policy": policy,
                    "recipe": precision,
                    "condition": "plain",
                    "artifact": artifact,
                    "delay": delay,
                    "mode": mode,
                }
                journal = work / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
                tasks = benchmark_tasks(policy)
                records = run_cell(sampled, identity, tasks, options.episodes, pool, journal)
                kept[name] = {"name": name, **cell_of(identity, records)}
                document["cells"] = list(kept.values())
                write_json(document, options.out)
    print(table(document))


if __name__ == "__main__":
    main()
