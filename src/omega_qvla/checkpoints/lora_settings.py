"""``adapter_config.json`` of a LoRA that peft saved: what is known of it, and all else refused.

peft has many variants of LoRA, each switched on by a field of its own.  What the fields that are
read here do was checked against peft itself (0.21); a field that is not known and not empty is
refused by name, since it may change the sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.checkpoints.files import read_json
from omega_qvla.errors import PolicyError

ADAPTER_CONFIG = "adapter_config.json"

_TRAINING = ("auto_mapping", "inference_mode", "task_type", "peft_version", "lora_dropout")
_INITIALIZATION = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
_OFF = ("megatron_core", "qalora_group_size")
_WITHOUT_EFFECT = frozenset((*_TRAINING, *_INITIALIZATION, *_OFF))
"""Fields that the sum does not depend on: training's, those of initializations, which
``init_lora_weights`` would name, and settings of variants that another field switches on."""


class LoraSettings(BaseModel):
    """The fields that the folded weights depend on; names and defaults are peft's.

    Attributes:
        target_modules, exclude_modules: a regular expression for whole paths, or the ends of paths.
        modules_to_save: ends of the paths of modules that were trained as they are.
        r, lora_alpha: rank and strength; the patterns have others for some paths.
        use_rslora: divide the strength by the root of the rank.
        use_dora: rows are brought to a trained length.
        bias: whose biases were trained as well.
        lora_bias: the upper matrix has a bias.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    fan_in_fan_out: Literal[False] = False

    def targets(self, path: str) -> bool:
        """Whether a module is one that the adapter changes, as peft decides it."""
        if _matches(self.exclude_modules, path) or self.saves(path):
            return False
        return _matches(self.target_modules, path)

    def saves(self, path: str) -> bool:
        """Whether a module, or one that it is in, was trained as it is."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save)

    def rank(self, path: str) -> int:
        """Of the two matrices of a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, path), self.r)

    def strength(self, path: str) -> float:
        """The ``alpha`` of a module."""
        return self.alpha_pattern.get(_pattern(self.alpha_pattern, path), self.lora_alpha)

    def scaling(self, path: str) -> float:
        """The factor before the product of the two matrices."""
        rank = self.rank(path)
        return self.strength(path) / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_settings(directory: Path) -> LoraSettings:
    """The settings of an adapter.

    Raises:
        PolicyError: the file is missing or invalid, the adapter is no LoRA, or has a setting that
            this version does not fold.
    """
    where, content = directory / ADAPTER_CONFIG, read_json(directory, ADAPTER_CONFIG)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise PolicyError(
            f"{where}: an adapter of type {kind!r} is not folded by this version, only LORA; merge "
            "it where it was trained (peft's merge_and_unload) and save the whole policy"
        )
    known = _WITHOUT_EFFECT | LoraSettings.model_fields.keys()
    unknown = [name for name, value in content.items() if value and name not in known]
    if unknown:
        shown = ", ".join(f"{name} = {content[name]!r:.80}" for name in unknown)
        raise PolicyError(
            f"{where} has settings that this version does not fold: {shown}; merge the adapter "
            "where it was trained (peft's merge_and_unload) and save the whole policy"
        )
    given = {name: value for name, value in content.items() if value is not None}
    try:
        settings = LoraSettings.model_validate(given)
        _check_patterns(settings)
    except (ValidationError, re.error) as error:
        raise PolicyError(f"{where} is not a LoRA that this version folds: {error}") from error
    return settings


def _check_patterns(settings: LoraSettings) -> None:
    """Try every regular expression once, so that an invalid one is found here."""
    settings.targets("")
    settings.scaling("")


def _matches(wanted: str | tuple[str, ...], path: str) -> bool:
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _pattern(patterns: Mapping[str, Any], path: str) -> str:
    """The first of the patterns that matches the end of a path; else the path."""
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return next(found, path)
