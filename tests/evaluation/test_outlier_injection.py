"""An outlier-injected policy has large activations and computes the same function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.outlier_injection import (
    choose_channels,
    choose_factors,
    inject_outliers,
)
from omega_qvla.evaluation.outlier_paths import (
    OutlierPath,
    gr00t_paths,
    outlier_paths,
    pi0_paths,
    pi05_paths,
)
from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.layers import adaptive_layer_norm
from omega_qvla.policies.layers.norms import AdaptiveRMSNorm, RMSNorm, adaptive_rms_norm
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module, sample_chunk


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(module: nn.Module, seed: int) -> None:
    """Weights at the usual fan-in scale; gains, biases and modulation away from their zeros."""
    g = gen(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=g) / fan_in**0.5)


def tiny_module() -> Pi05Module:
    module = Pi05Module(Pi05Config.tiny(vocabulary=40))
    randomize(module, 0)
    return module


@torch.no_grad()
def full_forward(module: Pi05Module) -> torch.Tensor:
    g = gen(1)
    config = module.config
    size = config.vision.image_size
    pixels = torch.rand(2, 2, 3, size, size, generator=g) * 2 - 1
    tokens = torch.randint(0, 40, (2, 9), generator=g)
    noise = torch.randn(2, config.horizon, config.action_dim, generator=g)
    prefix = module.embed_prefix(pixels, tokens)
    positions = torch.arange(prefix.shape[1]).unsqueeze(0)
    cache, _ = module.prefill(prefix, positions)
    modulation = module.step_modulation(torch.tensor(euler_times(4)))
    return sample_chunk(module, cache, prefix.shape[1], noise, modulation, FlowClock())


@pytest.mark.parametrize("scope", ["paper", "all"])
def test_pi05_computes_the_same_actions(scope) -> None:
    """1e-5 of the output's norm: float32 rounding of a rescaled network, nothing systematic."""
    module = tiny_module()
    before = full_forward(module)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    paths = pi05_paths(module.config, scope)
    injected = inject_outliers(module, paths, 30.0, 0.03, gen(2))
    assert len(injected) == len(paths)
    after = full_forward(module)
    assert float((after - before).norm() / before.norm()) < 1e-5
    changed = {
        name for name, tensor in module.state_dict().items() if not tensor.equal(weights[name])
    }
    for path in paths:
        assert f"{path.producer}.weight" in changed
        assert all(f"{name}.weight" in changed for name in path.consumers)


def test_pi0_computes_the_same_actions() -> None:
    policy = oq.load_policy("random:tiny-pi0")
    assert isinstance(policy, Pi0Policy)
    randomize(policy.module, 0)
    config, size = policy.config, policy.config.vision.image_size
    seen = Observations.random(config.cameras, config.state_dim, count=1, size=size)[0]
    noise = np.random.default_rng(1).standard_normal(policy.noise_shape).astype(np.float32)
    before = policy.sample_actions(seen, noise)
    paths = pi0_paths(config, "all")
    consumers = [name for path in paths for name in path.consumers]
    assert len(consumers) == len(set(consumers))
    assert len(inject_outliers(policy.module, paths, 30.0, 0.03, gen(2))) == len(paths)
    after = policy.sample_actions(seen, noise)
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)


def test_pi05_inputs_do_get_outliers() -> None:
    module = tiny_module()
    layer = module.backbone_layers[1]
    seen: list[float] = []

    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        magnitude = inputs[0].abs().amax((0, 1))
        seen.append(float(magnitude.max() / magnitude.median()))

    for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
        linear.register_forward_pre_hook(record)
    full_forward(module)
    inject_outliers(module, pi05_paths(module.config), 30.0, 0.03, gen(3))
    full_forward(module)
    assert all(stressed > 5 * plain for plain, stressed in zip(seen[:3], seen[3:], strict=True))


def test_pi05_paths_cover_every_linear_behind_a_norm_once() -> None:
    config = Pi05Config.tiny(vocabulary=40)
    paper, everything = (pi05_paths(config, scope) for scope in ("paper", "all"))
    consumers = [name for path in everything for name in path.consumers]
    assert len(consumers) == len(set(consumers))
    assert set(paper) < set(everything)
    assert len(paper) == 3 * (config.depth - 1) + 1 + 3 * config.depth
    assert len(everything) == len(paper) + 2 * config.vision.depth + 1


def test_gr00t_paths_cover_every_linear_behind_a_norm_once() -> None:
    config = Gr00tN15Config.tiny(vocabulary=40)
    paper, everything = (gr00t_paths(config, scope) for scope in ("paper", "all"))
    consumers = [name for path in everything for name in path.consumers]
    assert len(consumers) == len(set(consumers))
    assert set(paper) < set(everything)
    assert len(paper) == 3 * config.backbone.depth + 2 * config.head.depth
    rest = 2 * config.vision.depth + 1 + 3 * config.features.depth
    assert len(everything) == len(paper) + rest


class Chain(nn.Module):
    """One producer of each kind before a linear, in float64."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        makers = {
            "rms_norm": lambda: RMSNorm(24),
            "layer_norm": lambda: nn.LayerNorm(24),
            "adaptive_norm": lambda: AdaptiveRMSNorm(24, 7).dense,
            "adaptive_layer_norm": lambda: nn.Linear(7, 48),
            "linear": lambda: nn.Linear(24, 24),
        }
        self.producer = makers[kind]()
        self.reader = nn.Linear(24, 5)
        self.other = nn.Linear(24, 3, bias=False)
        self.double()
        randomize(self, 4)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.kind == "adaptive_norm":
            h, gate = adaptive_rms_norm(x, self.producer(condition).unflatten(-1, (3, -1)))
            return self.reader(h), self.other(h), gate
        if self.kind == "adaptive_layer_norm":
            h = adaptive_layer_norm(x, self.producer(condition).unflatten(-1, (2, -1)))
            return self.reader(h), self.other(h)
        h = self.producer(x)
        return self.reader(h), self.other(h)


@pytest.mark.parametrize(
    "kind", ["rms_norm", "layer_norm", "adaptive_norm", "adaptive_layer_norm", "linear"]
)
@pytest.mark.parametrize("magnitude", [0.01, 30.0, 1000.0])
def test_each_kind_preserves_the_function_to_float64(kind, magnitude: float) -> None:
    chain = Chain(kind)
    g = gen(5)
    x = torch.randn(2, 6, 24, generator=g, dtype=torch.float64)
    condition = torch.randn(2, 7, generator=g, dtype=torch.float64)
    before = chain(x, condition)
    path = OutlierPath(kind, "producer", ("reader", "other"))
    inject_outliers(chain, [path], magnitude, 0.25, g)
    for old, new in zip(before, chain(x, condition), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-12)


def test_same_generator_state_same_twin() -> None:
    path = OutlierPath("linear", "producer", ("reader", "other"))
    first, second, third = Chain("linear"), Chain("linear"), Chain("linear")
    one = inject_outliers(first, [path], 30.0, 0.2, gen(7))[0]
    two = inject_outliers(second, [path], 30.0, 0.2, gen(7))[0]
    inject_outliers(third, [path], 30.0, 0.2, gen(8))
    assert torch.equal(one.channels, two.channels) and torch.equal(one.factors, two.factors)
    assert torch.equal(first.reader.weight, second.reader.weight)
    assert not torch.equal(first.reader.weight, third.reader.weight)


def test_channels_and_factors_are_as_documented() -> None:
    channels = choose_channels(1000, 0.03, gen(9))
    assert channels.numel() == 30 == channels.unique().numel()
    assert choose_channels(4, 0.01, gen(9)).numel() == 1
    log = (choose_factors(20_000, 30.0, gen(9)) / 30.0).log()
    assert float(log.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(log.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        choose_channels(10, fraction, gen(0))


@pytest.mark.parametrize("magnitude", [0.0, -3.0, float("inf"), float("nan")])
def test_bad_magnitudes_are_refused(magnitude: float) -> None:
    with pytest.raises(ValueError, match="magnitude"):
        choose_factors(3, magnitude, gen(0))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([OutlierPath("linear", "nowhere", ("reader",))], "nowhere"),
        ([OutlierPath("linear", "producer", ("nobody",))], "nobody"),
        ([OutlierPath("rms_norm", "producer", ("reader",))], "does not fit kind"),
        ([OutlierPath("linear", "producer", ())], "no consumers"),
        ([OutlierPath("linear", "other", ("reader",))], "3 channels"),
        ([OutlierPath("linear", "producer", ("reader", "reader"))], "listed"),
    ],
)
def test_bad_paths_are_refused_before_anything_changes(paths, message: str) -> None:
    chain = Chain("linear")
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    good = OutlierPath("linear", "producer", ("other",))
    with pytest.raises(PolicyError, match=message):
        inject_outliers(chain, [good, *paths], 30.0, 0.1, gen(0))
    assert all(tensor.equal(before[name]) for name, tensor in chain.state_dict().items())


def test_a_family_of_which_nothing_is_known_is_refused_by_name() -> None:
    policy = SimpleNamespace(family="another", config=None)
    with pytest.raises(PolicyError, match=r"'another'.*pi05, pi0, gr00t_n15.*--stress"):
        outlier_paths(cast(Any, policy), "all")
