"""What the robot did: the path of its hand and a film strip, policy beside policy on one seed.

A run is an ordinary episode of :func:`~omega_qvla.evaluation.rollout.rollout`, with the seed, the
noise and the observations that an evaluation would give it; only the chunks the policy answered are
remembered.  Their first ``execute`` actions, clipped to the limits of the environment, are carried
out again (``replay.py``) to see where the hand was after every step and what the scene looked like.
A replay that does not end as the episode did is an error, never a picture of something else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import PolicyError, SimulatorUnavailable
from omega_qvla.evaluation.openloop import Sampler
from omega_qvla.evaluation.rollout import (
    MAX_DEATHS,
    EvaluationError,
    rollout,
)
from omega_qvla.evaluation.simulators.channel import ChannelError
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.simulators.replay import REPLAY, SOLVED
from omega_qvla.results.episodes import EpisodeRecord

FRAMES = 8
"""Pictures of a film strip, the first and the last moment included."""
EXECUTE = 5
"""Actions carried out of each chunk, as in evaluations."""
_DECIMALS = 4
"""Positions are kept to a tenth of a millimetre."""

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Episode:
    """One episode of one policy, with the actions it planned, float32 [steps, action_dim]."""

    record: EpisodeRecord
    actions: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Track:
    """An episode as it was seen when carried out again.

    Attributes:
        episode: what was carried out.
        positions: of the hand before the first action and after every one, [steps + 1, 3].
        frames: (step, image uint8 [H, W, 3]) in order.
    """

    episode: Episode
    positions: Array
    frames: Sequence[tuple[int, Array]]


class _Recorder:
    """A policy that remembers its answers."""

    def __init__(self, policy: Sampler) -> None:
        self._policy = policy
        self.noise_shape = policy.noise_shape
        self.chunks: list[Array] = []

    def sample_actions(self, observation: Any, noise: Any = None) -> Any:
        chunk = self._policy.sample_actions(observation, noise=noise)
        self.chunks.append(np.array(chunk, dtype=np.float32))
        return chunk


def run_episode(
    policy: Sampler, task: str, seed: int, pool: SimulatorPool, *, execute: int = EXECUTE
) -> Episode:
    """Run one episode and keep its actions.

    Raises:
        As :func:`~omega_qvla.evaluation.rollout.rollout`.
    """
    recorder = _Recorder(policy)
    (record,) = rollout(recorder, [task], [seed], pool=pool, execute=execute)
    # Where a simulator died, the chunks of the attempts before are remembered as well.
    chunks = recorder.chunks[-record.chunks :]
    actions = np.concatenate([chunk[:execute] for chunk in chunks])
    return Episode(record, actions[: record.steps])


def replay(episode: Episode, pool: SimulatorPool, *, frames: int = 0) -> Track:
    """Carry a episode out again.

    Args:
        episode: what to carry out.
        pool: from :func:`replay_pool`.
        frames: how many pictures to keep, evenly spread.

    Raises:
        EvaluationError: the replay ends otherwise than the episode did, or the simulator died
            ``MAX_DEATHS`` times.
    """
    for _ in range(MAX_DEATHS):
        (simulator,) = pool.idle((), 1)[:1]
        try:
            pool.start(simulator, episode.record.task, episode.record.seed)
            return _carry_out(episode, simulator, frames)
        except ChannelError:
            pool.discard(simulator)
    raise EvaluationError(
        f"{_name(episode)}: {MAX_DEATHS} simulator processes died while it was carried out again"
    )


def replay_pool(
    environment: str, options: Mapping[str, Any], *, timeout_s: float = 300.0
) -> SimulatorPool:
    """One simulator process for :func:`replay`.

    Args:
        environment: factory as ``module:callable``, the one the episodes took place in.
        options: its keyword arguments; images may be larger than the policy's.
        timeout_s: a simulator silent for longer counts as dead.
    """
    wrapped = {"environment": environment, "options": dict(options)}
    return SimulatorPool(1, REPLAY, wrapped, timeout_s=timeout_s)


def compare_tracks(
    policies: Mapping[str, Sampler],
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    environment: str,
    replay_options: Mapping[str, Any],
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Every policy on every task and seed, and pictures of the most telling episode.

    The film shows the first task and seed on which the policies end differently, or the first of
    all where they never do.

    Args:
        policies: by recipe, full precision first.
        tasks, seeds: the episodes.
        environment: factory as ``module:callable``.
        replay_options: its keyword arguments when pictures are taken.
        progress: called with (episodes done, all).

    Returns:
        ``rollouts`` of a diagnostics document (docs/json.md).

    Raises:
        As :func:`run_episode` and :func:`replay`.
    """
    cases = [(task, seed) for task in tasks for seed in seeds]
    total, done = len(cases) * len(policies), 0
    episodes: dict[tuple[str, int], dict[str, Episode]] = {}
    with SimulatorPool(1, environment) as pool:
        for task, seed in cases:
            mine = episodes[task, seed] = {}
            for recipe, policy in policies.items():
                progress(done, total)
                mine[recipe] = run_episode(policy, task, seed, pool)
                done += 1
    progress(done, total)
    told = _most_telling(episodes)
    tracks: list[dict[str, Any]] = []
    films: list[dict[str, Any]] = []
    with replay_pool(environment, replay_options) as pool:
        for case, mine in episodes.items():
            for recipe, episode in mine.items():
                track = replay(episode, pool, frames=FRAMES if case == told else 0)
                tracks.append(describe_track(track, recipe))
                if track.frames:
                    films.append(describe_film(track, recipe))
    return {
        "environment": environment,
        "execute": EXECUTE,
        "episodes": tracks,
        "films": films,
    }


def _most_telling(
    episodes: Mapping[tuple[str, int], Mapping[str, Episode]],
) -> tuple[str, int] | None:
    for case, mine in episodes.items():
        if len({episode.record.success for episode in mine.values()}) > 1:
            return case
    return next(iter(episodes), None)


def describe_track(track: Track, recipe: str) -> dict[str, Any]:
    """A track as an entry of ``rollouts.episodes`` (docs/json.md)."""
    record = track.episode.record
    return {
        "recipe": recipe,
        "task": record.task,
        "seed": record.seed,
        "success": record.success,
        "steps": record.steps,
        "positions": np.round(track.positions, _DECIMALS).tolist(),
    }


def describe_film(track: Track, recipe: str) -> dict[str, Any]:
    """A track's pictures as an entry of ``rollouts.films`` (docs/json.md)."""
    record = track.episode.record
    return {
        "recipe": recipe,
        "task": record.task,
        "seed": record.seed,
        "success": record.success,
        "frames": [
            {"step": step, "png": base64.b64encode(_png(image)).decode("ascii")}
            for step, image in track.frames
        ],
    }


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    """The PNG file of an image, uint8 [H, W, 3]."""
    from PIL import Image  # comes with the simulator that rendered it

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def _carry_out(episode: Episode, simulator: Any, frames: int) -> Track:
    steps = len(episode.actions)
    wanted = set(np.linspace(0, steps, frames).round().astype(int).tolist()) if frames else set()
    positions: list[Array] = []
    kept: list[tuple[int, Array]] = []
    observation: Mapping[str, Any] = {}
    actions = episode.actions
    for step in range(steps + 1):
        if step:
            simulator.request({"actions": actions[step - 1 : step]})
        reply = simulator.channel.receive()
        if "error" in reply:
            if reply["error"]["kind"] == "unavailable":
                raise SimulatorUnavailable(reply["error"]["message"])
            raise EvaluationError(
                f"{_name(episode)}: the simulator failed when it was carried out again: "
                f"{reply['error']['message']}"
            )
        if not step:
            actions = np.clip(actions, reply["low"], reply["high"])
        observation = reply["observation"]
        positions.append(_hand(observation))
        if step in wanted:
            kept.append((step, np.array(next(iter(observation["images"].values())))))
    if bool(observation[SOLVED]) != episode.record.success:
        raise EvaluationError(
            f"{_name(episode)}: carried out again it was "
            f"{'solved' if observation[SOLVED] else 'not solved'}, the episode was not so: the "
            "simulator does not repeat itself, its pictures would show something else"
        )
    return Track(episode, np.stack(positions), kept)


def _hand(observation: Mapping[str, Any]) -> Array:
    state = np.asarray(observation["state"], dtype=np.float64)
    if state.ndim != 1 or state.shape[0] < 3:
        raise PolicyError(
            f"the state has shape {list(state.shape)}; its first three numbers should be the "
            "position of the hand"
        )
    return state[:3]


def _name(episode: Episode) -> str:
    return f"{episode.record.task}, seed {episode.record.seed}"
