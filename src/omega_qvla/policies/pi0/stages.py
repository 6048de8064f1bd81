"""pi0 as calibration stages and quantization sites.

The action expert's layers are run over the state's token and over all denoising steps of a
trajectory that the full-precision expert has fixed beforehand.
"""

from __future__ import annotations

import torch

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.base import Stage, State
from omega_qvla.policies.layers.stages import GATED, layer_sites
from omega_qvla.policies.paligemma.names import EXPERT, EXPERT_LAYERS
from omega_qvla.policies.paligemma.stages import prefix_stages
from omega_qvla.policies.pi0.network import STATE_TIME, Pi0Module, joined

PROJECTIONS = (
    "state_proj",
    "action_in_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "action_out_proj",
)
"""What stands before and behind the expert."""


def pi0_stages(module: Pi0Module, clock: FlowClock, steps: int) -> list[Stage]:
    """The forward pass as calibration stages.

    The state of one observation starts with ``pixels`` [1, V, 3, S, S], ``token_ids`` [1, T],
    ``state`` [1, padded_state_dim] and ``noise`` [1, H, A]; stages add what later ones read and
    drop what none does.
    """

    def trajectory(state: State) -> State:
        """The full-precision expert over the quantized prefix fixes what each step will see."""
        prefix, x, hidden = state["prefix"].shape[1], state["noise"], []
        cache = module.with_state(state["cache"], state["state"], prefix)
        rotary = module.suffix_rotary(prefix + 1)
        codes = module.time_code(torch.tensor(euler_times(steps), device=x.device))
        for i in range(steps):
            hidden.append(module.embed_actions(x, codes[i : i + 1]))
            x = x - module.velocity(x, codes[i : i + 1], cache, rotary) / steps
        return {
            "cache": state["cache"],
            "state": module.embed_state(state["state"]),
            "state_rotary": module.state_rotary(prefix),
            "rotary": rotary,
            "hidden": tuple(hidden),
        }

    def expert_layer(i: int) -> Stage:
        def run(state: State) -> State:
            layer, past, hidden = module.expert_layers[i], state["cache"][i], []
            with clock.step(0, STATE_TIME):
                token, own = layer(state["state"], state["state_rotary"], None, past)
            seen = joined(past, own)
            for step, t in enumerate(euler_times(steps)):
                with clock.step(step, t):
                    x, _ = layer(state["hidden"][step], state["rotary"], None, seen)
                    hidden.append(x)
            return {**state, "state": token, "hidden": tuple(hidden)}

        path = f"{EXPERT_LAYERS}.{i}"
        sites = layer_sites(path, "action_head", GATED, per_step=True)
        return Stage(f"action expert layer {i}", run, sites, (path,))

    return [
        *prefix_stages(module),
        Stage("denoising trajectory", trajectory, reads=(EXPERT, *PROJECTIONS)),
        *(expert_layer(i) for i in range(module.config.depth)),
    ]
