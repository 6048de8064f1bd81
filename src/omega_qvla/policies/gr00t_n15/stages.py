"""GR00T N1.5 as calibration stages and quantization sites.

One stage per layer, one site per set of linears that read the same input, as for pi0.5.  Two
things differ.  The keys and values of the action head's even blocks read the features, which stay
the same for a whole chunk: they are a site of their own that runs once per observation, in a stage
of its own before denoising begins, while the queries beside them run once per step.  And between
backbone and action head lie self-attention layers; they and the image projector are the component
``projector``, which the paper leaves in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.base import QuantizationSite, Stage, State
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module, Observed
from omega_qvla.policies.layers.stages import GATED, Groups, layer_sites, vision_stages

EAGLE = "backbone.eagle_model"
VISION = f"{EAGLE}.vision_model.vision_model"
PROJECTOR = f"{EAGLE}.mlp1.0"
LANGUAGE = f"{EAGLE}.language_model.model"
FEATURES = "action_head.vl_self_attention.transformer_blocks"
TRANSFORMER = "action_head.model"
BLOCKS = f"{TRANSFORMER}.transformer_blocks"
MODULATION_PATHS = (f"{TRANSFORMER}.timestep_encoder", f"{TRANSFORMER}.proj_out_1")
"""What turns flow time into modulation, besides ``norm1.linear`` of every block."""

_TOKENS = (
    "state_encoder",
    "action_encoder",
    "action_decoder",
    "future_tokens",
    "position_embedding",
)


def component_of(parameter: str) -> str:
    """The part of the policy a parameter (or a site's tensor) belongs to, for memory tables."""
    for marker, component in (
        ("vision_model.", "vision"),
        (".mlp1.", "projector"),
        ("vl_self_attention.", "projector"),
        ("vlln.", "projector"),
        ("embed_tokens.", "token embedding"),
        ("language_model.", "backbone"),
        (".norm1.linear.", "adaptive norms"),
        (".timestep_encoder.", "adaptive norms"),
        (".proj_out_1.", "adaptive norms"),
        (f"{TRANSFORMER}.", "action_head"),
    ):
        if marker in parameter:
            return component
    return "embodiments"


_Run = Callable[[State], State]

_AFTER_ATTENTION: Groups = (
    ("attn1.to_out.0", ("attn1.to_out.0",)),
    ("ff.net.0.proj", ("ff.net.0.proj",)),
    ("ff.net.2", ("ff.net.2",)),
)
_SELF_BLOCK: Groups = (
    ("attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    *_AFTER_ATTENTION,
)
_CROSS_BLOCK: Groups = (("attn1.to_q", ("attn1.to_q",)), *_AFTER_ATTENTION)
_CROSS_KEY_VALUE: Groups = (("attn1.to_kv", ("attn1.to_k", "attn1.to_v")),)


def gr00t_stages(module: Gr00tN15Module, clock: FlowClock, steps: int) -> list[Stage]:
    """The forward pass as calibration stages.

    The state of one observation starts with ``pixels`` [1, V, 3, S, S], ``token_ids`` [1, T],
    ``state`` [1, state_width] and ``noise`` [1, H, A]; stages add what later ones read and drop
    what none does.
    """
    config = module.config
    stages = [
        *vision_stages(module.vision_model, VISION),
        _prompt(module),
        *(_backbone_layer(module, i) for i in range(config.backbone.depth)),
        Stage(
            "features",
            _features(module),
            reads=(f"{LANGUAGE}.norm", "action_head.vlln"),
        ),
        *(_feature_block(module, i) for i in range(config.features.depth)),
        *(_cross_key_value(module, i) for i in range(0, config.head.depth, 2)),
        Stage(
            "denoising trajectory",
            _trajectory(module, steps),
            reads=(TRANSFORMER, *(f"action_head.{name}" for name in _TOKENS)),
        ),
    ]
    return [*stages, *(_head_block(module, clock, steps, i) for i in range(config.head.depth))]


def _prompt(module: Gr00tN15Module) -> Stage:
    def run(state: State) -> State:
        normed = module.vision_model.post_layernorm(state["image_tokens"])
        images = module.projector(normed).flatten(0, 1).unsqueeze(0)
        prompt = module.embed_prompt(images, state["token_ids"])
        return {"prompt": prompt, "state": state["state"], "noise": state["noise"]}

    reads = (f"{VISION}.post_layernorm", PROJECTOR, f"{LANGUAGE}.embed_tokens")
    site = QuantizationSite(PROJECTOR, (PROJECTOR,), "projector")
    return Stage("projector", run, (site,), reads)


def _backbone_layer(module: Gr00tN15Module, i: int) -> Stage:
    def run(state: State) -> State:
        prompt = state["prompt"]
        out = module.backbone_layers[i](prompt, module.rotary(prompt))
        return {**state, "prompt": out}

    path = f"{LANGUAGE}.layers.{i}"
    return Stage(f"backbone layer {i}", run, layer_sites(path, "backbone", GATED), (path,))


def _features(module: Gr00tN15Module) -> _Run:
    def run(state: State) -> State:
        normed = module.action_head.vlln(module.backbone_norm(state["prompt"]))
        return {
            "features": normed,
            "cross": (),
            "state": state["state"],
            "noise": state["noise"],
        }

    return run


def _feature_block(module: Gr00tN15Module, i: int) -> Stage:
    def run(state: State) -> State:
        return {**state, "features": module.feature_blocks[i](state["features"])}

    path = f"{FEATURES}.{i}"
    return Stage(f"feature layer {i}", run, layer_sites(path, "projector", _SELF_BLOCK), (path,))


def _cross_key_value(module: Gr00tN15Module, i: int) -> Stage:
    def run(state: State) -> State:
        pair = module.cross_blocks[i // 2].attn1.key_value(state["features"])
        return {**state, "cross": (*state["cross"], pair)}

    path = f"{BLOCKS}.{i}"
    reads = (f"{path}.attn1.to_k", f"{path}.attn1.to_v")
    sites = layer_sites(path, "action_head", _CROSS_KEY_VALUE)
    return Stage(f"keys and values of action head block {i}", run, sites, reads)


def _trajectory(module: Gr00tN15Module, steps: int) -> _Run:
    """The full-precision head over the quantized features fixes what each step will see."""

    def run(state: State) -> State:
        times = torch.tensor(euler_times(steps), device=state["noise"].device)
        schedule = module.schedule(times)
        observed = Observed(state["cross"], module.embed_state(state["state"]))
        x, hidden = state["noise"], []
        for i in range(steps):
            step = schedule.row(i)
            hidden.append(module.embed_step(x, step.time_part, observed.state))
            x = x + module.velocity(x, step, observed) / steps
        return {
            "cross": state["cross"],
            "hidden": tuple(hidden),
            "modulation": schedule.modulation,
        }

    return run


def _head_block(module: Gr00tN15Module, clock: FlowClock, steps: int, i: int) -> Stage:
    def run(state: State) -> State:
        block, hidden = module.head_blocks[i], []
        for step, t in enumerate(euler_times(steps)):
            modulation = state["modulation"][step : step + 1, i]
            with clock.step(step, t):
                if i % 2:
                    hidden.append(block(state["hidden"][step], modulation))
                else:
                    cross = state["cross"][i // 2]
                    hidden.append(block(state["hidden"][step], modulation, cross))
        return {**state, "hidden": tuple(hidden)}

    path = f"{BLOCKS}.{i}"
    groups = _SELF_BLOCK if i % 2 else _CROSS_BLOCK
    sites = layer_sites(path, "action_head", groups, per_step=True)
    return Stage(f"action head block {i}", run, sites, (path,))
