"""What an artifact will take, before anything is computed.

Tensors follow from shapes (``artifact/layout.py``); so do the headers of the tensor files and the
manifest, whose hashes have a fixed length.  ``omega_config.json`` depends on calibration in the
digits of a few numbers and in its notes; it is predicted with numbers of usual length and no notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla.artifact import planned_bytes
from omega_qvla.artifact.layout import Layout, TensorSpec, embedding_layout, site_layout
from omega_qvla.policies.base import (
    HasEmbedding,
    Policy,
    QuantizationSite,
    linears_of,
    sites_of,
)
from omega_qvla.policies.layers.step_table import HasStepTable, StepTable
from omega_qvla.quantization.embedding import QuantizedRows
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.weights import QuantizedWeight
from omega_qvla.recipe import ActivationScheme, Recipe
from omega_qvla.runtime.card import model_card
from omega_qvla.runtime.description import describe
from omega_qvla.runtime.lerobot_files import lerobot_files
from omega_qvla.runtime.memory import (
    REFERENCE_BYTES,
    STEP_TABLE,
    TABULATED,
    MemorySummary,
    memory_report,
)

_LOSS, _CLIP = 0.0012345678901234567, 0.85
"""Of as many digits as those that calibration finds."""
_WEIGHTS = ("weight_packed", "weight_scale", "low_rank_down", "low_rank_up")

_NOTHING = torch.empty(0, device="meta")


def predict(policy: Policy, recipe: Recipe) -> MemorySummary:
    """The memory table a quantization will have (tensors only).

    Nothing is computed.  Of tensors that stay as they are, those whose checkpoint has them in 32
    bits are read, since only their values tell whether 16 bits hold them.
    """
    return memory_report(
        describe(policy, _planned(policy, recipe)), predicted_layout(policy, recipe)
    )


def predict_directory(policy: Policy, recipe: Recipe) -> MemorySummary:
    """The memory table of an artifact with a row for everything that is not tensors.

    Equal to what ``inspect`` shows of the saved artifact up to a few hundred bytes of its
    configuration, and where calibration leaves out a static scale that the recipe allows.
    """
    layout = predicted_layout(policy, recipe)
    config = describe(policy, _planned(policy, recipe))
    _, processor = policy.describe()
    total = planned_bytes(
        config=config,
        tensors=layout,
        processor=processor,
        card=model_card(config),
        lerobot=lerobot_files(policy),
    )
    return memory_report(config, layout, directory_bytes=total)


def predicted_layout(policy: Policy, recipe: Recipe) -> Layout:
    """Every tensor an artifact will have, by name."""
    layout: Layout = {}
    quantized: set[str] = set()
    for site, kinds in _site_layouts(policy, recipe, None):
        layout |= {f"{site.name}.{kind}": tensor for kind, tensor in kinds.items()}
        quantized.update(site.linears)
    table, embedding = _predicted_table(policy, recipe), _predicted_embedding(policy, recipe)
    for name, parameter in policy.module.named_parameters():
        component, path = policy.component_of(name), name.rpartition(".")[0]
        if path in quantized or (table is not None and component == TABULATED):
            continue
        if path == embedding:
            rows = embedding_layout(recipe.embedding_bits, *parameter.shape)
            layout |= {f"{path}.{kind}": tensor for kind, tensor in rows.items()}
        else:
            dtype = _stored_dtype(policy, name, parameter)
            layout[name] = TensorSpec(dtype, tuple(parameter.shape))
    if table is not None:
        for kind, tensor in (("times", table.times), ("values", table.values)):
            layout[f"{STEP_TABLE}.{kind}"] = TensorSpec(tensor.dtype, tuple(tensor.shape))
    return layout


def site_bytes(policy: Policy, recipe: Recipe, *, steps: int | None = None) -> dict[str, int]:
    """Bytes that the tensors of each site a recipe quantizes will take, by site name.

    Args:
        steps: denoising steps that scales and offsets are for; the policy's own by default.
    """
    return {
        site.name: sum(tensor.nbytes for tensor in kinds.values())
        for site, kinds in _site_layouts(policy, recipe, steps)
    }


@dataclass(frozen=True)
class WeightStorage:
    """How the weights of a policy's linears are stored.

    Attributes:
        bits_per_weight: bits stored for the weights of all sites over their number: integers,
            their scales, low-rank branches, and 16 for what is not quantized.  Transforms and
            static activation scales are not weights; ``checkpoint_bytes`` counts them.
        weights_16bit: how many of those weights stay in 16 bits.
    """

    bits_per_weight: float
    weights_16bit: int


def weight_storage(policy: Policy, recipe: Recipe) -> WeightStorage:
    """What a recipe stores per weight of this policy, simulations as if they could be stored."""
    stored = {
        site.name: sum(kinds[kind].nbytes for kind in _WEIGHTS if kind in kinds)
        for site, kinds in _site_layouts(policy, recipe, None)
    }
    weights = {
        site.name: sum(linear.weight.numel() for linear in linears_of(policy.module, site))
        for site in sites_of(policy)
    }
    kept = sum(count for name, count in weights.items() if name not in stored)
    held = sum(stored.values()) + REFERENCE_BYTES * kept
    return WeightStorage(8 * held / sum(weights.values()), kept)


def narrowed(tensor: Tensor) -> Tensor:
    """bfloat16 if that loses nothing, else float16 if that does not, else the tensor itself."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(torch.float32), tensor):
            return narrow
    return tensor


def _stored_dtype(policy: Policy, name: str, parameter: Tensor) -> torch.dtype:
    """The type that ``narrowed`` will give a parameter; values are read where they decide it."""
    if not parameter.is_meta:
        return narrowed(parameter).dtype
    if policy.store is None:
        return torch.bfloat16  # only a random policy's structure is: its weights will be rounded
    known = policy.store.dtype(name)
    return known if known != torch.float32 else narrowed(policy.store.read(name)).dtype


def _site_layouts(
    policy: Policy, recipe: Recipe, steps: int | None
) -> Iterator[tuple[QuantizationSite, Layout]]:
    """The tensors of every site a recipe quantizes, by kind."""
    own = getattr(policy, "steps", 1) if steps is None else steps
    for site in sites_of(policy):
        scheme = recipe.scheme_of(site)
        if scheme is not None:
            linears = linears_of(policy.module, site)
            yield (
                site,
                site_layout(
                    scheme,
                    linears[0].in_features,
                    [linear.out_features for linear in linears],
                    any(linear.bias is not None for linear in linears),
                    own if site.per_step else 1,
                ),
            )


def _predicted_table(policy: Policy, recipe: Recipe) -> StepTable | None:
    """What will stand for the adaptive norms, if anything."""
    if recipe.adaptive_norm != "table" or not isinstance(policy, HasStepTable):
        return None
    return policy.tabulate_modulation(recipe.table_step_counts)


def _predicted_embedding(policy: Policy, recipe: Recipe) -> str | None:
    """The token embedding that will be integers, if any."""
    if recipe.embedding_bits == 16 or not isinstance(policy, HasEmbedding):
        return None
    return policy.embedding_path


def _planned(policy: Policy, recipe: Recipe) -> Quantization:
    """The outcome of quantizing the policy, with tensors that hold nothing."""
    path = _predicted_embedding(policy, recipe)
    rows = None
    if path is not None and recipe.embedding_bits != 16:
        rows = QuantizedRows(path, _NOTHING, _NOTHING, recipe.embedding_bits)
    return Quantization(
        recipe=recipe,
        sites=list(_planned_sites(policy, recipe)),
        embedding=rows,
        step_table=_predicted_table(policy, recipe),
        calibration="0" * 64,
        observations=recipe.observations,
    )


def _planned_sites(policy: Policy, recipe: Recipe) -> Iterator[QuantizedSite]:
    for site in sites_of(policy):
        scheme = recipe.scheme_of(site)
        if scheme is None:
            continue
        linears = linears_of(policy.module, site)
        yield QuantizedSite(
            site=site,
            in_features=linears[0].in_features,
            splits=tuple(linear.out_features for linear in linears),
            weight=QuantizedWeight(_NOTHING, _NOTHING, scheme.weights.group),
            weight_bits=scheme.weights.bits,
            transform=None,
            bias=None,
            activations=_chosen(scheme.activations),
            activation_scale=None,
            activation_times=None,
            proxy_loss=_LOSS if scheme.weights.rounding == "gptq" else None,
        )


def _chosen(activations: ActivationScheme) -> ActivationScheme:
    """A scheme with what calibration chooses chosen."""
    chosen: dict[str, Any] = {}
    if activations.scale == "per_step_or_token":
        chosen["scale"] = "per_step"
    if activations.clip == "search":
        chosen["clip"] = _CLIP
    return activations.model_copy(update=chosen)
