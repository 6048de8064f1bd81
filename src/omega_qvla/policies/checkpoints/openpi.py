"""openpi's PyTorch layout: ``model.safetensors`` and ``assets/<id>/norm_stats.json``.

The embedded policies use the same layout plus ``config.json`` (``Pi05Config`` as JSON, since
openpi keeps sizes in its training code) and ``tokenizer.json`` (a closed vocabulary).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.strict import (
    assign_strictly,
    check_headers,
    read_headers,
    read_tensors,
)
from omega_qvla.policies.pi05 import Pi05Config, Pi05Module, dropped_keys
from omega_qvla.policies.pi05_policy import Pi05Policy, Pi05Processor
from omega_qvla.policies.processing import NormalizationStatistics, load_tokenizer
from omega_qvla.policies.weight_store import MappedWeights

WEIGHTS, CONFIG, TOKENIZER, STATISTICS = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "norm_stats.json",
)
_EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
_TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


def read_openpi(directory: Path) -> Pi05Policy:
    """A policy from a directory in openpi's layout.

    Raises:
        PolicyError: a file is missing or invalid, or the weights do not fit the configuration.
    """
    module, processor = _read_structure(directory)
    config = module.config
    tensors = read_tensors(directory / WEIGHTS)
    if _EMBEDDING not in tensors and _TIED_HEAD in tensors:
        tensors[_EMBEDDING] = tensors.pop(_TIED_HEAD)  # tied: converters keep one of the names
    assign_strictly(module, tensors, dropped=dropped_keys(config), where=str(directory / WEIGHTS))
    dropped = sum(tensors[name].numel() for name in dropped_keys(config) & set(tensors))
    return Pi05Policy(module, processor, dropped_parameters=dropped)


def stream_openpi(directory: Path) -> Pi05Policy:
    """The policy ``read_openpi`` reads, its weights left in the file until they are used.

    Raises:
        PolicyError: as ``read_openpi``, except that NaN and Inf are found when they are read.
    """
    module, processor = _read_structure(directory)
    path, dead = directory / WEIGHTS, dropped_keys(module.config)
    headers, aliases = read_headers(path), {}
    if _EMBEDDING not in headers and _TIED_HEAD in headers:
        headers[_EMBEDDING] = headers.pop(_TIED_HEAD)
        aliases[_EMBEDDING] = _TIED_HEAD
    check_headers(module, headers, dropped=dead, where=str(path))
    dropped = sum(math.prod(headers[name].shape) for name in dead & set(headers))
    store = MappedWeights(path, aliases)
    return Pi05Policy(module, processor, dropped_parameters=dropped, store=store)


def _read_structure(directory: Path) -> tuple[Pi05Module, Pi05Processor]:
    """A module on the meta device, and the processor."""
    config = parse_config(_read(directory / CONFIG), str(directory / CONFIG))
    processor = Pi05Processor(
        config,
        NormalizationStatistics.parse(_read(_statistics_path(directory)), STATISTICS),
        load_tokenizer(_parse_json(directory / TOKENIZER), TOKENIZER),
    )
    with torch.device("meta"):
        return Pi05Module(config), processor


def write_openpi(
    policy: Pi05Policy,
    directory: Path,
    *,
    asset_id: str = "metaworld",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a full-precision policy in the layout ``read_openpi`` reads.

    Args:
        policy: what to write.
        directory: created if needed.
        asset_id: folder of the normalization statistics.
        dtype: of the stored weights; they are float32 in memory.
    """
    assets = directory / "assets" / asset_id
    assets.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(policy.config.model_dump_json(indent=1) + "\n")
    (directory / TOKENIZER).write_text(json.dumps(policy.processor.tokenizer.dump()) + "\n")
    (assets / STATISTICS).write_text(policy.processor.statistics.dump() + "\n")
    tensors = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in policy.module.state_dict().items()
    }
    partial = directory / f"{WEIGHTS}.partial"
    save_file(tensors, partial)
    partial.chmod(0o644)
    partial.replace(directory / WEIGHTS)


def parse_config(text: str | bytes, where: str) -> Pi05Config:
    """``Pi05Config`` from JSON.

    Raises:
        PolicyError: not JSON, or not a valid configuration.
    """
    try:
        return Pi05Config.model_validate_json(text)
    except ValidationError as error:
        raise PolicyError(f"{where} is not a pi0.5 configuration: {error}") from error


def _statistics_path(directory: Path) -> Path:
    found = sorted((directory / "assets").glob(f"*/{STATISTICS}"))
    if len(found) != 1:
        raise PolicyError(
            f"{directory}/assets must hold exactly one */{STATISTICS}, found {len(found)}"
        )
    return found[0]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read {path}: {error}") from error


def _parse_json(path: Path) -> dict:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise PolicyError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{path} must hold a JSON object")
    return content
