"""GR00T N1.5 as Isaac-GR00T saves it: shards, ``config.json``, ``experiment_cfg/metadata.json``.

Sizes come from the tensors and ``config.json``, statistics from the metadata of one embodiment; the
robot's parts, their normalization and its cameras from a data configuration that the user names.
Of the embodiment-specific layers only the chosen robot's are kept: the statistics of the others
would be missing anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import StoredTensors, find_tensors
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.checkpoints.data_config import data_config
from omega_qvla.policies.gr00t_n15.checkpoints.metadata import (
    EMBODIMENT_IDS,
    METADATA,
    embodiment_id,
    part_statistics,
    read_metadata,
    require_cameras,
)
from omega_qvla.policies.gr00t_n15.checkpoints.releases import refuse_others
from omega_qvla.policies.gr00t_n15.checkpoints.sizes import TIE, TOWER, Sizes, infer_sizes
from omega_qvla.policies.gr00t_n15.checkpoints.tokenizer import IMAGE_TOKEN, qwen_tokenizer
from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT, Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import dropped_shapes
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor
from omega_qvla.policies.layers.siglip_checkpoints import official_names

CONFIG = "config.json"
PROMPT_LENGTH = 512


class _Attention(BaseModel):
    model_config = ConfigDict(frozen=True)
    num_attention_heads: int = Field(ge=1)
    attention_head_dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    positional_embeddings: None = None


class _Diffusion(_Attention):
    interleave_self_attention: bool
    norm_type: str = "ada_norm"


class _ActionHead(BaseModel):
    model_config = ConfigDict(frozen=True)
    diffusion_model_cfg: _Diffusion
    vl_self_attention_cfg: _Attention
    num_inference_timesteps: int = Field(default=4, ge=1, le=1_000)
    num_timestep_buckets: int = 1000
    add_pos_embed: bool = True
    use_vlln: bool = True


class _Backbone(BaseModel):
    model_config = ConfigDict(frozen=True)
    select_layer: int = Field(ge=1)
    project_to_dim: None = None
    reproject_vision: bool = False


class Gr00tSettings(BaseModel):
    """The settings of ``config.json`` that inference depends on; training's are left unread."""

    model_config = ConfigDict(frozen=True)
    model_type: str
    action_dim: int = Field(ge=1)
    action_horizon: int = Field(ge=1)
    action_head_cfg: _ActionHead
    backbone_cfg: _Backbone


def stream_gr00t(directory: Path, options: CheckpointOptions) -> Gr00tN15Policy:
    """A policy from a directory that Isaac-GR00T saved, its weights left in the files.

    Raises:
        PolicyError: a file is missing or invalid, the embodiment is unknown, the weights do not fit
            the configuration, or something has to be chosen that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    where = directory / CONFIG
    content = read_json(directory, CONFIG)
    refuse_others(content, where)
    settings = _settings(content, where)
    tag, metadata = read_metadata(directory, options.embodiment)
    data = data_config(options.data_config, directory)
    require_cameras(metadata, data, directory / METADATA)
    statistics = part_statistics(metadata, data, directory / METADATA)
    stored = official_names(find_tensors(directory), TOWER, TIE, options.tied)
    head = settings.action_head_cfg
    heads = head.vl_self_attention_cfg, head.diffusion_model_cfg
    sizes = infer_sizes(stored, (heads[0].num_attention_heads, heads[1].num_attention_heads))
    _require_agreement(settings, sizes, where)
    tokenizer = qwen_tokenizer(directory, options.tokenizer)
    prompt = CHAT_PROMPT.model_copy(update={"instruction": data.instruction})
    config = make_config(
        sizes,
        where,
        embodiment=embodiment_id(tag, EMBODIMENT_IDS, directory / METADATA),
        image_token=tokenizer.token_id(IMAGE_TOKEN),
        horizon=data.horizon,
        robot_action_dim=statistics.actions.width,
        state_dim=statistics.state.width,
        cameras=data.cameras,
        image_crop=data.image_crop,
        prompt=prompt,
        prompt_length=PROMPT_LENGTH,
        steps=head.num_inference_timesteps,
    )
    decisions = {
        "layout": "Isaac-GR00T N1.5",
        "embodiment": f"{tag} ({config.embodiment})",
        "data configuration": str(options.data_config),
        "cameras": ", ".join(data.cameras),
        "images": f"center crop of {data.image_crop:g}, stretched to a square",
        "state": ", ".join(f"{part} {mode}" for part, mode in data.state.items()),
        "actions": ", ".join(f"{part} {mode}" for part, mode in data.actions.items()),
    }
    return build(Gr00tProcessor(config, statistics, tokenizer), stored, decisions)


def make_config(sizes: Sizes, where: Path, **conventions: Any) -> Gr00tN15Config:
    """Sizes and conventions together.

    Raises:
        PolicyError: they contradict each other.
    """
    try:
        return Gr00tN15Config(**sizes._asdict(), **conventions)
    except ValidationError as error:
        raise PolicyError(f"{where}: the policy does not fit its robot: {error}") from error


def build(
    processor: Gr00tProcessor, stored: StoredTensors, decisions: Mapping[str, str]
) -> Gr00tN15Policy:
    """A policy that keeps the acting embodiment's layers alone.

    Raises:
        PolicyError: the tensors do not fit the configuration.
    """
    config = processor.config
    whole = Gr00tN15Policy.of_processor(processor)
    whole = whole.read_from(stored, dropped_shapes(config), decisions)
    return whole.keep_embodiments((config.embodiment,))


def _settings(content: dict[str, Any], where: Path) -> Gr00tSettings:
    try:
        settings = Gr00tSettings.model_validate(content)
    except ValidationError as error:
        raise PolicyError(f"{where} is not a GR00T N1.5 configuration: {error}") from error
    head = settings.action_head_cfg
    expected = {
        "model_type": (settings.model_type, "gr00t_n1_5"),
        "num_timestep_buckets": (head.num_timestep_buckets, 1000),
        "add_pos_embed": (head.add_pos_embed, True),
        "use_vlln": (head.use_vlln, True),
        "reproject_vision": (settings.backbone_cfg.reproject_vision, False),
        "interleave_self_attention": (head.diffusion_model_cfg.interleave_self_attention, True),
        "norm_type": (head.diffusion_model_cfg.norm_type, "ada_norm"),
    }
    for key, (given, needed) in expected.items():
        if given != needed:
            raise PolicyError(f"{where} has {key} {given!r}; this version runs {needed!r} only")
    return settings


def _require_agreement(settings: Gr00tSettings, sizes: Sizes, where: Path) -> None:
    """The configuration must describe the network that the tensors are."""
    head = settings.action_head_cfg
    features, diffusion = head.vl_self_attention_cfg, head.diffusion_model_cfg
    pairs = {
        "action_dim": (settings.action_dim, sizes.action_dim),
        "select_layer": (settings.backbone_cfg.select_layer, sizes.backbone.depth),
        "vl_self_attention_cfg.num_layers": (features.num_layers, sizes.features.depth),
        "vl_self_attention_cfg width": (
            features.num_attention_heads * features.attention_head_dim,
            sizes.features.width,
        ),
        "diffusion_model_cfg.num_layers": (diffusion.num_layers, sizes.head.depth),
        "diffusion_model_cfg width": (
            diffusion.num_attention_heads * diffusion.attention_head_dim,
            sizes.head.width,
        ),
    }
    for key, (given, found) in pairs.items():
        if given != found:
            raise PolicyError(f"{where} has {key} {given}, the weights have {found}")
