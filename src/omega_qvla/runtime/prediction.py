"""What an artifact will take on disk, before anything is computed.

Tensors follow from shapes (``memory.py``); so do the headers of the tensor files and the manifest,
whose hashes have a fixed length.  ``omega_config.json`` depends on calibration in the digits of
a few numbers and in its notes; it is predicted with numbers of usual length and no notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from omega_qvla.artifact import MemorySummary, planned_bytes
from omega_qvla.policies.base import Policy, linears_of, sites_of
from omega_qvla.quantization.embedding import QuantizedRows
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.weights import QuantizedWeight
from omega_qvla.recipe import ActivationScheme, Recipe
from omega_qvla.runtime.card import model_card
from omega_qvla.runtime.description import describe
from omega_qvla.runtime.memory import (
    predicted_embedding,
    predicted_layout,
    predicted_table,
    summary_of,
)

_LOSS, _CLIP = 0.0012345678901234567, 0.85
"""Of as many digits as those that calibration finds."""

_NOTHING = torch.empty(0, device="meta")


def predict_directory(policy: Policy, recipe: Recipe) -> MemorySummary:
    """The memory table of an artifact with a row for everything that is not tensors.

    Equal to what ``inspect`` shows of the saved artifact up to a few hundred bytes of its
    configuration, and where calibration leaves out a static scale that the recipe allows.
    """
    layout = predicted_layout(policy, recipe)
    config = describe(policy, _planned(policy, recipe))
    _, processor = policy.describe()
    total = planned_bytes(
        config=config, tensors=layout, processor=processor, card=model_card(config)
    )
    return summary_of(policy, recipe, layout, directory_bytes=total)


def _planned(policy: Policy, recipe: Recipe) -> Quantization:
    """The outcome of quantizing the policy, with tensors that hold nothing."""
    path = predicted_embedding(policy, recipe)
    rows = None
    if path is not None and recipe.embedding_bits != 16:
        rows = QuantizedRows(path, _NOTHING, _NOTHING, recipe.embedding_bits)
    return Quantization(
        recipe=recipe,
        sites=list(_planned_sites(policy, recipe)),
        embedding=rows,
        step_table=predicted_table(policy, recipe),
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
