"""Quantized policies: built from a quantization or from an artifact, run on integers.

``QuantizedPolicy`` is the policy's own graph with integer modules in place of its linears; the
full-precision weights they replace are gone.  ``SimulatedPolicy`` is what a recipe that cannot
exist as integers gives: it can be run and compared, never saved.  Artifacts come back to life in
``load.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.artifact.directory import write_artifact
from omega_qvla.artifact.layout import Layout, TensorSpec
from omega_qvla.checkpoints.weight_store import materialize
from omega_qvla.claims import Claim
from omega_qvla.errors import NotRealizableError, PolicyError
from omega_qvla.policies.base import Observation, Policy, sites_of
from omega_qvla.policies.layers.elementwise import use_elementwise
from omega_qvla.policies.layers.step_table import HasStepTable
from omega_qvla.policies.slots import PATH_IN_SLOT, storable
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.attention import scale_attention
from omega_qvla.quantization.pipeline import Quantization, simulate
from omega_qvla.quantization.simulation import SimulatedLinear, install, install_site
from omega_qvla.quantization.stored import SiteRecord
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.runtime.card import model_card
from omega_qvla.runtime.description import coverage_faults, describe
from omega_qvla.runtime.foreign import align
from omega_qvla.runtime.fused import CpuElementwise
from omega_qvla.runtime.lerobot_files import lerobot_files
from omega_qvla.runtime.linear import REFERENCE, QuantizedLinear, best_kernel
from omega_qvla.runtime.memory import STEP_TABLE, MemorySummary, memory_report
from omega_qvla.runtime.prediction import narrowed
from omega_qvla.runtime.token_embedding import QuantizedEmbedding

T = TypeVar("T")


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
        self.sites = tuple(SiteRecord.model_validate(item) for item in config["sites"])
        self.content_hash = content_hash

    def __repr__(self) -> str:
        recipe, family = self.config["recipe"]["name"], self.config["policy"]["family"]
        size = f"{self.resident_bytes() / 1e6:.3g} MB"
        return f"<QuantizedPolicy {family}, {recipe}: {len(self.sites)} sites, {size}>"

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
        previous: np.ndarray | Tensor | None = None,
        delay: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> Any:
        """One action chunk; see the policy's own ``sample_actions``."""
        return self.policy.sample_actions(
            observation,
            noise,
            steps=steps,
            generator=generator,
            previous=previous,
            delay=delay,
            chunking=chunking,
        )

    def save_pretrained(self, directory: str | Path, *, claim: Claim | None = None) -> Path:
        """Write the artifact atomically; an earlier one is replaced only when this is complete.

        Args:
            directory: new, empty, or an earlier artifact.
            claim: on the directory, where the caller has it; taken for the time of writing
                otherwise.

        Raises:
            OutputError: another process or thread is writing there; says which.
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
            lerobot=lerobot_files(self.policy),
            claim=claim,
        )
        return target

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the artifact by name.

        float32 tensors whose values are all exact in bfloat16, or else in float16, are stored so.
        """
        return self._collect(QuantizedLinear.stored, lambda tensor: tensor.detach().contiguous())

    def layout(self) -> Layout:
        """What ``tensors`` gives, without unpacking a weight."""
        return self._collect(
            QuantizedLinear.layout, lambda tensor: TensorSpec(tensor.dtype, tuple(tensor.shape))
        )

    def _collect(
        self,
        of_linear: Callable[[QuantizedLinear], Mapping[str, T]],
        of_tensor: Callable[[Tensor], T],
    ) -> dict[str, T]:
        names = {path: record.site.name for record in self.sites for path in record.site.linears}
        integers = set(names)
        found: dict[str, T] = {}
        for path, module in self.policy.module.named_modules():
            if isinstance(module, QuantizedEmbedding):
                rows = module.named_buffers()
                found |= {f"{path}.{kind}": of_tensor(tensor) for kind, tensor in rows}
                integers.add(path)
            if isinstance(module, QuantizedLinear):
                site = names[path.removesuffix(PATH_IN_SLOT)]
                kinds = of_linear(module)
                found |= {f"{site}.{kind}": value for kind, value in kinds.items()}
        for name, tensor in self.policy.module.state_dict().items():
            if name.rpartition(".")[0] not in integers:
                found[name] = of_tensor(narrowed(storable(tensor)))
        table = self.policy.step_table if isinstance(self.policy, HasStepTable) else None
        if table is not None:
            found[f"{STEP_TABLE}.times"] = of_tensor(table.times)
            found[f"{STEP_TABLE}.values"] = of_tensor(table.values)
        return found

    def memory_report(self, *, directory_bytes: int | None = None) -> MemorySummary:
        """Bytes per component of the whole checkpoint, and the paper's narrower count.

        Keys as in ``inspect --json`` (docs/json.md).  ``directory_bytes``, the size of the saved
        directory, adds a row for everything that is not tensors.
        """
        return memory_report(self.config, self.layout(), directory_bytes=directory_bytes)

    def resident_bytes(self) -> int:
        """Bytes of all tensors held in memory."""
        return sum(spec.nbytes for spec in self.layout().values())

    @property
    def kernel(self) -> str:
        """Names of the kernels that multiply this policy's integers, most used first."""
        return kernels_of(self.policy.module)


class SimulatedPolicy:
    """A quantized policy in floating point: to be compared with, never to be shipped."""

    def __init__(self, policy: Policy, quantization: Quantization) -> None:
        self.policy = simulate(policy, quantization)
        self.recipe = quantization.recipe
        use_cpu_elementwise(self.policy.module, best_kernel())

    def __repr__(self) -> str:
        return f"<SimulatedPolicy {self.policy.family}, {self.recipe.name}, in floating point>"

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
            f"integers: {_obstacle(self.recipe)}. Use a realizable one such as {DEFAULT_RECIPE!r}"
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

    Raises:
        PolicyError: the sites are not exactly what the recipe quantizes of this policy.
    """
    if not quantization.recipe.realizable:
        return SimulatedPolicy(policy, quantization)
    config = describe(policy, quantization)
    faults = coverage_faults(sites_of(policy), config)
    target = policy.clone()
    installed = 0
    for site in quantization.sites:
        linear = QuantizedLinear.from_site(site, target.clock)
        install_site(target, site.site.linears, linear)
        installed += 1
    if installed != len(config["sites"]):
        faults.append(f"{installed} of {len(config['sites'])} sites were given")
    if faults:
        raise PolicyError(f"the quantization is not of this policy: {'; '.join(faults)}")
    if quantization.embedding is not None:
        rows = quantization.embedding
        install(target.module, [rows.path], QuantizedEmbedding.from_rows(rows))
    scale_attention(target, quantization.attention)
    if quantization.step_table is not None:
        require_table(target).use_step_table(quantization.step_table)
    if target.store is not None:
        materialize(target.module, target.store)
        target.store = None
    if isinstance(target, TorchPolicy):
        align(target.module)
    use_cpu_elementwise(target.module, best_kernel())
    return QuantizedPolicy(target, config)


def kernels_of(module: nn.Module) -> str:
    """The kernels of a module's quantized linears, most used first, separated by commas."""
    linears = [child for child in module.modules() if isinstance(child, QuantizedLinear)]
    names = Counter(linear.kernel for linear in linears)
    return ", ".join(name for name, _ in names.most_common()) or "none"


def use_cpu_elementwise(module: nn.Module, kernel: str, threads: int | None = None) -> None:
    """What lies between linears by C++ too, where they are; the reference kernel has PyTorch's."""
    if kernel != REFERENCE:
        use_elementwise(module, CpuElementwise(kernel, threads))


def require_table(policy: Policy) -> HasStepTable:
    """The policy, which must have adaptive norms.

    Raises:
        PolicyError: it has none.
    """
    if not isinstance(policy, HasStepTable):
        raise PolicyError(f"a {policy.family} policy has no adaptive norms to tabulate")
    return policy


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
