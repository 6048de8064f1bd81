"""Artifacts back to life: each tensor is held against what recipe and policy imply, then placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.artifact import Artifact, read_artifact
from omega_qvla.devices import check_memory
from omega_qvla.errors import ArtifactError, PolicyError, ResourceError
from omega_qvla.policies.base import Policy, sites_of
from omega_qvla.policies.full_precision import policy_skeleton
from omega_qvla.policies.layers.elementwise import use_elementwise
from omega_qvla.policies.layers.step_table import StepTable
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.slots import storable
from omega_qvla.policies.torch_module import FOREIGN, TorchPolicy
from omega_qvla.quantization.simulation import install, install_site
from omega_qvla.quantization.stored import SiteRecord, require_values
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.description import coverage_faults, require_tensors
from omega_qvla.runtime.engine import QuantizedPolicy, require_table, use_cpu_elementwise
from omega_qvla.runtime.foreign import fitted, laid_out, of_artifact
from omega_qvla.runtime.fused import FusedElementwise
from omega_qvla.runtime.graph import use_graphs
from omega_qvla.runtime.kernels import triton_gpu
from omega_qvla.runtime.linear import GpuRun, QuantizedLinear, best_kernel
from omega_qvla.runtime.memory import STEP_TABLE
from omega_qvla.runtime.token_embedding import QuantizedEmbedding

GPU_WORKSPACE = 1 << 30
"""Bytes a policy on a GPU is assumed to need beside its tensors: activations, keys and values, the
programs.  Not measured."""


@dataclass(frozen=True)
class _Run:
    """How the linears of a policy multiply."""

    kernel: str | None
    threads: int | None
    gpu: GpuRun | None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else self.gpu.gpu.device


def load(
    directory: str | Path,
    *,
    device: str = "cpu",
    policy: Policy | None = None,
    verify: bool = True,
    kernel: str | None = None,
    threads: int | None = None,
    tuning: str | Path | None = None,
    graph: bool = True,
) -> QuantizedPolicy:
    """Load an artifact; the full-precision checkpoint is never needed.

    Args:
        directory: what ``save_pretrained`` wrote.
        device: ``cpu``, or ``cuda`` or ``cuda:N`` for a native policy on an NVIDIA GPU
            (docs/gpu.md).
        policy: for artifacts of a ``TorchPolicy``: the user's policy, which gives structure and
            ``sample``.  Its weights are not used; what no state dict holds (buffers that are not
            persistent, constants) is.
        verify: check every byte against its SHA-256 while loading.
        kernel: ``reference``, an instruction set of this processor, or on a GPU ``triton``; None
            takes the best.
        threads: of the C++ kernels; None follows ``torch.get_num_threads()``.
        tuning: on a GPU, a folder of yours where measured tilings are kept; a shape that is not
            there is measured when it is first multiplied.  None measures nothing and uses tilings
            from arithmetic.
        graph: on a GPU, capture a chunk once per shape and replay it (``runtime/graph.py``); a
            ``GraphWarning`` says when.

    Raises:
        NotAnArtifactError: the directory is not an artifact.
        ArtifactError: something is missing, extra, misshaped or damaged; names it.
        ResourceError: the device or the kernel is not available, too little memory there, more
            threads than cores, or nothing can be written to ``tuning``.
        PolicyError: a layer that the GPU kernels cannot do; a module of the user's own on a GPU, or
            another one than was quantized.
    """
    gpu = None if device == "cpu" else _gpu_run(device, tuning)
    if gpu is None and tuning is not None:
        raise ResourceError("tuning is for GPUs: give device='cuda' as well, or leave it out")
    artifact = read_artifact(Path(directory), verify=verify)
    if gpu is not None:
        _require_native(artifact.config, device)
        check_memory(gpu.gpu, _gpu_bytes(artifact), f"{directory} with its workspace")
    try:
        loaded = _rebuild(artifact, policy, _Run(kernel, threads, gpu))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{directory}: omega_config.json does not fit the tensors: "
            f"{type(error).__name__}: {error}"
        ) from error
    if gpu is None:
        use_cpu_elementwise(loaded.policy.module, kernel or best_kernel(), threads)
    else:
        use_elementwise(loaded.policy.module, FusedElementwise())
        if graph and isinstance(loaded.policy, NativePolicy):
            use_graphs(loaded.policy)
    return loaded


def _gpu_run(device: str, tuning: str | Path | None) -> GpuRun:
    gpu = triton_gpu.find(device)
    return GpuRun(gpu, None if tuning is None else triton_gpu.tuner(gpu, Path(tuning)))


def _require_native(config: Mapping[str, Any], device: str) -> None:
    if config["policy"]["family"] in FOREIGN:
        raise PolicyError(
            f"device {device!r} is for the policies of this project; a module of your own, or of "
            "LeRobot's, makes its tensors where it likes, so it is loaded on 'cpu' only"
        )


def _gpu_bytes(artifact: Artifact) -> int:
    """GPU memory a policy takes: its tensors, unquantized ones widened to float32, and room."""
    sites = {str(site["name"]) for site in artifact.config["sites"]}
    embedding = artifact.config["embedding"]
    integers = sites if embedding is None else sites | {str(embedding["path"])}
    halves = (torch.bfloat16, torch.float16)
    return GPU_WORKSPACE + sum(
        tensor.nbytes
        if name.rpartition(".")[0] in integers or tensor.dtype not in halves
        else 2 * tensor.nbytes
        for name, tensor in artifact.tensors.items()
    )


def _rebuild(artifact: Artifact, policy: Policy | None, run: _Run) -> QuantizedPolicy:
    config = artifact.config
    family = str(config["policy"]["family"])
    target = _structure(family, config, artifact, policy)
    faults = coverage_faults(sites_of(target), config)
    if faults:
        raise ArtifactError(f"{artifact.root}: omega_config.json: {'; '.join(faults)}")
    require_tensors(target, config, artifact.manifest.layout)
    recipe = Recipe.model_validate(config["recipe"])
    records = [SiteRecord.model_validate(item) for item in config["sites"]]
    embedding = None if config["embedding"] is None else str(config["embedding"]["path"])
    # The artifact gives its tensors away: one that has been repacked must not stay mapped.
    remaining = {name: tensor.to(run.device) for name, tensor in artifact.tensors.items()}
    artifact.tensors.clear()
    parts: dict[str, dict[str, Tensor]] = {record.site.name: {} for record in records}
    parts |= {owner: {} for owner in (embedding, STEP_TABLE) if owner is not None}
    for name in [*remaining]:
        owner, _, kind = name.rpartition(".")
        if owner in parts:
            parts[owner][kind] = remaining.pop(name)
    if config["adaptive_norm"] == "table":
        require_table(target).use_step_table(StepTable(**parts[STEP_TABLE]))
    for record in records:
        own = parts.pop(record.site.name)
        require_values(record, own)
        linear = QuantizedLinear.from_tensors(
            own,
            activations=record.scheme(recipe).activations,
            group=record.group,
            splits=record.splits,
            clock=target.clock,
            kernel=run.kernel,
            threads=run.threads,
            gpu=run.gpu,
        )
        del own
        linear.prepare()
        install_site(target, record.site.linears, linear)
    if embedding is not None:
        width = target.module.get_parameter(f"{embedding}.weight").shape[1]
        install(target.module, [embedding], QuantizedEmbedding(**parts[embedding], width=width))
    _assign(target.module, remaining)
    target.module.eval().requires_grad_(False)
    return QuantizedPolicy(target, config, artifact.content_hash)


def _structure(
    family: str, config: Mapping[str, Any], artifact: Artifact, policy: Policy | None
) -> Policy:
    if policy is not None:
        if policy.family != family:
            raise PolicyError(f"the artifact holds a {family!r} policy, not {policy.family!r}")
        return fitted(policy, config) if isinstance(policy, TorchPolicy) else policy.clone()
    if family == TorchPolicy.family:
        raise PolicyError(
            "this artifact was made from a module of your own: give its structure in Python with "
            "load(directory, policy=TorchPolicy(module, ...)), the same module, patterns and "
            "sample; its weights are not used. Serving, episodes and benchmarks are for this "
            "project's own policies: sample yours in your own loop, with sample_actions"
        )
    if family == LeRobotPolicy.family:
        return of_artifact(
            LeRobotPolicy.skeleton(config["policy"]["config"], artifact.processor), config
        )
    found = policy_skeleton(family, config["policy"]["config"], artifact.processor)
    found.decisions = dict(config["policy"].get("decisions", {}))
    return found


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the module's unquantized parameters and buffers their tensors, all of them."""
    quantized = {
        path
        for path, child in module.named_modules()
        if isinstance(child, QuantizedLinear | QuantizedEmbedding)
    }
    state = module.state_dict()
    expected = {k: v for k, v in state.items() if k.rpartition(".")[0] not in quantized}
    missing, extra = sorted({*expected} - {*tensors}), sorted({*tensors} - {*expected})
    if missing or extra:
        raise ArtifactError(f"tensors do not fit the policy: missing {missing}, extra {extra}")
    for name, tensor in expected.items():
        wanted = storable(tensor)
        if wanted.shape != tensors[name].shape:
            raise ArtifactError(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(wanted.shape)}"
            )
        if _kind(wanted) != _kind(tensors[name]):
            raise ArtifactError(f"{name} is {tensors[name].dtype}, expected {wanted.dtype}")
    narrow = {
        f"{path}.{kind}"
        for path, child in module.named_modules()
        if getattr(child, "any_precision", False)
        for kind, _ in child.named_parameters(recurse=False)
    }
    placed = {
        name: value if name in narrow else laid_out(_widened(value, expected[name]), expected[name])
        for name, value in tensors.items()
    }
    module.load_state_dict(placed, strict=False, assign=True)


def _kind(tensor: Tensor) -> str:
    """What a tensor counts with; floating-point ones are stored as narrow as is exact."""
    return "floating point" if tensor.is_floating_point() else str(tensor.dtype)


def _widened(stored: Tensor, like: Tensor) -> Tensor:
    """A stored tensor in the dtype it had; complex numbers come as pairs."""
    if like.is_complex():
        return torch.view_as_complex(stored.to(storable(like).dtype).contiguous())
    return stored.to(like.dtype)
