"""What training has to know of each family of policies, and nothing else does.

Conventions are each original's: pi0.5 normalizes by 1 % and 99 % quantiles and reads the state from
the prompt as 256-bin integers; GR00T N1.5 normalizes by minima and maxima and has a token for the
state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor
from omega_qvla.policies.own_layout import write_own
from omega_qvla.policies.pi05.checkpoints.openpi import write_openpi
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Quantiles, Range
from omega_qvla.policies.processing.prompts import discretize_state, format_prompt
from omega_qvla.policies.processing.tokenizers import WordTokenizer
from omega_qvla.training.dataset import Processor, PromptText
from omega_qvla.training.demonstrations import HORIZON, Demonstrations
from omega_qvla.training.gr00t_learner import Gr00tLearner, initialize_gr00t
from omega_qvla.training.learner import Learner
from omega_qvla.training.pi05_learner import Pi05Learner, initialize_pi05

STATE_FLOOR, ACTION_FLOOR = 0.05, 0.5
"""Least range of a dimension (m, action units): no blow-up of one that hardly moves."""


@dataclass(frozen=True)
class TrainedFamily:
    """What training has to know of one family of policies.

    Attributes:
        processor: demonstrations → statistics and vocabulary fitted on them, and the network's
            sizes.
        text: the prompt.
        learner: a processor and a seed → a network with weights to start from.
        policy: a processor → a policy whose weights are not filled in yet.
        write: the policy and a directory that ``load_policy`` reads afterwards.
    """

    processor: Callable[[Sequence[Demonstrations]], Processor]
    text: PromptText
    learner: Callable[[Any, int], Learner]
    policy: Callable[[Any], Pi05Policy | Gr00tN15Policy]
    write: Callable[[Any, Path], None]


def widened(low: np.ndarray, high: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [n], moved apart symmetrically to at least ``floor``."""
    widen = np.maximum(floor - (high - low), 0.0) / 2.0
    return low - widen, high + widen


def fit_quantiles(values: np.ndarray, floor: float) -> Quantiles:
    """1 % and 99 % quantiles of [N, n]."""
    low, high = np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0)
    low, high = widened(low, high, floor)
    return Quantiles(q01=tuple(map(float, low)), q99=tuple(map(float, high)))


def fit_range(values: np.ndarray, floor: float) -> Range:
    """Minima and maxima of [N, n]."""
    exact = values.astype(np.float64)
    low, high = widened(exact.min(0), exact.max(0), floor)
    return Range(low=tuple(map(float, low)), high=tuple(map(float, high)))


def _fit_statistics(
    sets: Sequence[Demonstrations], fit: Callable[[np.ndarray, float], Quantiles | Range]
) -> NormalizationStatistics:
    actions = np.concatenate([d.actions.reshape(-1, d.actions.shape[-1]) for d in sets])
    state = np.concatenate([d.state for d in sets])
    return NormalizationStatistics(
        state=fit(state, STATE_FLOOR), actions=fit(actions, ACTION_FLOOR)
    )


def _instructions(sets: Sequence[Demonstrations]) -> list[str]:
    return [TASKS[d.task].instruction for d in sets]


def pi05_processor(sets: Sequence[Demonstrations]) -> Pi05Processor:
    """Statistics and vocabulary of a small pi0.5."""
    tokenizer = WordTokenizer.for_instructions(_instructions(sets))
    config = Pi05Config.tiny(vocabulary=tokenizer.size, horizon=HORIZON)
    return Pi05Processor(config, _fit_statistics(sets, fit_quantiles), tokenizer)


def gr00t_processor(sets: Sequence[Demonstrations]) -> Gr00tProcessor:
    """Statistics and vocabulary of a small GR00T N1.5."""
    tokenizer = WordTokenizer.for_instructions(_instructions(sets))
    config = Gr00tN15Config.tiny(vocabulary=tokenizer.size, horizon=HORIZON)
    return Gr00tProcessor(config, _fit_statistics(sets, fit_range), tokenizer)


def _pi05_learner(processor: Pi05Processor, seed: int) -> Pi05Learner:
    module, tokenizer = Pi05Module(processor.config), processor.tokenizer
    if not isinstance(tokenizer, WordTokenizer):
        raise TypeError("the embedded policies are trained with a word tokenizer")
    initialize_pi05(module, tokenizer, seed)
    return Pi05Learner(module)


def _gr00t_learner(processor: Gr00tProcessor, seed: int) -> Gr00tLearner:
    module = Gr00tN15Module(processor.config)
    initialize_gr00t(module, seed)
    return Gr00tLearner(module)


def _pi05_text(instruction: str, state: np.ndarray) -> str:
    return format_prompt(instruction, discretize_state(state))


def _gr00t_text(instruction: str, state: np.ndarray) -> str:
    return instruction


FAMILIES: Mapping[str, TrainedFamily] = {
    Pi05Policy.family: TrainedFamily(
        processor=pi05_processor,
        text=_pi05_text,
        learner=_pi05_learner,
        policy=lambda processor: Pi05Policy(Pi05Module(processor.config), processor),
        write=write_openpi,
    ),
    Gr00tN15Policy.family: TrainedFamily(
        processor=gr00t_processor,
        text=_gr00t_text,
        learner=_gr00t_learner,
        policy=lambda processor: Gr00tN15Policy(Gr00tN15Module(processor.config), processor),
        write=write_own,
    ),
}
