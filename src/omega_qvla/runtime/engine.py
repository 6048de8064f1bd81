"""Quantized policies: built from a quantization or from an artifact, run on integers.

``QuantizedPolicy`` is the policy's own graph with integer modules in place of its linears; the
full-precision weights they replace are gone.  ``SimulatedPolicy`` is what a recipe that cannot
exist as integers gives: it can be run and compared, never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.artifact.checkpoint import Artifact, read_artifact, write_artifact
from omega_qvla.errors import ArtifactError, NotRealizableError, PolicyError, ResourceError
from omega_qvla.policies.base import Observation, Policy, QuantizationSite
from omega_qvla.policies.loading import policy_skeleton
from omega_qvla.policies.step_table import HasStepTable, StepTable
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.simulation import SimulatedLinear, install
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.card import model_card
from omega_qvla.runtime.linear import QuantizedEmbedding, QuantizedLinear
from omega_qvla.runtime.memory import memory_report, reference_parameters

KERNEL = "reference"
_STEP_TABLE = "step_table"


@dataclass(frozen=True)
class SiteRecord:
    """What ``omega_config.json`` says about one quantized site."""

    site: QuantizationSite
    in_features: int
    splits: tuple[int, ...]
    activation_bits: int
    activation_scale: str
    group: int | None
    proxy_loss: float | None
    note: str

    def dump(self) -> dict[str, Any]:
        return {
            "name": self.site.name,
            "linears": list(self.site.linears),
            "component": self.site.component,
            "per_step": self.site.per_step,
            "in_features": self.in_features,
            "splits": list(self.splits),
            "activation_bits": self.activation_bits,
            "activation_scale": self.activation_scale,
            "group": self.group,
            "proxy_loss": self.proxy_loss,
            "note": self.note,
        }

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> SiteRecord:
        site = QuantizationSite(
            str(content["name"]),
            tuple(str(name) for name in content["linears"]),
            content["component"],
            bool(content["per_step"]),
        )
        group = content["group"]
        return cls(
            site=site,
            in_features=int(content["in_features"]),
            splits=tuple(int(width) for width in content["splits"]),
            activation_bits=int(content["activation_bits"]),
            activation_scale=str(content["activation_scale"]),
            group=None if group is None else int(group),
            proxy_loss=content["proxy_loss"],
            note=str(content["note"]),
        )


class QuantizedPolicy:
    """A policy that multiplies integers.

    Attributes:
        policy: the graph with integer modules installed.
        config: the content of ``omega_config.json``.
        sites: the quantized sites.
        content_hash: hash of the artifact it was loaded from, or None before it is saved.
    """

    def __init__(
        self, policy: Policy, config: dict[str, Any], content_hash: str | None = None
    ) -> None:
        self.policy = policy
        self.config = config
        self.sites = tuple(SiteRecord.parse(item) for item in config["sites"])
        self.content_hash = content_hash

    def __getattr__(self, name: str) -> Any:
        """Whatever the policy offers beyond this class (``noise_shape``, ``processor``, …)."""
        if name == "policy":
            raise AttributeError(name)
        return getattr(self.policy, name)

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """One action chunk; see the policy's own ``sample_actions``."""
        return self.policy.sample_actions(observation, noise, steps=steps, generator=generator)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the artifact atomically; an earlier one is replaced only when this is complete.

        Raises:
            ResourceError: not enough disk.
            ArtifactError: the directory holds something that is not an artifact.
        """
        _, processor = self.policy.describe()
        target = Path(directory)
        write_artifact(
            target,
            config=self.config,
            tensors=self.tensors(),
            processor=processor,
            card=model_card(self.config),
        )
        return target

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the artifact by name.

        Floating-point tensors whose values are all exact in bfloat16 are stored as such.
        """
        names = {record.site.linears[0]: record.site.name for record in self.sites}
        stored: dict[str, Tensor] = {}
        for path, module in self.policy.module.named_modules():
            if isinstance(module, QuantizedLinear):
                for kind, tensor in module.named_buffers():
                    stored[f"{names[path]}.{kind}"] = tensor
                shape = [module.out_features, module.in_features]
                stored[f"{names[path]}.weight_shape"] = torch.tensor(shape)
        for name, tensor in self.policy.module.state_dict().items():
            if name.rpartition(".")[0] not in names:
                stored[name] = _narrowed(tensor)
        table = self.policy.step_table if isinstance(self.policy, HasStepTable) else None
        if table is not None:
            stored[f"{_STEP_TABLE}.times"] = table.times
            stored[f"{_STEP_TABLE}.values"] = table.values
        return {name: tensor.detach().contiguous() for name, tensor in stored.items()}

    def memory_report(self) -> dict[str, Any]:
        """Bytes per component of the whole checkpoint, and the paper's narrower count.

        Keys as in ``inspect --json`` (docs/json.md).
        """
        return memory_report(self.config, self.tensors(), self.policy.component_of)

    def resident_bytes(self) -> int:
        """Bytes of all tensors held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class SimulatedPolicy:
    """A quantized policy in floating point: to be compared with, never to be shipped."""

    def __init__(self, quantization: Quantization) -> None:
        self.policy = quantization.simulated
        self.recipe = quantization.recipe

    def __getattr__(self, name: str) -> Any:
        if name == "policy":
            raise AttributeError(name)
        return getattr(self.policy, name)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Always refused.

        Raises:
            NotRealizableError: says which scale stands in the way.
        """
        raise NotRealizableError(
            f"recipe {self.recipe.name!r} is a simulation and cannot be saved to {directory} as "
            f"integers: {_obstacle(self.recipe)}. Use a realizable recipe such as 'omega-w4a4'"
        )

    def resident_bytes(self) -> int:
        """Bytes of the float tensors the simulation really holds."""
        module: nn.Module = self.policy.module
        held = sum(tensor.nbytes for tensor in module.state_dict().values())
        return held + sum(
            child.held_bytes() for child in module.modules() if isinstance(child, SimulatedLinear)
        )


def build(policy: Policy, quantization: Quantization) -> QuantizedPolicy | SimulatedPolicy:
    """Turn a quantization of ``policy`` into something that runs.

    Realizable recipes give integers; the others their simulation.
    """
    if not quantization.recipe.realizable:
        return SimulatedPolicy(quantization)
    config = _config(policy, quantization)
    target = policy.clone()
    for site in quantization.sites:
        linear = QuantizedLinear.from_site(site, target.clock)
        install(target.module, site.site.linears, linear)
    if quantization.embedding is not None:
        rows = quantization.embedding
        install(target.module, [rows.path], QuantizedEmbedding(rows.integers, rows.scale))
    if quantization.step_table is not None:
        _require_table(target).use_step_table(quantization.step_table)
    return QuantizedPolicy(target, config)


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    policy: Policy | None = None,
    verify: bool = True,
) -> QuantizedPolicy:
    """Load an artifact; the full-precision checkpoint is never needed.

    Args:
        directory: what ``save_pretrained`` wrote.
        device: only ``cpu`` in this version.
        policy: for artifacts of a ``TorchPolicy``: the user's policy, which gives the structure
            (its own weights are replaced).
        verify: check every byte against its SHA-256 while loading.

    Raises:
        NotAnArtifactError: the directory is not an artifact.
        ArtifactError: something is missing, extra, misshaped or damaged; names it.
        ResourceError: the device is not available.
    """
    if device != "cpu":
        raise ResourceError(
            f"device {device!r} is not supported by this version: its integer kernel runs on 'cpu'"
        )
    artifact = read_artifact(Path(directory), verify=verify)
    try:
        return _rebuild(artifact, policy)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{directory}: omega_config.json does not fit the tensors: "
            f"{type(error).__name__}: {error}"
        ) from error


def _rebuild(artifact: Artifact, policy: Policy | None) -> QuantizedPolicy:
    config = artifact.config
    family = str(config["policy"]["family"])
    target = _structure(family, config, artifact, policy)
    remaining = dict(artifact.tensors)
    if config["adaptive_norm"] == "table":
        times = remaining.pop(f"{_STEP_TABLE}.times")
        values = remaining.pop(f"{_STEP_TABLE}.values")
        _require_table(target).use_step_table(StepTable(times, values))
    for item in config["sites"]:
        record = SiteRecord.parse(item)
        linear = _load_linear(record, remaining, target)
        install(target.module, record.site.linears, linear)
    if config["embedding"] is not None:
        path = str(config["embedding"]["path"])
        rows = remaining.pop(f"{path}.weight"), remaining.pop(f"{path}.weight_scale")
        install(target.module, [path], QuantizedEmbedding(*rows))
    _assign(target.module, remaining)
    target.module.eval().requires_grad_(False)
    return QuantizedPolicy(target, config, artifact.content_hash)


def _structure(
    family: str, config: Mapping[str, Any], artifact: Artifact, policy: Policy | None
) -> Policy:
    if policy is not None:
        if policy.family != family:
            raise PolicyError(f"the artifact holds a {family!r} policy, not {policy.family!r}")
        return policy.clone()
    if family == "torch":
        raise PolicyError(
            "this artifact was made from a module of your own: give its structure with "
            "load(directory, policy=TorchPolicy(module, ...)); its weights are not used"
        )
    return policy_skeleton(family, config["policy"]["config"], artifact.processor)


def _require_table(policy: Policy) -> HasStepTable:
    if not isinstance(policy, HasStepTable):
        raise PolicyError(f"a {policy.family} policy has no adaptive norms to tabulate")
    return policy


def _load_linear(record: SiteRecord, tensors: dict[str, Tensor], policy: Policy) -> QuantizedLinear:
    def take(kind: str) -> Tensor | None:
        return tensors.pop(f"{record.site.name}.{kind}", None)

    packed, scale, shape = take("weight_packed"), take("weight_scale"), take("weight_shape")
    if packed is None or scale is None or shape is None:
        raise ArtifactError(f"site {record.site.name!r} lacks weight_packed, _scale or _shape")
    expected = [sum(record.splits), record.in_features]
    if shape.tolist() != expected or packed.shape[0] != expected[0]:
        raise ArtifactError(
            f"{record.site.name}.weight_packed {list(packed.shape)} with weight_shape "
            f"{shape.tolist()} does not hold the {expected} weight of omega_config.json"
        )
    return QuantizedLinear(
        weight_packed=packed,
        weight_scale=scale,
        in_features=record.in_features,
        splits=record.splits,
        activation_bits=record.activation_bits,
        transform=take("transform"),
        activation_scale=take("activation_scale"),
        activation_step_times=take("activation_step_times"),
        bias=take("bias"),
        group=record.group,
        clock=policy.clock,
    )


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the module's unquantized parameters and buffers their tensors, all of them."""
    quantized = {
        f"{path}.{kind}"
        for path, child in module.named_modules()
        if isinstance(child, QuantizedLinear | QuantizedEmbedding)
        for kind, _ in child.named_buffers()
    }
    expected = {k: v for k, v in module.state_dict().items() if k not in quantized}
    missing, extra = sorted({*expected} - {*tensors}), sorted({*tensors} - {*expected})
    if missing or extra:
        raise ArtifactError(f"tensors do not fit the policy: missing {missing}, extra {extra}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise ArtifactError(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
            )
    widened = {
        name: value.to(torch.float32) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    module.load_state_dict(widened, strict=False, assign=True)


def _config(policy: Policy, quantization: Quantization) -> dict[str, Any]:
    structure, _ = policy.describe()
    recipe = quantization.recipe
    return {
        "library_version": version("omega-qvla"),
        "policy": {"family": policy.family, "config": structure},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.content_hash,
        "calibration": {
            "fingerprint": quantization.calibration,
            "observations": quantization.observations,
        },
        "sites": [
            SiteRecord(
                site=site.site,
                in_features=site.in_features,
                splits=site.splits,
                activation_bits=site.activations.bits,
                activation_scale=site.activations.scale,
                group=site.weight.group,
                proxy_loss=site.proxy_loss,
                note=site.note,
            ).dump()
            for site in quantization.sites
        ],
        "embedding": None
        if quantization.embedding is None
        else {"path": quantization.embedding.path, "bits": 8},
        "adaptive_norm": "keep" if quantization.step_table is None else "table",
        "reference_parameters": reference_parameters(policy),
    }


def _obstacle(recipe: Recipe) -> str:
    reasons: list[tuple[Callable[[Any], bool], str]] = [
        (
            lambda scheme: not scheme.activations.realizable,
            "has one activation scale per input channel, which sits inside the sum over channels "
            "and cannot be taken out of an integer product",
        ),
        (
            lambda scheme: scheme.transform.output_rotation,
            "rotates its output, which the integer runtime does not do",
        ),
    ]
    found = []
    for component in ("vision", "projector", "backbone", "action_head"):
        scheme = recipe.scheme(component)
        if scheme is not None:
            found += [f"{component} {text}" for applies, text in reasons if applies(scheme)]
    return "; ".join(found)


def _narrowed(tensor: Tensor) -> Tensor:
    """bfloat16 if that loses nothing, else the tensor itself."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(torch.float32), tensor) else tensor
