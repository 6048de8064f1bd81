"""Small policies and observations, built from seeds, for every test that needs a whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.policies.gr00t_n15.config import PLAIN_PROMPT, Gr00tN15Config, TransformerConfig
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor, identity_statistics
from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.qwen3 import QwenConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Quantiles
from omega_qvla.policies.processing.tokenizers import WordTokenizer
from omega_qvla.recipe import Recipe

pytest.register_assert_rewrite("embedded_checks")
pytest_plugins = ["checkpoint_directories"]

INSTRUCTION = "press the button"
STEPS = 4


def small_config(tokenizer: WordTokenizer, **changes: Any) -> Pi05Config:
    """Two layers, four image tokens per camera; the vision hidden width 72 is no whole block."""
    return Pi05Config(
        vision=VisionConfig(width=64, hidden=72, heads=2, depth=1, image_size=28),
        backbone=GemmaConfig(width=64, hidden=128, heads=2, head_dim=32),
        expert=GemmaConfig(width=64, hidden=128, heads=2, head_dim=32),
        depth=2,
        vocabulary=len(tokenizer.vocabulary),
        horizon=4,
        action_dim=4,
        robot_action_dim=4,
        state_dim=4,
        cameras=("base", "wrist"),
        prompt_length=32,
        state_in_prompt=True,
        steps=STEPS,
    ).model_copy(update=changes)


def build_policy(seed: int = 0, **changes: Any) -> Pi05Policy:
    """A small pi0.5 policy with random weights."""
    tokenizer = WordTokenizer.for_instructions([INSTRUCTION])
    config = small_config(tokenizer, **changes)
    with torch.device("meta"):
        module = Pi05Module(config)
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(0.0, spread, generator=generator)
    unit = Quantiles(q01=(-1.0,) * 4, q99=(1.0,) * 4)
    statistics = NormalizationStatistics(state=unit, actions=unit)
    return Pi05Policy(module, Pi05Processor(config, statistics, tokenizer))


def build_gr00t(seed: int = 0, **changes: Any) -> Gr00tN15Policy:
    """A small GR00T policy with random weights and three embodiments, for the same observations."""
    tokenizer = WordTokenizer.for_instructions([INSTRUCTION])
    config = Gr00tN15Config(
        vision=VisionConfig(width=64, hidden=72, heads=2, depth=1, image_size=28),
        backbone=QwenConfig(width=64, hidden=128, heads=4, kv_heads=2, head_dim=16, depth=2),
        features=TransformerConfig(width=64, heads=2, depth=1),
        head=TransformerConfig(width=64, heads=2, depth=2),
        head_hidden=48,
        future_tokens=3,
        positions=8,
        vocabulary=len(tokenizer.vocabulary),
        image_token=0,
        horizon=4,
        action_dim=4,
        robot_action_dim=4,
        state_width=6,
        state_dim=4,
        embodiments=(0, 1, 2),
        embodiment=1,
        cameras=("base", "wrist"),
        prompt=PLAIN_PROMPT,
        prompt_length=32,
        steps=STEPS,
    ).model_copy(update=changes)
    with torch.device("meta"):
        module = Gr00tN15Module(config)
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(0.0, spread, generator=generator)
    return Gr00tN15Policy(module, Gr00tProcessor(config, identity_statistics(config), tokenizer))


def build_observations(count: int = 3, seed: int = 0) -> Observations:
    """Noise images and random states."""
    source = np.random.default_rng(seed)
    return Observations(
        {
            "images": {
                name: source.integers(0, 256, (28, 28, 3), dtype=np.uint8)
                for name in ("base", "wrist")
            },
            "state": source.uniform(-1, 1, 4).astype(np.float32),
            "prompt": INSTRUCTION,
        }
        for _ in range(count)
    )


def build_noise(seed: int = 7) -> np.ndarray:
    """Noise for one chunk of the small policy."""
    return np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)


@pytest.fixture
def policy() -> Pi05Policy:
    """A small pi0.5 policy with random weights."""
    return build_policy()


@pytest.fixture(scope="session")
def small_policy() -> Pi05Policy:
    """The same, shared by tests that only read it."""
    return build_policy()


@pytest.fixture(scope="session")
def small_gr00t() -> Gr00tN15Policy:
    """A small GR00T N1.5 policy with random weights, shared by tests that only read it."""
    return build_gr00t()


@pytest.fixture(scope="session")
def few() -> Observations:
    """The same three observations, shared."""
    return build_observations()


@pytest.fixture(scope="session")
def make_small() -> Callable[..., Pi05Policy]:
    """Builds small policies: seed and changes of the configuration."""
    return build_policy


@pytest.fixture
def observations() -> Observations:
    """Three observations for the small policy."""
    return build_observations()


@pytest.fixture
def noise() -> np.ndarray:
    """Noise for one chunk of the small policy."""
    return build_noise()


@pytest.fixture
def omega_recipe() -> Recipe:
    """The recipe users get."""
    return Recipe.load("omega-w4a4-static")
