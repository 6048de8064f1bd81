"""pi0.5 as calibration stages and quantization sites.

One stage per transformer layer, so that calibration holds one layer's activations at a time; one
site per set of linears that read the same input (q/k/v, gate/up).  The action expert's layers are
run over all denoising steps of a trajectory that the full-precision expert has fixed beforehand.
"""

from __future__ import annotations

import torch

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.base import QuantizationSite, Stage, State
from omega_qvla.policies.layers.stages import GATED, KEY_VALUE, layer_sites, vision_stages
from omega_qvla.policies.pi05.network import Pi05Module

EXPERT_LAYERS = "paligemma_with_expert.gemma_expert.model.layers"
MODULATION_PATHS = ("time_mlp_in", "time_mlp_out")
"""What turns flow time into the condition of the adaptive norms."""


def component_of(parameter: str) -> str:
    """The part of the policy a parameter (or a site's tensor) belongs to, for memory tables."""
    for marker, component in (
        ("vision_tower.", "vision"),
        ("multi_modal_projector.", "projector"),
        ("embed_tokens.", "token embedding"),
        ("language_model.", "backbone"),
        (".dense.", "adaptive norms"),
        ("time_mlp", "adaptive norms"),
        ("gemma_expert.", "action_head"),
    ):
        if marker in parameter:
            return component
    return "action projections"


def pi05_stages(module: Pi05Module, clock: FlowClock, steps: int) -> list[Stage]:
    """The forward pass as calibration stages.

    The state of one observation starts with ``pixels`` [1, V, 3, S, S], ``token_ids`` [1, T] and
    ``noise`` [1, H, A]; stages add what later ones read and drop what none does.
    """
    config = module.config
    root = "paligemma_with_expert"
    tower = f"{root}.paligemma.model.vision_tower.vision_model"
    language = f"{root}.paligemma.model.language_model"
    backbone = f"{language}.layers"

    def project(state: State) -> State:
        normed = module.vision_model.post_layernorm(state["image_tokens"])
        images = module.projector(normed).flatten(0, 1).unsqueeze(0)
        prefix = torch.cat((images, module.embed_text(state["token_ids"])), dim=1)
        return {"prefix": prefix, "cache": (), "noise": state["noise"]}

    def backbone_layer(i: int) -> Stage:
        def run(state: State) -> State:
            prefix = state["prefix"]
            positions = torch.arange(prefix.shape[1], device=prefix.device).unsqueeze(0)
            out, kv = module.backbone_layers[i](prefix, module.prefix_rotary(positions))
            return {**state, "prefix": out, "cache": (*state["cache"], kv)}

        groups = KEY_VALUE if i == config.depth - 1 else GATED
        path = f"{backbone}.{i}"
        return Stage(f"backbone layer {i}", run, layer_sites(path, "backbone", groups), (path,))

    def trajectory(state: State) -> State:
        """The full-precision expert over the quantized prefix fixes what each step will see."""
        times = euler_times(steps)
        modulation = module.step_modulation(torch.tensor(times, device=state["noise"].device))
        rotary = module.suffix_rotary(state["prefix"].shape[1])
        x, hidden = state["noise"], []
        for i in range(steps):
            hidden.append(module.action_in_proj(x))
            x = x - module.velocity(x, modulation[i : i + 1], state["cache"], rotary) / steps
        return {
            "cache": state["cache"],
            "rotary": rotary,
            "hidden": tuple(hidden),
            "modulation": modulation,
        }

    def expert_layer(i: int) -> Stage:
        def run(state: State) -> State:
            hidden = []
            for step, t in enumerate(euler_times(steps)):
                with clock.step(step, t):
                    modulation = state["modulation"][step : step + 1, 2 * i : 2 * i + 2]
                    kv = state["cache"][i]
                    hidden.append(
                        module.expert_layers[i](
                            state["hidden"][step], modulation, state["rotary"], kv
                        )
                    )
            return {**state, "hidden": tuple(hidden)}

        path = f"{EXPERT_LAYERS}.{i}"
        sites = layer_sites(path, "action_head", GATED, per_step=True)
        return Stage(f"action expert layer {i}", run, sites, (path,))

    projector_path = f"{root}.paligemma.model.multi_modal_projector.linear"
    projector_site = QuantizationSite(projector_path, (projector_path,), "projector")
    project_reads = (f"{tower}.post_layernorm", projector_path, f"{language}.embed_tokens")
    expert_reads = (f"{root}.gemma_expert.model", *MODULATION_PATHS, "action_in_proj")
    expert_reads = (*expert_reads, "action_out_proj")
    return [
        *vision_stages(module.vision_model, tower),
        Stage("projector", project, (projector_site,), project_reads),
        *(backbone_layer(i) for i in range(config.depth)),
        Stage("denoising trajectory", trajectory, reads=expert_reads),
        *(expert_layer(i) for i in range(config.depth)),
    ]
