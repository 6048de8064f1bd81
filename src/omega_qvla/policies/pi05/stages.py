"""pi0.5 as calibration stages and quantization sites.

The action expert's layers are run over all denoising steps of a trajectory that the full-precision
expert has fixed beforehand.
"""

from __future__ import annotations

import torch

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.base import Stage, State
from omega_qvla.policies.layers.stages import GATED, layer_sites
from omega_qvla.policies.paligemma.names import EXPERT, EXPERT_LAYERS
from omega_qvla.policies.paligemma.stages import prefix_stages
from omega_qvla.policies.pi05.network import Pi05Module

MODULATION_PATHS = ("time_mlp_in", "time_mlp_out")
"""What turns flow time into the condition of the adaptive norms."""
ADAPTIVE = {".dense.": "adaptive norms", "time_mlp": "adaptive norms"}
"""Part of a name → component, of what stands beside PaliGemma."""


def pi05_stages(module: Pi05Module, clock: FlowClock, steps: int) -> list[Stage]:
    """The forward pass as calibration stages.

    The state of one observation starts with ``pixels`` [1, V, 3, S, S], ``token_ids`` [1, T] and
    ``noise`` [1, H, A]; stages add what later ones read and drop what none does.
    """

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

    reads = (EXPERT, *MODULATION_PATHS, "action_in_proj", "action_out_proj")
    return [
        *prefix_stages(module),
        Stage("denoising trajectory", trajectory, reads=reads),
        *(expert_layer(i) for i in range(module.config.depth)),
    ]
