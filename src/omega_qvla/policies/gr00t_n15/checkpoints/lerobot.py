"""GR00T N1.5 as LeRobot saves it (``policies/groot``).

Weights are the official ones under the prefix ``_groot_model.``.  Everything else is in the two
pipelines: ``groot_pack_inputs_v3`` names the embodiment and has the statistics,
``groot_action_unpack_unnormalize_v1`` maps back.  LeRobot differs from Isaac-GR00T in what the
network is shown: cameras sorted by name, no crop, a bicubic resize, the instruction as a list.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.lerobot_pipelines import (
    ACTION,
    BOOKKEEPING,
    POSTPROCESSOR,
    PREPROCESSOR,
    RENAME,
    STATE,
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
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.checkpoints.isaac import (
    CONFIG,
    PROMPT_LENGTH,
    build,
    make_config,
)
from omega_qvla.policies.gr00t_n15.checkpoints.metadata import embodiment_id
from omega_qvla.policies.gr00t_n15.checkpoints.releases import refuse_lerobot_n1_7
from omega_qvla.policies.gr00t_n15.checkpoints.sizes import TIE, TOWER, infer_sizes
from omega_qvla.policies.gr00t_n15.checkpoints.tokenizer import ASSETS, IMAGE_TOKEN, qwen_tokenizer
from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor
from omega_qvla.policies.layers.siglip_checkpoints import official_names
from omega_qvla.policies.processing.normalization import (
    Normalization,
    NormalizationStatistics,
    Range,
    Unchanged,
)

PREFIX = "_groot_model."
PACK, ENCODE, COLLATE = "groot_pack_inputs_v3", "groot_eagle_encode_v3", "groot_eagle_collate_v3"
UNPACK = "groot_action_unpack_unnormalize_v1"

PUBLISHED_HORIZON, PUBLISHED_STEPS = 16, 4
"""Of the base model that LeRobot fine-tunes; its own configuration does not hold them."""


TRAINING = frozenset(
    [
        "chunk_size",
        "n_action_steps",
        "normalization_mapping",
        "image_size",
        "base_model_path",
        "embodiment_tag",
        "tune_llm",
        "tune_visual",
        "tune_projector",
        "tune_diffusion_model",
        "lora_alpha",
        "lora_dropout",
        "lora_full_model",
        "optimizer_lr",
        "optimizer_betas",
        "optimizer_eps",
        "optimizer_weight_decay",
        "warmup_ratio",
        "use_bf16",
        "video_backend",
        "balance_dataset_weights",
        "balance_trajectory_weights",
        "dataset_paths",
        "output_dir",
        "save_steps",
        "max_steps",
        "batch_size",
        "dataloader_num_workers",
        "report_to",
        "resume",
    ]
)
"""Settings that a chunk does not depend on, or that the pipelines hold as they are in force."""


class LerobotGroot(PolicyFeatures):
    """The settings of ``config.json`` that inference depends on."""

    model_config = ConfigDict(frozen=True)
    max_state_dim: int = Field(default=64, ge=1)
    max_action_dim: int = Field(default=32, ge=1)
    tokenizer_assets_repo: str = ASSETS
    lora_rank: Literal[0] = 0


class _MinMax(StepSettings):
    """What the steps that normalize have in common."""

    normalize_min_max: bool = True


class PackInputs(_MinMax):
    """The settings of the packing step; the widths are those of ``config.json``."""

    state_horizon: Literal[1] = 1
    action_horizon: int = PUBLISHED_HORIZON
    max_state_dim: int | None = None
    max_action_dim: int | None = None
    language_key: Literal["task"] = "task"
    formalize_language: bool = False
    embodiment_tag: str
    embodiment_mapping: dict[str, int]


class _Unpack(_MinMax):
    """The settings of the step that maps actions back."""

    env_action_dim: int | None = None


class _Eagle(StepSettings):
    """The steps that tokenize have no settings in a file."""


def stream_lerobot_groot(directory: Path, options: CheckpointOptions) -> Gr00tN15Policy:
    """A GR00T policy from a directory in LeRobot's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, a processing step or the embodiment is not known,
            statistics are missing, or the weights do not fit.
        ResourceError: a library for the tokenizer is missing.
    """
    content, where = read_json(directory, CONFIG), directory / CONFIG
    refuse_lerobot_n1_7(content, where)
    known = BOOKKEEPING | TRAINING | frozenset(LerobotGroot.model_fields)
    require_known_settings(content, known, options.ignore_settings, str(where))
    settings: LerobotGroot = parse_config(content, LerobotGroot, str(where))
    before = read_pipeline(directory, PREPROCESSOR, (RENAME, PACK, ENCODE, COLLATE))
    after = read_pipeline(directory, POSTPROCESSOR, (UNPACK,))
    packing = require_step(before, PACK, directory / PREPROCESSOR)
    unpacking = require_step(after, UNPACK, directory / POSTPROCESSOR)
    pack: PackInputs = parse_config(packing.config, PackInputs, packing.where)
    parse_config(unpacking.config, _Unpack, unpacking.where)
    for name in (ENCODE, COLLATE):
        if name in before:
            parse_config(before[name].config, _Eagle, before[name].where)
    if pack.formalize_language:
        raise PolicyError(f"{packing.where} rewrites the instruction, which is not supported")
    state_dim, action_dim = (settings.width(key, str(where)) for key in (STATE, ACTION))
    statistics = NormalizationStatistics(
        state=_min_max(packing, STATE, state_dim), actions=_min_max(unpacking, ACTION, action_dim)
    )
    stored = lerobot_tensors(
        directory,
        content,
        PREFIX,
        options,
        partial(official_names, tower=TOWER, tie=TIE, told=options.tied),
    )
    sizes = infer_sizes(stored)
    for key, given, found in (
        ("max_state_dim", settings.max_state_dim, sizes.state_width),
        ("max_action_dim", settings.max_action_dim, sizes.action_dim),
    ):
        if given != found:
            raise PolicyError(f"{where} has {key} {given}, the weights have {found}")
    tokenizer = qwen_tokenizer(directory, options.tokenizer, settings.tokenizer_assets_repo)
    tag = options.embodiment or pack.embodiment_tag
    cameras = renamed_cameras(settings, before, ordered=sorted)
    if not cameras:
        raise PolicyError(f"{where} has no image among its input features")
    config = make_config(
        sizes,
        where,
        embodiment=embodiment_id(tag, pack.embodiment_mapping, directory / PREPROCESSOR),
        image_token=tokenizer.token_id(IMAGE_TOKEN),
        horizon=PUBLISHED_HORIZON,
        robot_action_dim=action_dim,
        state_dim=state_dim,
        cameras=cameras,
        image_filter="bicubic",
        prompt=CHAT_PROMPT.model_copy(update={"instruction": "listed"}),
        prompt_length=PROMPT_LENGTH,
        steps=PUBLISHED_STEPS,
    )
    decisions = {
        "layout": "LeRobot, GR00T N1.5",
        "embodiment": f"{tag} ({config.embodiment})",
        "cameras": f"{', '.join(cameras)}, sorted as LeRobot sorts them",
        "images": "stretched to a square",
        "denoising": f"{PUBLISHED_STEPS} steps, {PUBLISHED_HORIZON} actions (the base's; "
        "the files do not say)",
        "actions": "absolute",
    }
    if options.ignore_settings:
        decisions["ignored settings"] = ", ".join(options.ignore_settings)
    return build(Gr00tProcessor(config, statistics, tokenizer), stored, decisions)


def _min_max(step: Step, key: str, width: int) -> Normalization:
    """Minima and maxima of one feature.

    Raises:
        PolicyError: they are missing (LeRobot would go on with raw units) or of another width.
    """
    if not step.config.get("normalize_min_max", True):
        return Unchanged(width=width)
    given = step.statistics.get(key, {})
    if "min" not in given or "max" not in given:
        raise PolicyError(
            f"{step.where} has no minima and maxima of {key} ({step.found}): this policy was saved "
            "without the statistics of its data set; fine-tune it or save it again with them"
        )
    if len(given["min"]) != width or len(given["max"]) != width:
        raise PolicyError(
            f"{step.where}: statistics of {key} have {len(given['min'])} and {len(given['max'])} "
            f"dimensions, the policy has {width}"
        )
    try:
        return Range(low=given["min"], high=given["max"])
    except ValidationError as error:
        raise PolicyError(f"{step.where}: statistics of {key} are invalid: {error}") from error
