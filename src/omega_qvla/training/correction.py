"""A second round of demonstrations, in the states the policy itself gets into (DAgger).

Imitation learners drift: a small error leads to a state no demonstration has shown.  Here the
half-trained policy acts, and every state it visits is labelled with the chunk the expert would
execute from there (S. Ross, G. Gordon, D. Bagnell, AISTATS 2011).  A share of the chunks is carried
out by the expert, so that episodes also reach what lies behind the policy's first mistake.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
from omega_qvla.policies.native import NativePolicy
from omega_qvla.training.demonstrations import (
    TRAINING_SEED,
    Array,
    Behaviour,
    Demonstrations,
    Samples,
    expert_for,
    record_episode,
    stack,
)

CORRECTION_SEED = TRAINING_SEED + 100_000
EXECUTE = 5
EXPERT_SHARE = 0.25


def policy_behaviour(policy: NativePolicy, seed: int) -> Behaviour:
    """The policy's actions, ``EXECUTE`` of each chunk; some chunks are left to the expert."""
    choice, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    planned: deque[Array | None] = deque()

    def act(env: MetaWorldEnv, expert: Array) -> Array:
        if not planned:
            if choice.random() < EXPERT_SHARE:
                planned.extend([None] * EXECUTE)
            else:
                planned.extend(policy.sample_actions(env.observe(), generator=noise)[:EXECUTE])
        action = planned.popleft()
        return expert if action is None else np.clip(action, -1.0, 1.0)

    return act


def collect_corrections(
    policy: NativePolicy,
    task: str,
    episodes: int,
    *,
    every: int = 3,
    max_steps: int = 130,
    seed: int = CORRECTION_SEED,
) -> Demonstrations:
    """Labelled states of ``episodes`` episodes in which the policy acts, solved or not."""
    env, expert = MetaWorldEnv(task), expert_for(task)
    kept: list[tuple[int, Samples]] = []
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        behaviour = policy_behaviour(policy, seed + episode)
        samples = record_episode(
            env, expert, behaviour, every, episode, max_steps=max_steps, needs_success=False
        )
        if samples is not None:
            kept.append((episode, samples))
    env.close()
    return stack(task, kept)
