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

Each episode is a line of ``OUT.episodes.jsonl`` as soon as it ends; a run that was cut short
continues from there with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    new_document,
    say,
    served,
)

import omega_qvla as oq
from omega_qvla.errors import ServingError
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.episodes import EpisodeRecord
from omega_qvla.evaluation.rollout import ACTION_LIMITS, chunk_noise, rollout, seed_groups
from omega_qvla.evaluation.simulators import SimulatorPool
from omega_qvla.serving.client import RemotePolicy
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

EXECUTE = 5
Answers = Callable[[Sequence[Any], Sequence[np.ndarray]], list[np.ndarray]]
Episode = tuple[str, str, int]
"""Arm, task, seed."""


# --- what answers ----------------------------------------------------------------------------


class Alone:
    """Answers one observation at a time and keeps the chunks, by the noise they started from.

    Args:
        answer: chunks for observations and noises.
        noise_shape: of one noise.
    """

    def __init__(self, answer: Answers, noise_shape: tuple[int, int]) -> None:
        self.noise_shape = noise_shape
        self._answer = answer
        self._chunks: dict[bytes, np.ndarray] = {}

    def sample_actions(self, observation: Any, noise: np.ndarray) -> np.ndarray:
        """One chunk."""
        return self.sample([observation], [noise])[0]

    def sample(self, observations: Sequence[Any], noises: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Several chunks."""
        chunks = self._answer(observations, noises)
        for noise, chunk in zip(noises, chunks, strict=True):
            self._chunks[noise.tobytes()] = np.asarray(chunk, np.float32)
        return chunks

    def executed(self, record: EpisodeRecord) -> np.ndarray:
        """The actions of an episode that has ended, [steps, action_dim]; they are forgotten."""
        chunks: list[np.ndarray] = []
        for number in range(record.chunks):
            noise = chunk_noise(record.seed, number, self.noise_shape)
            chunks.append(self._chunks.pop(noise.tobytes())[:EXECUTE])
        return np.clip(np.concatenate(chunks), *ACTION_LIMITS)[: record.steps]


class Together(Alone):
    """Answers several observations at once where the evaluation offers them."""

    @property
    def processor(self) -> Together:
        """Encodes."""
        return self

    def encode(self, observation: Any) -> Any:
        """As it is; whoever answers encodes."""
        return observation

    def sample_batch(
        self, observations: Sequence[Any], noises: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Several chunks."""
        return self.sample(observations, noises)


class WebsocketRobot:
    """One robot with openpi's protocol."""

    def __init__(self, port: int) -> None:
        self._policy = RemotePolicy(f"ws://127.0.0.1:{port}")
        self.artifact = self._policy.metadata["artifact"]

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
        told = self._call({"endpoint": "ping"})["metadata"]
        self.artifact = told["artifact"]
        specification = told["specification"]
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


FRONTS: dict[str, tuple[type[WebsocketRobot] | type[Gr00tRobot], tuple[str, ...]]] = {
    "websocket": (WebsocketRobot, ()),
    "gr00t": (Gr00tRobot, ("--protocol", "gr00t")),
}


@contextlib.contextmanager
def sampler_of(arm: str, artifact: Path, count: int, batches: Counter[int]) -> Iterator[Alone]:
    """What answers in an arm in which so many episodes advance together."""
    if arm.startswith("in-process"):
        policy = oq.load(artifact, threads=1)

        def compute(observations: Sequence[Any], noises: Sequence[np.ndarray]) -> list[np.ndarray]:
            batches[len(observations)] += 1
            encoded = [policy.processor.encode(one) for one in observations]
            return policy.sample_batch(encoded, noises)

        yield (Alone if count == 1 else Together)(compute, policy.noise_shape)
        return
    robot, arguments = FRONTS[arm.rsplit("-", 1)[0]]
    shape = oq.load(artifact, threads=1).noise_shape
    relaxed = ("--limits", "none", "--deadline-ms", "60000", "--batch", str(max(8, count)))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(artifact, *arguments, *relaxed))
        clients = [robot(server.port) for _ in range(count)]
        for client in clients:
            stack.callback(client.close)
        threads = stack.enter_context(ThreadPoolExecutor(len(clients)))

        def ask(observations: Sequence[Any], noises: Sequence[np.ndarray]) -> list[np.ndarray]:
            asking = [
                threads.submit(client.ask, *pair)
                for client, *pair in zip(clients, observations, noises, strict=False)
            ]
            answers = [one.result() for one in asking]
            batches.update(size for _, size in answers)
            return [chunk for chunk, _ in answers]

        yield Together(ask, shape)


# --- episodes that stay ----------------------------------------------------------------------


class Notebook:
    """Episodes that ended, one JSON line each; a torn last line is dropped.

    Raises:
        SystemExit: the file belongs to other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.episodes: dict[Episode, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        if lines and json.loads(lines[0]) != json.loads(json.dumps(settings)):
            raise SystemExit(f"{path} belongs to other settings; remove it or give another --out")
        path.write_text("".join(f"{line}\n" for line in lines or [json.dumps(settings)]))
        for line in lines[1:]:
            self._book(json.loads(line))

    def _book(self, episode: dict[str, Any]) -> None:
        self.episodes.setdefault((episode["arm"], episode["task"], episode["seed"]), episode)

    def append(self, episode: dict[str, Any]) -> None:
        """One more."""
        self._book(episode)
        with self._path.open("a") as file:
            file.write(json.dumps(episode) + "\n")


def together_in(arm: str, robots: int) -> int:
    """How many episodes advance together in an arm."""
    named = {"in-process": 1, "in-process-batched": robots}
    return named[arm] if arm in named else int(arm.rsplit("-", 1)[1])


def run_arm(
    arm: str,
    artifact: Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    robots: int,
    notebook: Notebook,
) -> None:
    """The episodes of an arm that are not in the notebook yet."""
    count = together_in(arm, robots)
    groups = {
        task: [
            group
            for group in seed_groups(seeds, count)
            if any((arm, task, seed) not in notebook.episodes for seed in group)
        ]
        for task in tasks
    }
    if not any(groups.values()):
        return
    batches: Counter[int] = Counter()
    with (
        sampler_of(arm, artifact, count, batches) as sampler,
        SimulatorPool(max(count, min(2, robots))) as pool,
    ):
        for task in tasks:
            missing = [seed for group in groups[task] for seed in group]

            def keep(record: EpisodeRecord) -> None:
                actions = sampler.executed(record)
                notebook.append(
                    {
                        "arm": arm,
                        "task": record.task,
                        "seed": record.seed,
                        "success": record.success,
                        "steps": record.steps,
                        "chunks": record.chunks,
                        "actions_sha256": hashlib.sha256(actions.tobytes()).hexdigest(),
                        "reruns": record.reruns,
                    }
                )
                say(f"{arm} {record.task} {record.seed}: {record.success}, {record.steps} steps")

            rollout(
                sampler,
                [task],
                missing,
                pool=pool,
                execute=EXECUTE,
                together=count,
                keep=keep,
            )
    say(f"{arm}: observations by size of their batch {dict(sorted(batches.items()))}")
    notebook.append(
        {
            "arm": f"{arm} batches",
            "task": "",
            "seed": len(notebook.episodes),
            "sizes": dict(batches),
        }
    )


def compared(
    arm: str, tasks: Sequence[str], seeds: Sequence[int], notebook: Notebook
) -> dict[str, Any]:
    """An arm against ``in-process``, episode by episode."""
    episodes: list[dict[str, Any]] = []
    for task in tasks:
        for seed in seeds:
            ours = notebook.episodes[arm, task, seed]
            reference = notebook.episodes["in-process", task, seed]
            same = {
                f"{name}_equal": ours[key] == reference[key]
                for name, key in (
                    ("success", "success"),
                    ("steps", "steps"),
                    ("actions_bit", "actions_sha256"),
                )
            }
            episodes.append(
                {"task": task, "seed": seed, "success": ours["success"], **same}
                | {"in_process_success": reference["success"]}
            )
    sizes: Counter[str] = Counter()
    for (name, _, _), line in notebook.episodes.items():
        if name == f"{arm} batches":
            sizes.update(line["sizes"])
    names = ("success_equal", "steps_equal", "actions_bit_equal")
    return {
        "episodes": len(episodes),
        "successes": sum(one["success"] for one in episodes),
        "in_process_successes": sum(one["in_process_success"] for one in episodes),
        **{name: sum(one[name] for one in episodes) for name in names},
        "batch_sizes": dict(sorted(sizes.items())),
        "per_episode": episodes,
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
    parser.add_argument("--recipe", default="omega-w4a4")
    parser.add_argument("--tasks", nargs="+", help="by default all of the policy's")
    parser.add_argument("--episodes", type=int, default=100, help="per task")
    parser.add_argument("--robots", type=int, default=4, help="at the same time")
    parser.add_argument("--fronts", nargs="+", choices=tuple(FRONTS), default=list(FRONTS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = options.tasks or benchmark_tasks(options.policy)
    seeds = range(options.episodes)
    counts = dict.fromkeys((1, options.robots))
    arms = ["in-process", "in-process-batched"]
    arms += [f"{front}-{count}" for front in options.fronts for count in counts]
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder), options.policy, options.recipe)
        settings = {
            "policy": options.policy,
            "artifact": oq.load(artifact, threads=1).content_hash,
            "execute": EXECUTE,
            "robots": options.robots,
        }
        notebook = Notebook(options.out.with_suffix(".episodes.jsonl"), settings)
        for arm in arms:
            run_arm(arm, artifact, tasks, seeds, options.robots, notebook)
    document = new_document({**settings, "tasks": tasks, "episodes": options.episodes})
    for arm in arms[1:]:
        part = compared(arm, tasks, seeds, notebook)
        document["parts"][arm] = part
        document["bars"] += bars_of(arm, part)
    finish(options.out, document)


if __name__ == "__main__":
    main()
