"""pi0.5 as LeRobot saves it (``policies/pi05``).

Weights are openpi's under the prefix ``model.``.  Beyond the layout, LeRobot differs from openpi in
what the network is shown, and its policies were trained on that: statistics without spread are
treated differently (``normalization.py``), and releases up to 0.4.4 write another prompt and other
bars around images (``lerobot_writer.py``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.lerobot_pipelines import (
    ACTION,
    BOOKKEEPING,
    IMAGES,
    NORMALIZE,
    POSTPROCESSOR,
    PREPROCESSOR,
    RENAME,
    STATE,
    UNNORMALIZE,
    PolicyFeatures,
    StepSettings,
    parse_config,
    read_pipeline,
    renamed_cameras,
    require_known_settings,
    require_step,
)
from omega_qvla.checkpoints.lerobot_weights import lerobot_tensors
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip_checkpoints import official_names
from omega_qvla.policies.paligemma.lerobot_releases import Writer, writer_of
from omega_qvla.policies.paligemma.names import TOWER
from omega_qvla.policies.paligemma.network import (
    TIME_MAX_PERIOD,
    TIME_MIN_PERIOD,
    dropped_shapes,
)
from omega_qvla.policies.paligemma.sizes import (
    GEMMA_VARIANTS,
    TIE,
    Sizes,
    infer_sizes,
    require_tensor,
)
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import ADAPTIVE_NORM
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.lerobot import (
    ABSOLUTE,
    RELATIVE,
    RELATIVE_IN_0_5_1,
    normalization,
    relative_actions,
)
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer
from omega_qvla.policies.processing.relative_actions import describe_actions

CONFIG, PREFIX = "config.json", "model."
PROMPT, TOKENIZE = "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"

TRAINING = frozenset(
    [
        "dtype",
        "n_action_steps",
        "time_sampling_beta_alpha",
        "time_sampling_beta_beta",
        "time_sampling_scale",
        "time_sampling_offset",
        "rtc_config",
        "empty_cameras",
        "tokenizer_max_length",
        "normalization_mapping",
        "gradient_checkpointing",
        "compile_model",
        "compile_mode",
        "freeze_vision_encoder",
        "train_expert_only",
        "optimizer_lr",
        "optimizer_betas",
        "optimizer_eps",
        "optimizer_weight_decay",
        "optimizer_grad_clip_norm",
        "scheduler_warmup_steps",
        "scheduler_decay_steps",
        "scheduler_decay_lr",
    ]
)
"""Settings that a chunk does not depend on, or that the pipelines hold as they are in force."""
_APART = "the embedding: LeRobot keeps it apart from the head, which it never reads"


class LerobotPi05(PolicyFeatures):
    """The settings of ``config.json`` that inference depends on."""

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
    use_relative_actions: bool = False
    relative_exclude_joints: tuple[str, ...] = ()
    action_feature_names: tuple[str, ...] | None = None


class _Prompt(StepSettings):
    """The step that writes the prompt has no settings in any release."""


class _Tokenize(StepSettings):
    """The settings of the tokenizer step; padding is masked, and prompts are never cut here."""

    tokenizer_name: str | None = None
    max_length: int = Field(ge=1)
    task_key: Literal["task"] = "task"
    padding_side: Literal["right"] = "right"
    padding: Literal["max_length"] = "max_length"
    truncation: Literal[True] = True


def stream_lerobot_pi05(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A pi0.5 policy from a directory in LeRobot's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, a setting or a processing step is not known,
            statistics are missing, the weights do not fit the configuration, or something has to
            be said that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    content, where = read_json(directory, CONFIG), str(directory / CONFIG)
    known = BOOKKEEPING | TRAINING | frozenset(LerobotPi05.model_fields)
    require_known_settings(content, known, options.ignore_settings, where)
    settings: LerobotPi05 = parse_config(content, LerobotPi05, where)
    writer = writer_of(content, options.written_by, where)
    official = partial(
        official_names, tower=TOWER, tie=TIE._replace(apart=_APART), told=options.tied
    )
    stored = lerobot_tensors(directory, content, PREFIX, options, official)
    require_tensor(stored, ADAPTIVE_NORM, "pi0.5")
    sizes = infer_sizes(stored)
    _require_agreement(settings, sizes, where)
    processor = _processor(directory, options, settings, sizes, writer)
    decisions = _decisions(settings, processor, writer, options)
    policy = Pi05Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)


def _processor(
    directory: Path, options: CheckpointOptions, settings: LerobotPi05, sizes: Sizes, writer: Writer
) -> Pi05Processor:
    where = str(directory / CONFIG)
    state_dim, action_dim = (settings.width(key, where) for key in (STATE, ACTION))
    known = (RENAME, RELATIVE, RELATIVE_IN_0_5_1, NORMALIZE, PROMPT, TOKENIZE)
    before = read_pipeline(directory, PREPROCESSOR, known)
    after = read_pipeline(directory, POSTPROCESSOR, (UNNORMALIZE, ABSOLUTE))
    normalize = require_step(before, NORMALIZE, directory / PREPROCESSOR)
    unnormalize = require_step(after, UNNORMALIZE, directory / POSTPROCESSOR)
    tokenize = require_step(before, TOKENIZE, directory / PREPROCESSOR)
    tokens: _Tokenize = parse_config(tokenize.config, _Tokenize, tokenize.where)
    if "paligemma" not in (tokens.tokenizer_name or "paligemma"):
        raise PolicyError(
            f"{tokenize.where} names the tokenizer {tokens.tokenizer_name}; pi0.5 reads PaliGemma's"
        )
    if PROMPT in before:
        parse_config(before[PROMPT].config, _Prompt, before[PROMPT].where)
    config = Pi05Config(
        **sizes._asdict(),
        horizon=settings.chunk_size,
        robot_action_dim=action_dim,
        state_dim=state_dim,
        cameras=_cameras(settings, renamed_cameras(settings, before), where),
        prompt_length=tokens.max_length,
        state_in_prompt=PROMPT in before,
        prompt_state_dim=settings.max_state_dim if PROMPT in before and writer.pads_state else None,
        steps=settings.num_inference_steps,
        image_fit=writer.image_fit,
        relative_actions=relative_actions(
            settings, {**before, **after}, state_dim, action_dim, where
        ),
    )
    statistics = NormalizationStatistics(
        state=normalization(normalize, STATE, state_dim),
        actions=normalization(unnormalize, ACTION, action_dim),
    )
    return Pi05Processor(config, statistics, paligemma_tokenizer(directory, options.tokenizer))


def _decisions(
    settings: LerobotPi05, processor: Pi05Processor, writer: Writer, options: CheckpointOptions
) -> dict[str, str]:
    """What the files say, or the user said, about how this policy is to be shown the world."""
    config = processor.config
    own, padded = config.state_dim, config.prompt_state_dim
    state = f"the robot's {own} numbers"
    if padded is not None:
        state = f"{state}, then zeros up to {padded}"
    bars = "-3" if config.image_fit == "lerobot" else "-1 (black)"
    placeholders = [key.removeprefix(IMAGES) for key in settings.placeholders()]
    left_out = f"; {', '.join(placeholders)} left out" if placeholders else ""
    found = {
        "layout": "LeRobot, pi05",
        "written by": writer.evidence,
        "state in the prompt": state if config.state_in_prompt else "none",
        "images": f"padded to a square with {bars}",
        "cameras": f"{', '.join(config.cameras)}{left_out}",
        "actions": describe_actions(config.relative_actions, settings.action_feature_names),
    }
    if options.ignore_settings:
        found["ignored settings"] = ", ".join(options.ignore_settings)
    return found


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
