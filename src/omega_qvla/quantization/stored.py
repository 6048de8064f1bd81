"""A quantized site as it is stored, by artifacts and by journals alike.

``SiteRecord`` is what JSON says of it; its tensors are those of ``artifact/layout.py``.  Nothing in
a file decides what is read, only whether it is what the site's scheme implies; the one extent that
the file may choose is the number of flow times.  Storing loses nothing: transforms, offsets and
low-rank branches are rounded to bfloat16 when they are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from omega_qvla.artifact.layout import Layout, TensorSpec, site_layout, stored_width
from omega_qvla.artifact.packing import pack_int4, unpack_int4
from omega_qvla.errors import ArtifactError
from omega_qvla.policies.base import Component, QuantizationSite
from omega_qvla.quantization.low_rank import LowRankBranch
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.transforms import BlockTransform, OutputRotation
from omega_qvla.quantization.weights import QuantizedWeight
from omega_qvla.recipe import Recipe, Scheme

TIMES = "activation_step_times"


class SiteRecord(BaseModel):
    """What ``omega_config.json`` says about one quantized site; docs/artifact.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    linears: Annotated[tuple[str, ...], Field(min_length=1)]
    component: Component
    per_step: bool
    in_features: int
    splits: tuple[int, ...]
    activation_bits: int
    activation_scale: str
    activation_clip: Annotated[float | None, Field(strict=True, gt=0.0, le=1.0)] = None
    group: int | None
    proxy_loss: float | None
    note: str

    @classmethod
    def of(cls, quantized: QuantizedSite, recipe: Recipe) -> SiteRecord:
        """The record of a site that was quantized with this recipe."""
        site, activations = quantized.site, quantized.activations
        scheme, loss = recipe.scheme_of(site), quantized.proxy_loss
        assert scheme is not None
        return cls(
            name=site.name,
            linears=site.linears,
            component=site.component,
            per_step=site.per_step,
            in_features=quantized.in_features,
            splits=quantized.splits,
            activation_bits=activations.bits,
            activation_scale=activations.scale,
            activation_clip=activations.share if scheme.activations.clip == "search" else None,
            group=quantized.weight.group,
            # A loss relative to an output that is always zero is none, and no JSON could hold it.
            proxy_loss=loss if loss is not None and math.isfinite(loss) else None,
            note=quantized.note,
        )

    def dump(self) -> dict[str, Any]:
        """The record as JSON."""
        searched = self.activation_clip is not None
        return self.model_dump(mode="json", exclude=None if searched else {"activation_clip"})

    @property
    def site(self) -> QuantizationSite:
        """The site it is about."""
        return QuantizationSite(self.name, self.linears, self.component, self.per_step)

    def scheme(self, recipe: Recipe) -> Scheme:
        """The site's scheme, with what calibration chose.

        Raises:
            ArtifactError: the recipe does not quantize the site, or leaves no such choice.
        """
        found, name = recipe.scheme_of(self.site), self.name
        if found is None:
            raise ArtifactError(f"site {name!r}: recipe {recipe.name!r} does not quantize it")
        scale, clip = found.activations.scale, found.activations.clip
        choices = ("per_step", "per_token") if scale == "per_step_or_token" else (scale,)
        if self.activation_scale not in choices:
            raise ArtifactError(
                f"site {name!r}: omega_config.json has activation_scale "
                f"{self.activation_scale!r}, its recipe {scale!r}"
            )
        stored, searched = self.activation_clip, clip == "search"
        if searched != (stored is not None):
            raise ArtifactError(
                f"site {name!r}: omega_config.json has activation_clip {stored!r}, its recipe "
                f"clip {clip!r}"
            )
        chosen = {"scale": self.activation_scale, "clip": stored if searched else clip}
        activations = found.activations.model_copy(update=chosen)
        return found.model_copy(update={"activations": activations})

    def layout(self, recipe: Recipe, stored: Layout, *, biased: bool | None = None) -> Layout:
        """The site's tensors by their full names.

        Args:
            recipe: of the artifact or the journal.
            stored: every tensor there is; only the number of flow times is taken from it, and,
                where ``biased`` is None, whether there is a bias.
            biased: whether one of its linears has a bias.

        Raises:
            ArtifactError: as ``scheme``.
        """
        name, flat = self.name, TensorSpec(torch.float32, (0,))
        times = stored.get(f"{name}.{TIMES}", flat).shape
        kinds = site_layout(
            self.scheme(recipe),
            self.in_features,
            self.splits,
            f"{name}.bias" in stored if biased is None else biased,
            times[0] if len(times) == 1 else 0,
        )
        return {f"{name}.{kind}": spec for kind, spec in kinds.items()}


def require_layout(stored: Layout, expected: Layout) -> None:
    """Hold tensors against those expected, which may be a part of all.

    Raises:
        ArtifactError: one is missing, of another type or of another shape; gives both.
    """
    for name, spec in expected.items():
        if name not in stored:
            raise ArtifactError(f"tensor {name} is missing, expected {spec}")
        if stored[name] != spec:
            raise ArtifactError(f"{name} is {stored[name]}, expected {spec}")


def require_values(record: SiteRecord, tensors: Mapping[str, Tensor]) -> None:
    """Hold a site's tensors against what their values may be.

    Args:
        record: of the site.
        tensors: by kind, of the right types and shapes.

    Raises:
        ArtifactError: one holds values that it cannot have; names it.
    """
    name, shape = record.name, [sum(record.splits), record.in_features]
    if tensors["weight_shape"].tolist() != shape:
        found = tensors["weight_shape"].tolist()
        raise ArtifactError(f"{name}.weight_shape is {found}, expected {shape}")
    times, scale = tensors.get(TIMES), tensors.get("activation_scale")
    if times is not None and (len(times) == 0 or bool((times.diff() >= 0).any())):
        raise ArtifactError(f"{name}.{TIMES} must be descending flow times")
    if scale is not None and not bool((scale > 0).all()):
        raise ArtifactError(f"{name}.activation_scale must be positive")
    order = tensors.get("permutation")
    if order is not None:
        whole = torch.arange(len(order), dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort().values, whole):
            raise ArtifactError(f"{name}.permutation is not one of {len(order)} channels")


def site_tensors(quantized: QuantizedSite) -> dict[str, Tensor]:
    """A site's tensors by kind, as they are stored."""
    integers, transform = quantized.weight.integers, quantized.transform
    branch, rotation = quantized.low_rank, quantized.output_rotation
    half = torch.bfloat16
    found = {
        "weight_packed": pack_int4(integers) if quantized.weight_bits == 4 else integers,
        "weight_scale": quantized.weight.scale,
        "weight_shape": torch.tensor([sum(quantized.splits), quantized.in_features]),
        "transform": None if transform is None else transform.matrix.to(half),
        "permutation": None
        if transform is None or transform.permutation is None
        else transform.permutation.to(torch.int32),
        "low_rank_down": None if branch is None else branch.down.to(half),
        "low_rank_up": None if branch is None else branch.up.to(half),
        "activation_scale": quantized.activation_scale,
        "activation_offset": None if quantized.offset is None else quantized.offset.to(half),
        TIMES: quantized.activation_times,
        "bias": quantized.bias,
        "output_rotation": None if rotation is None else rotation.matrix,
    }
    return {kind: tensor.contiguous() for kind, tensor in found.items() if tensor is not None}


def restored_site(
    record: SiteRecord, recipe: Recipe, tensors: Mapping[str, Tensor]
) -> QuantizedSite:
    """The site that ``site_tensors`` was given.

    Args:
        record: of the site.
        recipe: it was quantized with.
        tensors: by kind, held against their layout before.

    Raises:
        ArtifactError: as ``SiteRecord.scheme`` and ``require_values``.
    """
    require_values(record, tensors)
    scheme, outputs = record.scheme(recipe), sum(record.splits)
    packed = tensors["weight_packed"]
    if scheme.weights.bits == 4:
        packed = unpack_int4(packed, (outputs, stored_width(scheme, record.in_features)))
    transform = branch = rotation = None
    if "transform" in tensors:
        order = tensors.get("permutation")
        transform = BlockTransform(
            tensors["transform"].to(torch.float32),
            None if order is None else order.to(torch.int64),
            scheme.transform.block,
            record.in_features,
        )
    if "low_rank_down" in tensors:
        down, up = tensors["low_rank_down"], tensors["low_rank_up"]
        branch = LowRankBranch(down.to(torch.float32), up.to(torch.float32))
    if "output_rotation" in tensors:
        rotation = OutputRotation(tensors["output_rotation"], outputs)
    offset = tensors.get("activation_offset")
    return QuantizedSite(
        site=record.site,
        in_features=record.in_features,
        splits=record.splits,
        weight=QuantizedWeight(
            packed, tensors["weight_scale"], scheme.weights.group, record.note or None
        ),
        weight_bits=scheme.weights.bits,
        transform=transform,
        bias=tensors.get("bias"),
        activations=scheme.activations,
        activation_scale=tensors.get("activation_scale"),
        activation_times=tensors.get(TIMES),
        output_rotation=rotation,
        low_rank=branch,
        offset=None if offset is None else offset.to(torch.float32),
        proxy_loss=record.proxy_loss,
        note=record.note,
    )
