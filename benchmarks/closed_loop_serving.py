"""Closed loop through the socket against closed loop in process, episode by episode.

    python benchmarks/closed_loop_serving.py --policy builtin:tiny-pi05 --out results.json

The same artifact runs the same (task, seed) episodes in several *arms*:

* ``in-process``: every observation alone, the reference;
* ``in-process-batched``: as many episodes as robots share each pass (``rollout.py``);
* ``websocket-N``, ``gr00t-N``: N robots, each with a connection of its own, ask a server at the
  same time, which batches whatever waits.

The noise of every chunk is a function of (seed, chunk) and travels with the request, so a robot
alone (N = 1) must get bit for bit what it gets in process.  With several robots floating-point sums
may be ordered by the size of the batch, and which observations share a batch is a matter of
microseconds: there it is counted how many episodes executed bit-equal actions and how many ended
the same, and ``in-process-batched`` says what the size of the batch does without any socket.

Each arm has a journal of its own in ``OUT.episodes/``, in which an episode is as soon as it ends; a
run that was cut short continues from there with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq
from serving_kit import (
    POLICY,
    at_least,
    build_artifact,
    finish,
    measure_missing,
    resumed,
    say,
    served,
)

import omega_qvla as oq
from omega_qvla.errors import ServingError
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.rollout import rollout
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.serving.client import RemotePolicy
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

EXECUTE = 5
REFERENCE = "in-process"


# --- what answers ----------------------------------------------------------------------------


class WebsocketRobot:
    """One robot with openpi's protocol."""

    def __init__(self, port: int) -> None:
        self._policy = RemotePolicy(f"ws://127.0.0.1:{port}")
        self.noise_shape = self._policy.noise_shape

    def ask(self, observation: Mapping[str, Any], noise: np.ndarray) -> tuple[np.ndarray, int]:
        """A chunk, and how many observations shared its pass."""
        named = {key: observation[key] for key in ("images", "state", "prompt")}
        reply = self._policy.infer(named, noise=noise)
        return reply["actions"], reply["batch"]

    def close(self) -> None:
        """End the connection."""
        self._policy.close()


class Gr00tRobot:
    """One robot with GR00T's protocol, which names parts of state and action."""

    def __init__(self, port: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 120_000)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        specification = self._call({"endpoint": "ping"})["metadata"]["specification"]
        self.noise_shape = tuple(specification["noise_shape"])
        self._state = specification["state_parts"] or [["state", specification["state_dim"]]]
        self._actions = specification["action_parts"] or [["action", specification["action_dim"]]]

    def ask(self, observation: Mapping[str, Any], noise: np.ndarray) -> tuple[np.ndarray, int]:
        """A chunk, and how many observations shared its pass."""
        ends = np.cumsum([width for _, width in self._state])[:-1]
        pieces = np.split(np.asarray(observation["state"], np.float32), ends)
        data = {f"video.{name}": image[None] for name, image in observation["images"].items()}
        data |= {f"state.{n}": p[None] for (n, _), p in zip(self._state, pieces, strict=True)}
        data |= {"annotation.task": [observation["prompt"]], "noise": noise, "meta": True}
        reply = self._call({"endpoint": "get_action", "data": data})
        parts = [reply[f"action.{name}"] for name, _ in self._actions]
        return np.concatenate(parts, axis=1), reply["meta"]["batch"]

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        self._socket.send(encode(request, gr00t_array))
        reply = decode_map(self._socket.recv())
        if "error" in reply:
            raise ServingError(str(reply.get("code")), str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
        self._context.term()


PROTOCOLS: dict[str, tuple[type[WebsocketRobot] | type[Gr00tRobot], tuple[str, ...]]] = {
    "websocket": (WebsocketRobot, ()),
    "gr00t": (Gr00tRobot, ("--protocol", "gr00t")),
}


class Robots:
    """Robots that ask a server at the same time, as one policy.

    Args:
        robots: each with a connection of its own.
        threads: as many.

    Attributes:
        batches: answers by how many observations shared their pass.
    """

    def __init__(
        self, robots: Sequence[WebsocketRobot | Gr00tRobot], threads: ThreadPoolExecutor
    ) -> None:
        self.noise_shape = robots[0].noise_shape
        self.batches: Counter[int] = Counter()
        self._robots, self._threads = robots, threads

    @property
    def processor(self) -> Robots:
        """The server encodes."""
        return self

    def encode(self, observation: Any) -> Any:
        """As it is."""
        return observation

    def sample_actions(self, observation: Any, noise: np.ndarray) -> np.ndarray:
        """One chunk."""
        return self.sample_batch([observation], [noise])[0]

    def sample_batch(
        self, observations: Sequence[Any], noises: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Several chunks, each asked by a robot of its own."""
        asking = [
            self._threads.submit(robot.ask, *pair)
            for robot, *pair in zip(self._robots, observations, noises, strict=False)
        ]
        answers = [one.result() for one in asking]
        self.batches.update(size for _, size in answers)
        return [chunk for chunk, _ in answers]


@contextlib.contextmanager
def robots_of(protocol: str, artifact: Path, count: int) -> Iterator[Robots]:
    """So many robots of a protocol, and their server, for the length of a block."""
    robot, arguments = PROTOCOLS[protocol]
    relaxed = ("--limits", "none", "--deadline-ms", "60000", "--batch", str(max(8, count)))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(artifact, *arguments, *relaxed))
        clients = [robot(server.port) for _ in range(count)]
        for client in clients:
            stack.callback(client.close)
        yield Robots(clients, stack.enter_context(ThreadPoolExecutor(count)))


# --- arms ------------------------------------------------------------------------------------


def run_arm(
    arm: str,
    artifact: Path,
    tasks: Sequence[str],
    episodes: int,
    robots: int,
    journal: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The episodes of an arm, and how many observations shared the server's passes.

    What the journal holds already is not run again, and not in ``batch_sizes`` either.
    """
    named = {REFERENCE: 1, f"{REFERENCE}-batched": robots}
    protocol, _, number = arm.rpartition("-")
    count = named[arm] if arm in named else int(number)
    with contextlib.ExitStack() as stack:
        if arm in named:
            policy, sizes = oq.load(artifact, threads=1), None
        else:
            policy = stack.enter_context(robots_of(protocol, artifact, count))
            sizes = policy.batches
        pool = stack.enter_context(SimulatorPool(max(count, min(2, robots))))
        records = rollout(
            policy,
            tasks,
            range(episodes),
            pool=pool,
            execute=EXECUTE,
            together=count,
            journal=journal,
            identity={"arm": arm, **settings},
            progress=lambda done, total: say(f"{arm}: {done} of {total} episodes"),
        )
    part: dict[str, Any] = {} if sizes is None else {"batch_sizes": dict(sorted(sizes.items()))}
    kept = ("task", "seed", "success", "steps", "actions_sha256")
    return {**part, "per_episode": [{key: getattr(one, key) for key in kept} for one in records]}


def compared(part: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """An arm against ``in-process``, episode by episode."""
    pairs = list(zip(part["per_episode"], reference["per_episode"], strict=True))
    keys = {"success": "success", "steps": "steps", "actions_bit": "actions_sha256"}
    return {
        "episodes": len(pairs),
        "successes": sum(ours["success"] for ours, _ in pairs),
        "in_process_successes": sum(theirs["success"] for _, theirs in pairs),
        **{
            f"{name}_equal": sum(ours[key] == theirs[key] for ours, theirs in pairs)
            for name, key in keys.items()
        },
    }


def bars_of(arm: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    """Every episode through a socket must end as in process; a robot's alone, bit for bit."""
    if arm.startswith("in-process"):
        return []
    bars = [
        at_least(f"{arm}: episodes with equal success", part["success_equal"], part["episodes"])
    ]
    if arm.endswith("-1"):
        equal = part["actions_bit_equal"]
        bars.append(at_least(f"{arm}: episodes with bit-equal actions", equal, part["episodes"]))
    return bars


def main() -> None:
    """Run what is missing of every arm and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default=POLICY, help="builtin:NAME")
    parser.add_argument("--artifact", type=Path, help="of it; quantized first if absent")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--tasks", nargs="+", help="by default all of the policy's")
    parser.add_argument("--episodes", type=int, default=100, help="per task")
    parser.add_argument("--robots", type=int, default=4, help="at the same time")
    parser.add_argument("--protocols", nargs="+", choices=tuple(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = list(options.tasks or benchmark_tasks(options.policy))
    counts = dict.fromkeys((1, options.robots))
    arms = [REFERENCE, f"{REFERENCE}-batched"]
    arms += [f"{protocol}-{count}" for protocol in options.protocols for count in counts]
    journals = options.out.with_suffix(".episodes")
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder), options.policy, options.recipe)
        content = oq.load(artifact, threads=1).content_hash
        settings = {"policy": options.policy, "artifact": content, "robots": options.robots}
        fixed = {**settings, "execute": EXECUTE, "tasks": tasks, "episodes": options.episodes}
        document = resumed(options.out, {**fixed, "arms": arms})
        experiments = {
            arm: functools.partial(
                run_arm,
                arm,
                artifact,
                tasks,
                options.episodes,
                options.robots,
                journals / f"{arm}.jsonl",
                settings,
            )
            for arm in arms
        }
        parts = measure_missing(options.out, document, experiments)
    document["bars"] = []
    for arm in arms[1:]:
        parts[arm] |= compared(parts[arm], parts[REFERENCE])
        document["bars"] += bars_of(arm, parts[arm])
    finish(options.out, document)


if __name__ == "__main__":
    main()
