"""pi0 and pi0.5 as LeRobot saves them (``policies/pi0``, ``policies/pi05``).

Weights are openpi's under the prefix ``model.``.  Beyond the layout, LeRobot differs from openpi in
what the network is shown, and its policies were trained on that: statistics without spread are
treated differently (``normalization.py``), and releases up to 0.4.4 have other bars around images,
and write another prompt for pi0.5 (``lerobot_releases.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.lerobot_pipelines import (
    ACTION,
    BOOKKEEPING,
    IMAGES,
    NORMALIZE,
    POSTPROCESSOR,
    PREPROCESSOR,
    STATE,
    UNNORMALIZE,
    PolicyFeatures,
    Step,
    StepSettings,
    parse_config,
    read_pipeline,
    renamed_cameras,
    require_known_settings,
    require_step,
)
from omega_qvla.checkpoints.lerobot_weights import lerobot_tensors
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip_checkpoints import official_names
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.lerobot_releases import Writer, writer_of
from omega_qvla.policies.paligemma.names import TOWER
from omega_qvla.policies.paligemma.network import TIME_MAX_PERIOD, TIME_MIN_PERIOD
from omega_qvla.policies.paligemma.sizes import (
    GEMMA_VARIANTS,
    TIE,
    Sizes,
    infer_sizes,
    require_tensor,
)
from omega_qvla.policies.processing.lerobot import ABSOLUTE, normalization, relative_actions
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.relative_actions import describe_actions

CONFIG, PREFIX = "config.json", "model."
TOKENIZE = "tokenizer_processor"

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


class LerobotPaligemma(PolicyFeatures):
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


class Tokenize(StepSettings):
    """The settings of the tokenizer step; padding is masked, and prompts are never cut here."""

    tokenizer_name: str | None = None
    max_length: int = Field(ge=1)
    task_key: Literal["task"] = "task"
    padding_side: Literal["right"] = "right"
    padding: Literal["max_length"] = "max_length"
    truncation: Literal[True] = True


class Marker(NamedTuple):
    """How the tensors of one network are told from others' on PaliGemma.

    Attributes:
        title: of the network.
        tensor: a name that no other one has.
    """

    title: str
    tensor: str


@dataclass(frozen=True)
class LerobotCheckpoint:
    """A directory, its settings and pipelines read, its weights left in the file.

    Attributes:
        where: names ``config.json`` in errors.
        settings: of ``config.json``.
        writer: the release of LeRobot.
        stored: tensors under official names.
        sizes: of the network.
        before, after: steps of the two pipelines.
        tokens: settings of the tokenizer step.
    """

    where: str
    settings: LerobotPaligemma
    writer: Writer
    stored: StoredTensors
    sizes: Sizes
    before: Mapping[str, Step]
    after: Mapping[str, Step]
    tokens: Tokenize

    @property
    def state_dim(self) -> int:
        """Numbers of the robot's state."""
        return self.settings.width(STATE, self.where)

    def fields(self) -> dict[str, Any]:
        """The fields of ``PaligemmaConfig``.

        Raises:
            PolicyError: cameras are missing or not distinct, or what is said of relative actions
                does not agree.
        """
        settings, state_dim = self.settings, self.state_dim
        action_dim = settings.width(ACTION, self.where)
        steps = {**self.before, **self.after}
        names = renamed_cameras(settings, self.before)
        return {
            **self.sizes._asdict(),
            "horizon": settings.chunk_size,
            "robot_action_dim": action_dim,
            "state_dim": state_dim,
            "cameras": _cameras(names, self.where),
            "prompt_length": self.tokens.max_length,
            "steps": settings.num_inference_steps,
            "image_fit": self.writer.image_fit,
            "relative_actions": relative_actions(
                settings, steps, state_dim, action_dim, self.where
            ),
        }

    def statistics(self, config: PaligemmaConfig) -> NormalizationStatistics:
        """How state and actions are normalized.

        Raises:
            PolicyError: statistics are missing or of another width.
        """
        return NormalizationStatistics(
            state=normalization(self.before[NORMALIZE], STATE, config.state_dim),
            actions=normalization(self.after[UNNORMALIZE], ACTION, config.robot_action_dim),
        )

    def decisions(
        self, config: PaligemmaConfig, state: str, options: CheckpointOptions
    ) -> dict[str, str]:
        """What the files say, or the user said, about how the policy is to be shown the world.

        Args:
            config: of the policy.
            state: what of the state is in the prompt.
            options: what the user said.
        """
        settings = self.settings
        bars = "-3" if config.image_fit == "lerobot" else "-1 (black)"
        placeholders = [key.removeprefix(IMAGES) for key in settings.placeholders()]
        left_out = f"; {', '.join(placeholders)} left out" if placeholders else ""
        found = {
            "layout": f"LeRobot, {settings.type}",
            "written by": self.writer.evidence,
            "state in the prompt": state,
            "images": f"padded to a square with {bars}",
            "cameras": f"{', '.join(config.cameras)}{left_out}",
            "actions": describe_actions(config.relative_actions, settings.action_feature_names),
        }
        if options.ignore_settings:
            found["ignored settings"] = ", ".join(options.ignore_settings)
        return found


def open_lerobot(
    directory: Path, options: CheckpointOptions, marker: Marker, known: Sequence[str]
) -> LerobotCheckpoint:
    """Read all of a directory but the values of its weights.

    Args:
        directory: the policy directory.
        options: what the user said.
        marker: of the network that it must hold.
        known: the steps of the preprocessor that are understood, in order.

    Raises:
        PolicyError: a file is missing or invalid, a setting or a processing step is not known, the
            weights do not fit the configuration, or something has to be said that ``options``
            leaves open.
    """
    content, where = read_json(directory, CONFIG), str(directory / CONFIG)
    settings_known = BOOKKEEPING | TRAINING | frozenset(LerobotPaligemma.model_fields)
    require_known_settings(content, settings_known, options.ignore_settings, where)
    settings: LerobotPaligemma = parse_config(content, LerobotPaligemma, where)
    writer = writer_of(content, options.written_by, where)
    official = partial(
        official_names, tower=TOWER, tie=TIE._replace(apart=_APART), told=options.tied
    )
    stored = lerobot_tensors(directory, content, PREFIX, options, official)
    require_tensor(stored, marker.tensor, marker.title)
    sizes = infer_sizes(stored)
    _require_agreement(settings, sizes, where)
    before = read_pipeline(directory, PREPROCESSOR, known)
    after = read_pipeline(directory, POSTPROCESSOR, (UNNORMALIZE, ABSOLUTE))
    require_step(before, NORMALIZE, directory / PREPROCESSOR)
    require_step(after, UNNORMALIZE, directory / POSTPROCESSOR)
    tokenize = require_step(before, TOKENIZE, directory / PREPROCESSOR)
    tokens: Tokenize = parse_config(tokenize.config, Tokenize, tokenize.where)
    if "paligemma" not in (tokens.tokenizer_name or "paligemma"):
        raise PolicyError(
            f"{tokenize.where} names the tokenizer {tokens.tokenizer_name}; {marker.title} reads "
            "PaliGemma's"
        )
    return LerobotCheckpoint(where, settings, writer, stored, sizes, before, after, tokens)


def _cameras(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not names:
        raise PolicyError(f"{where} has no image among its input features")
    if len(set(names)) < len(names):
        raise PolicyError(f"{where} has two cameras of one name: {', '.join(names)}")
    return names


def _require_agreement(settings: LerobotPaligemma, sizes: Sizes, where: str) -> None:
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
