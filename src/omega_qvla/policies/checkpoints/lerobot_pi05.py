"""pi0.5 as LeRobot saves it (``policies/pi05``).

Weights are openpi's under the prefix ``model.``.  Beyond the layout, LeRobot differs from openpi in
what the network is shown, and its policies were trained on that:

* the normalized state is padded with zeros to ``max_state_dim`` *before* it is written into the
  prompt, so that 32 numbers appear there whatever the robot;
* images that are not square get bars of -3 instead of -1 (``images.py``);
* statistics without spread are treated differently (``normalization.py``).
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.choices import Choices
from omega_qvla.policies.checkpoints.files import read_json
from omega_qvla.policies.checkpoints.lerobot import (
    ACTION,
    NORMALIZE,
    POSTPROCESSOR,
    PREPROCESSOR,
    RENAME,
    STATE,
    UNNORMALIZE,
    PolicyFeatures,
    normalization,
    parse_config,
    read_pipeline,
    refuse_adapters,
    renamed_cameras,
    require_step,
    without_prefix,
)
from omega_qvla.policies.checkpoints.paligemma import paligemma_tokenizer
from omega_qvla.policies.checkpoints.pi05_sizes import (
    GEMMA_VARIANTS,
    Sizes,
    infer_sizes,
    untie,
)
from omega_qvla.policies.checkpoints.shards import StoredTensors, find_tensors
from omega_qvla.policies.checkpoints.strict import dropped_count, map_strictly
from omega_qvla.policies.normalization import NormalizationStatistics
from omega_qvla.policies.pi05 import (
    TIME_MAX_PERIOD,
    TIME_MIN_PERIOD,
    Pi05Config,
    Pi05Module,
    dropped_shapes,
)
from omega_qvla.policies.pi05_policy import Pi05Policy, Pi05Processor

CONFIG, PREFIX = "config.json", "model."
PROMPT, TOKENIZE = "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"


class LerobotPi05(PolicyFeatures):
    """The settings of ``config.json`` that inference depends on; training's are left unread."""

    model_config = ConfigDict(frozen=True)
    chunk_size: int = Field(ge=1, le=10_000)
    max_state_dim: int = Field(default=32, ge=1, le=10_000)
    max_action_dim: int = Field(default=32, ge=1)
    num_inference_steps: int = Field(default=10, ge=1, le=1_000)
    image_resolution: tuple[int, int] = (224, 224)
    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"
    min_period: float = TIME_MIN_PERIOD
    max_period: float = TIME_MAX_PERIOD


class _Tokenize(BaseModel):
    """The settings of the tokenizer step."""

    model_config = ConfigDict(frozen=True)
    tokenizer_name: str | None = None
    max_length: int = Field(ge=1)
    padding_side: str = "right"


def stream_lerobot_pi05(directory: Path, choices: Choices) -> Pi05Policy:
    """A pi0.5 policy from a directory in LeRobot's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, a processing step is not known, statistics are
            missing, or the weights do not fit the configuration.
        ResourceError: a library for the tokenizer is missing.
    """
    module, processor, stored = _read_structure(directory, choices)
    dropped = dropped_shapes(module.config)
    store = map_strictly(module, stored, dropped=dropped)
    count = dropped_count(stored, dropped)
    return Pi05Policy(module, processor, dropped_parameters=count, store=store)


def _read_structure(
    directory: Path, choices: Choices
) -> tuple[Pi05Module, Pi05Processor, StoredTensors]:
    content, where = read_json(directory, CONFIG), str(directory / CONFIG)
    refuse_adapters(directory, content)
    settings: LerobotPi05 = parse_config(content, LerobotPi05, where)
    stored = untie(without_prefix(find_tensors(directory), PREFIX))
    sizes = infer_sizes(stored)
    _require_agreement(settings, sizes, where)
    processor = _processor(directory, choices, settings, sizes)
    with torch.device("meta"):
        return Pi05Module(processor.config), processor, stored


def _processor(
    directory: Path, choices: Choices, settings: LerobotPi05, sizes: Sizes
) -> Pi05Processor:
    where = str(directory / CONFIG)
    state_dim, action_dim = (settings.width(key, where) for key in (STATE, ACTION))
    known = (RENAME, NORMALIZE, PROMPT, TOKENIZE)
    before = read_pipeline(directory, PREPROCESSOR, known)
    after = read_pipeline(directory, POSTPROCESSOR, (UNNORMALIZE,))
    normalize = require_step(before, NORMALIZE, directory / PREPROCESSOR)
    unnormalize = require_step(after, UNNORMALIZE, directory / POSTPROCESSOR)
    tokenize = require_step(before, TOKENIZE, directory / PREPROCESSOR)
    tokens: _Tokenize = parse_config(tokenize.config, _Tokenize, tokenize.where)
    if "paligemma" not in (tokens.tokenizer_name or "paligemma"):
        raise PolicyError(
            f"{tokenize.where} names the tokenizer {tokens.tokenizer_name}; pi0.5 reads PaliGemma's"
        )
    config = Pi05Config(
        **sizes._asdict(),
        horizon=settings.chunk_size,
        robot_action_dim=action_dim,
        state_dim=state_dim,
        cameras=_cameras(settings, renamed_cameras(settings, before), where),
        prompt_length=tokens.max_length,
        state_in_prompt=PROMPT in before,
        prompt_state_dim=settings.max_state_dim if PROMPT in before else None,
        steps=settings.num_inference_steps,
        image_fit="lerobot",
    )
    statistics = NormalizationStatistics(
        state=normalization(normalize, STATE, state_dim),
        actions=normalization(unnormalize, ACTION, action_dim),
    )
    return Pi05Processor(config, statistics, paligemma_tokenizer(directory, choices.tokenizer))


def _cameras(settings: LerobotPi05, names: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not names:
        raise PolicyError(f"{where} has no image among its input features")
    if len(set(names)) < len(names):
        raise PolicyError(f"{where} has two cameras of one name: {', '.join(names)}")
    return names


def _require_agreement(settings: LerobotPi05, sizes: Sizes, where: str) -> None:
    """The configuration must describe the network that the tensors are."""
    edge = sizes.vision.image_size
    expected = {
        "paligemma_variant": _variant(sizes.backbone),
        "action_expert_variant": _variant(sizes.expert),
        "max_action_dim": sizes.action_dim,
        "image_resolution": (edge, edge),
        "min_period": TIME_MIN_PERIOD,
        "max_period": TIME_MAX_PERIOD,
    }
    for key, value in expected.items():
        given = getattr(settings, key)
        if given != value:
            raise PolicyError(f"{where} has {key} {given}, the weights need {value}")


def _variant(config: object) -> str:
    return next(name for name, variant in GEMMA_VARIANTS.items() if variant == config)
