"""The pi0 module on its own: sizes, keys, and equalities that calibration and speed depend on.

Tolerance.  Two ways to compute the same float32 numbers differ by summation order only; with
values of order one and a few layers that is some 1e-6, and 2e-5 is allowed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.paligemma.network import dropped_parameters, dropped_shapes
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.network import Pi0Module
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi0.stages import pi0_stages

TOLERANCE = 2e-5
FULL_KEYS_SHA256 = "9a6dabaf90b8256d2eda9129c8f7aef1404b4506f2e3da65e6b5ea93c5654927"
"""Digest of openpi's own full-size state dict, one ``key [shape]`` line per sorted key."""


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    loaded = oq.load_policy("random:tiny-pi0")
    assert isinstance(loaded, Pi0Policy)
    return loaded


@pytest.fixture(scope="module")
def seen(policy: Pi0Policy) -> Observations:
    config = policy.config
    size = config.vision.image_size
    return Observations.random(config.cameras, config.state_dim, count=2, size=size)


def test_full_state_dict_plus_dropped_keys_is_the_official_one() -> None:
    config = Pi0Config.full()
    with torch.device("meta"):
        module = Pi0Module(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert len(shapes) == 769 and not shapes.keys() & dropped_shapes(config).keys()
    shapes |= dropped_shapes(config)
    lines = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == FULL_KEYS_SHA256
    kept = sum(parameter.numel() for parameter in module.parameters())
    assert kept == 3_128_992_528
    assert kept + dropped_parameters(config) == 3_501_372_176


def test_the_state_is_read_once_as_if_it_stood_masked_before_the_actions(
    policy: Pi0Policy, seen: Observations
) -> None:
    """One pass over state and actions together, the state behind a mask: what the original does."""
    module, config = policy.module, policy.config
    pixels, token_ids, state = policy.processor.encode(seen[0])
    x = torch.randn((1, *policy.noise_shape), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        prefix = module.embed_prefix(pixels, token_ids)
        length = prefix.shape[1]
        cache, _ = module.prefill(prefix, torch.arange(length).unsqueeze(0))
        code = module.time_code(torch.tensor([0.3]))
        tokens = torch.cat((module.embed_state(state), module.embed_actions(x, code)), dim=1)
        mask = torch.ones(tokens.shape[1], length + tokens.shape[1], dtype=torch.bool)
        mask[0, length + 1 :] = False
        positions = length + torch.arange(tokens.shape[1]).unsqueeze(0)
        rotary = module.prefix_rotary(positions)
        for layer, past in zip(module.expert_layers, cache, strict=True):
            tokens, _ = layer(tokens, rotary, mask, past)
        expected = module.read_out(tokens[:, 1:])
        once = module.with_state(cache, state, length)
        ours = module.velocity(x, code, once, module.suffix_rotary(length + 1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    assert config.horizon == ours.shape[1]


def test_stages_in_turn_compute_what_the_module_computes(
    policy: Pi0Policy, seen: Observations
) -> None:
    clock, steps = FlowClock(), 3
    state = policy.initial_state(seen[0], torch.Generator().manual_seed(0))
    x = state["noise"]
    with torch.inference_mode():
        for stage in pi0_stages(policy.module, clock, steps):
            state = stage.run(state)
        cache, length = policy.prefill(policy.encode_images(policy.processor.encode(seen[0])))
        rotary = policy.module.suffix_rotary(length)
        for i, t in enumerate(euler_times(steps)):
            code = policy.module.time_code(torch.tensor([t]))
            velocity = policy.module.velocity(x, code, cache, rotary)
            staged = policy.module.read_out(state["hidden"][i])
            torch.testing.assert_close(staged, velocity, rtol=0, atol=TOLERANCE)
            x = x - velocity / steps


def test_every_expert_layer_is_told_the_step_that_the_state_is_read_in(
    policy: Pi0Policy, seen: Observations
) -> None:
    """Scales and offsets of a quantized expert are per step: the state's are those of the first."""
    told: list[float | None] = []
    clock = policy.clock
    layer = policy.module.expert_layers[-1].self_attn.q_proj
    hook = layer.register_forward_hook(lambda *_: told.append(clock.time))
    policy.sample_actions(seen[0], np.zeros(policy.noise_shape, np.float32), steps=2)
    hook.remove()
    assert told == [1.0, 1.0, 0.5]


def test_the_state_moves_the_actions(policy: Pi0Policy, seen: Observations) -> None:
    noise = np.zeros(policy.noise_shape, np.float32)
    observation = dict(seen[0])
    other = {**observation, "state": -observation["state"]}
    chunks = [policy.sample_actions(each, noise) for each in (observation, other)]
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(policy: Pi0Policy, seen: Observations) -> None:
    noises = [np.random.default_rng(i).standard_normal(policy.noise_shape) for i in range(2)]
    noises = [noise.astype(np.float32) for noise in noises]
    together = policy.sample_batch([policy.encode(each) for each in seen], noises)
    for each, noise, chunk in zip(seen, noises, together, strict=True):
        np.testing.assert_allclose(policy.sample_actions(each, noise), chunk, atol=TOLERANCE)
