"""What the steps of a LeRobot pipeline do to numbers: normalize them, and make actions relative.

Two steps make actions relative to the robot's state and belong together.  The one before
normalization subtracts the state in training and, at inference, remembers it; the one after
unnormalizing adds it again.  0.5.1 registered the first as ``delta_actions_processor``, later
releases call it ``relative_actions_processor``; earlier releases have neither.  ``config.json``
says the same a second time (``use_relative_actions``, ``relative_exclude_joints``,
``action_feature_names``), and is what a fine-tune was started with.

The pipelines are what LeRobot runs.  Where the two disagree, nobody can tell what the policy was
trained with, and it is refused.

Source: LeRobot 0.5.1 to 0.6.1 (``processor/relative_action_processor.py``, ``lerobot_train.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pydantic import Field, ValidationError

from omega_qvla.checkpoints.lerobot_pipelines import (
    ACTION,
    Feature,
    Step,
    StepSettings,
    parse_config,
)
from omega_qvla.errors import PolicyError
from omega_qvla.policies.processing.normalization import MeanStd, Normalization, Range, Unchanged
from omega_qvla.policies.processing.relative_actions import Mask, relative_mask

RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
RELATIVE_IN_0_5_1 = "delta_actions_processor"

_BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


class _Normalize(StepSettings):
    """The settings of a normalizer or unnormalizer; it has the features of ``config.json`` too."""

    features: dict[str, Feature] = Field(default_factory=dict)
    norm_map: dict[str, str] = Field(default_factory=dict)
    eps: float = Field(default=1e-8, gt=0.0)
    normalize_observation_keys: tuple[str, ...] | None = None


class RelativeSettings(Protocol):
    """What ``config.json`` says."""

    use_relative_actions: bool
    relative_exclude_joints: tuple[str, ...]
    action_feature_names: tuple[str, ...] | None


class _Relative(StepSettings):
    """The settings of the step that makes actions relative."""

    enabled: bool = False
    exclude_joints: tuple[str, ...] = ()
    action_names: tuple[str, ...] | None = None


class _Absolute(StepSettings):
    """The settings of the step that undoes it."""

    enabled: bool = False


def normalization(step: Step, key: str, width: int) -> Normalization:
    """How a step normalizes one feature.

    Args:
        step: a normalizer or unnormalizer.
        key: ``observation.state`` or ``action``.
        width: dimensions of the feature.

    Raises:
        PolicyError: the statistics that its mode needs are missing (LeRobot would go on with raw
            units), are of another width, or the mode is not known; or images are normalized, too.
    """
    settings: _Normalize = parse_config(step.config, _Normalize, step.where)
    if settings.norm_map.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise PolicyError(f"{step.where} normalizes images, which is not supported")
    kind = "ACTION" if key == ACTION else "STATE"
    mode, wanted = settings.norm_map.get(kind, "IDENTITY"), settings.normalize_observation_keys
    if mode == "IDENTITY" or (kind == "STATE" and wanted is not None and key not in wanted):
        return Unchanged(width=width)
    names = ("mean", "std") if mode == "MEAN_STD" else _BOUNDS.get(mode)
    if names is None:
        raise PolicyError(f"{step.where}: normalization {mode!r} of {kind} is not known")
    given = step.statistics.get(key, {})
    missing = [name for name in names if name not in given]
    if missing:
        raise PolicyError(
            f"{step.where} has no {' and no '.join(missing)} of {key}, which its normalization "
            f"{mode} needs ({step.found}): this policy was saved without the statistics of its "
            "data set; fine-tune it or save it again with them"
        )
    first, second = (given[name] for name in names)
    if len(first) != width or len(second) != width:
        raise PolicyError(
            f"{step.where}: statistics of {key} have {len(first)} and {len(second)} dimensions, "
            f"the policy has {width}"
        )
    try:
        if mode == "MEAN_STD":
            return MeanStd(mean=first, std=second, margin=settings.eps)
        return Range(low=first, high=second, flat_width=settings.eps)
    except ValidationError as error:
        raise PolicyError(f"{step.where}: statistics of {key} are invalid: {error}") from error


def relative_actions(
    settings: RelativeSettings,
    steps: Mapping[str, Step],
    state_dim: int,
    action_dim: int,
    where: str,
) -> Mask:
    """Which actions are relative; empty where all are absolute.

    Args:
        settings: of ``config.json``.
        steps: of both pipelines.
        state_dim, action_dim: the robot's own dimensions.
        where: names ``config.json`` in errors.

    Raises:
        PolicyError: the two steps and ``config.json`` do not agree, or the state is too narrow.
    """
    if RELATIVE in steps and RELATIVE_IN_0_5_1 in steps:
        raise PolicyError(
            f"{steps[RELATIVE].where} stands beside {RELATIVE_IN_0_5_1}, which is the same step"
        )
    before = steps.get(RELATIVE) or steps.get(RELATIVE_IN_0_5_1)
    after = steps.get(ABSOLUTE)
    subtract = parse_config(before.config, _Relative, before.where) if before else _Relative()
    add = parse_config(after.config, _Absolute, after.where) if after else _Absolute()
    if not settings.use_relative_actions == subtract.enabled == add.enabled:
        raise PolicyError(
            f"{where} has use_relative_actions {_flag(settings.use_relative_actions)}, the "
            f"preprocessor's step {RELATIVE} is {_state(before, subtract.enabled)} and the "
            f"postprocessor's {ABSOLUTE} is {_state(after, add.enabled)}: whether the actions of "
            "this policy are differences from the state cannot be told. Set all three to what it "
            "was trained with"
        )
    if not subtract.enabled:
        return ()
    mask = relative_mask(action_dim, subtract.action_names, subtract.exclude_joints)
    told = relative_mask(
        action_dim, settings.action_feature_names, settings.relative_exclude_joints
    )
    if mask != told:
        raise PolicyError(
            f"{where} makes actions {_numbers(told)} relative to the state (action_feature_names, "
            f"relative_exclude_joints), the step {RELATIVE} {_numbers(mask)} (action_names, "
            "exclude_joints): set both to what the policy was trained with"
        )
    if state_dim < action_dim:
        raise PolicyError(
            f"{where}: actions are relative to the state, but there are {action_dim} of them and "
            f"{state_dim} numbers of state"
        )
    return mask


def _flag(value: bool) -> str:
    return str(value).lower()


def _state(step: Step | None, enabled: bool) -> str:
    if step is None:
        return "not there"
    return "enabled" if enabled else "disabled"


def _numbers(mask: Mask) -> str:
    return ", ".join(str(i) for i, relative in enumerate(mask) if relative) or "none"
