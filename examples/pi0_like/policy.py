"""A policy like pi0, from observation to action chunk, and as calibration stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.flow_time import euler_times
from omega_qvla.policies.base import Observation, QuantizationSite, Stage, State
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.layers.stages import GATED, KEY_VALUE, layer_sites, vision_stages
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi0_like.config import Pi0LikeConfig
from omega_qvla.policies.pi0_like.network import Pi0LikeModule
from omega_qvla.policies.pi0_like.processing import Inputs, Pi0LikeProcessor

Observed = tuple[list[KeyValue], int, Tensor]
"""Keys and values of the prefix, its length, and the state."""


class Pi0LikePolicy(NativePolicy):
    """Full precision, or with quantized modules in place of its linears."""

    family = "pi0_like"
    config_type, module_type, processor_type = Pi0LikeConfig, Pi0LikeModule, Pi0LikeProcessor
    embedding_path = "embed_tokens"
    module: Pi0LikeModule
    processor: Pi0LikeProcessor
    config: Pi0LikeConfig

    def encode_images(self, inputs: Sequence[Tensor]) -> Inputs:
        pixels, token_ids, state = (part.to(self.device) for part in inputs)
        return Inputs(self.module.embed_images(pixels), token_ids, state)

    def prefill(self, encoded: Inputs) -> Observed:
        prefix = self.module.embed_prefix(encoded.pixels, encoded.token_ids)
        return self.module.prefill(prefix), prefix.shape[1], encoded.state

    def make_schedule(self, times: Tensor) -> Tensor:
        return self.module.time_code(times)

    def denoise(
        self, observed: Observed, noise: Tensor, steps: int, guidance: Guidance | None = None
    ) -> Tensor:
        past, length, state = observed
        suffix, codes = self.module.suffix(length), self.schedule(steps)
        cache = [PreallocatedKVCache.after(kv, 1 + self.config.horizon) for kv in past]

        def velocity(x: Tensor, step: int) -> Tensor:
            return self.module.velocity(x, codes[step : step + 1], state, cache, suffix)

        return integrate(velocity, noise, steps, self.clock, guidance)

    def component_of(self, parameter: str) -> str:
        first = parameter.partition(".")[0]
        known = {"embed_tokens": "token embedding", "expert": "action_head"}
        known |= dict.fromkeys(("vision", "projector", "backbone"), first)
        return known.get(first, "action projections")

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {**self.processor.encode(observation)._asdict(), "noise": noise}

    def stages(self) -> list[Stage]:
        depth = self.config.depth
        site = QuantizationSite("projector", ("projector",), "projector")
        reads = ("vision.post_layernorm", "projector", "embed_tokens")
        head = ("expert", "expert_norm", "state_proj", "action_in_proj", "action_out_proj")
        return [
            *vision_stages(self.module.vision, "vision"),
            Stage("projector", self._project, (site,), reads),
            *(self._backbone_layer(i) for i in range(depth)),
            Stage(
                "denoising trajectory",
                self._trajectory,
                reads=(*head, "action_time_mlp_in", "action_time_mlp_out"),
            ),
            *(self._expert_layer(i) for i in range(depth)),
        ]

    def _project(self, state: State) -> State:
        normed = self.module.vision.post_layernorm(state["image_tokens"])
        images = self.module.projector(normed).flatten(0, 1).unsqueeze(0)
        prefix = self.module.embed_prefix(images, state["token_ids"])
        return {"prefix": prefix, "cache": (), "state": state["state"], "noise": state["noise"]}

    def _backbone_layer(self, i: int) -> Stage:
        def run(state: State) -> State:
            prefix, layer = state["prefix"], self.module.backbone[i]
            out, kv = layer(prefix, self.module.prefix_rotary(prefix))
            return {**state, "prefix": out, "cache": (*state["cache"], kv)}

        path = f"backbone.{i}"
        groups = KEY_VALUE if i == self.config.depth - 1 else GATED
        return Stage(f"backbone layer {i}", run, layer_sites(path, "backbone", groups), (path,))

    def _trajectory(self, state: State) -> State:
        """The full-precision expert over the quantized prefix fixes what each step will see."""
        module, steps, x, hidden = self.module, self.steps, state["noise"], []
        suffix = module.suffix(state["prefix"].shape[1])
        for t in euler_times(steps):
            code = module.time_code(torch.tensor([t], device=x.device))
            hidden.append(module.embed_step(x, code, state["state"]))
            x = x - module.velocity(x, code, state["state"], state["cache"], suffix) / steps
        return {"cache": state["cache"], "suffix": suffix, "hidden": tuple(hidden)}

    def _expert_layer(self, i: int) -> Stage:
        def run(state: State) -> State:
            layer, past, hidden = self.module.expert[i], state["cache"][i], []
            for step, t in enumerate(euler_times(self.steps)):
                with self.clock.step(step, t):
                    x, _ = layer(state["hidden"][step], *state["suffix"], past)
                    hidden.append(x)
            return {**state, "hidden": tuple(hidden)}

        path = f"expert.{i}"
        sites = layer_sites(path, "action_head", GATED, per_step=True)
        return Stage(f"action expert layer {i}", run, sites, (path,))
