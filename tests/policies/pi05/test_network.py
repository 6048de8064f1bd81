"""The pi0.5 module on its own: sizes, keys, and equalities its speed depends on.

Tolerance.  Two ways to compute the same float32 numbers differ by summation order only; with
values of order one and a few layers that is some 1e-6, and 2e-5 is allowed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache, attend, split_heads
from omega_qvla.policies.layers.elementwise import TORCH
from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.modules import shared_input
from omega_qvla.policies.layers.norms import adaptive_rms_norm
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module, sample_chunk
from omega_qvla.policies.pi05.stages import pi05_stages

TOLERANCE = 2e-5
Shapes = dict[str, tuple[int, ...]]

ROOT = "paligemma_with_expert"
VISION = f"{ROOT}.paligemma.model.vision_tower.vision_model"
PROJECTOR = f"{ROOT}.paligemma.model.multi_modal_projector.linear"
LANGUAGE = f"{ROOT}.paligemma.model.language_model"
EXPERT = f"{ROOT}.gemma_expert.model"
HEADS = (f"{ROOT}.paligemma.lm_head.weight", f"{ROOT}.gemma_expert.lm_head.weight")
OUTER = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")

FULL_KEYS_SHA256 = "bbcea6dd3a1776708a1000677895b7b89671b7d97438f76f8b559ad1dca448e6"
"""Digest of openpi's own full-size state dict, one ``key [shape]`` line per sorted key."""


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def gemma_layer(name: str, config: GemmaConfig, *, adaptive: bool) -> Shapes:
    width, query = config.width, config.heads * config.head_dim
    key = config.kv_heads * config.head_dim
    shapes: Shapes = {}
    for part, rows, columns in (
        ("self_attn.q_proj", query, width),
        ("self_attn.k_proj", key, width),
        ("self_attn.v_proj", key, width),
        ("self_attn.o_proj", width, query),
        ("mlp.gate_proj", config.hidden, width),
        ("mlp.up_proj", config.hidden, width),
        ("mlp.down_proj", width, config.hidden),
    ):
        shapes |= linear(f"{name}.{part}", rows, columns, bias=False)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        if adaptive:
            shapes |= linear(f"{name}.{norm}.dense", 3 * width, width)
        else:
            shapes[f"{name}.{norm}.weight"] = (width,)
    return shapes


def official_shapes(config: Pi05Config) -> Shapes:
    """Every key of openpi's state dict and its shape, dead weights included."""
    vision, width = config.vision, config.vision.width
    shapes: Shapes = {
        f"{VISION}.embeddings.patch_embedding.weight": (
            width,
            3,
            vision.patch_size,
            vision.patch_size,
        ),
        f"{VISION}.embeddings.patch_embedding.bias": (width,),
        f"{VISION}.embeddings.position_embedding.weight": (config.tokens_per_image, width),
    }
    for i in range(vision.depth):
        layer = f"{VISION}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", vision.hidden, width)
        shapes |= linear(f"{layer}.mlp.fc2", width, vision.hidden)
        shapes |= layer_norm(f"{layer}.layer_norm1", width)
        shapes |= layer_norm(f"{layer}.layer_norm2", width)
    shapes |= layer_norm(f"{VISION}.post_layernorm", width)
    shapes |= linear(PROJECTOR, config.backbone.width, width)
    shapes[f"{LANGUAGE}.embed_tokens.weight"] = (config.vocabulary, config.backbone.width)
    for i in range(config.depth):
        shapes |= gemma_layer(f"{LANGUAGE}.layers.{i}", config.backbone, adaptive=False)
        shapes |= gemma_layer(f"{EXPERT}.layers.{i}", config.expert, adaptive=True)
    shapes[f"{LANGUAGE}.norm.weight"] = (config.backbone.width,)
    expert = config.expert.width
    shapes |= linear(f"{EXPERT}.norm.dense", 3 * expert, expert)
    shapes[HEADS[0]] = (config.vocabulary, config.backbone.width)
    shapes[HEADS[1]] = (config.vocabulary, expert)
    shapes |= linear("action_in_proj", expert, config.action_dim)
    shapes |= linear("action_out_proj", config.action_dim, expert)
    shapes |= linear("time_mlp_in", expert, expert)
    return shapes | linear("time_mlp_out", expert, expert)


def allocated_shapes(module: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


PARTS: dict[str, Callable[[str], bool]] = {
    "vision": lambda key: key.startswith(VISION),
    "projector": lambda key: key.startswith(PROJECTOR),
    "backbone": lambda key: key.startswith(LANGUAGE) and "embed_tokens" not in key,
    "embedding": lambda key: "embed_tokens" in key,
    "expert": lambda key: key.startswith(EXPERT) and ".dense." not in key,
    "adaptive norms": lambda key: key.startswith(EXPERT) and ".dense." in key,
    "action and time": lambda key: key.startswith(OUTER),
}


def millions(shapes: Shapes, part: str) -> float:
    """Parameters of one part in millions, to the decimal that the published table gives."""
    return round(sum(math.prod(s) for key, s in shapes.items() if PARTS[part](key)) / 1e6, 1)


@pytest.fixture(scope="module")
def full() -> Pi05Module:
    with torch.device("meta"):
        return Pi05Module(Pi05Config.full())


@pytest.fixture(scope="module")
def small() -> Pi05Module:
    """A small module with every weight random (adaptive norms start at zero otherwise)."""
    module = Pi05Module(
        Pi05Config(
            vision=VisionConfig(width=32, hidden=48, heads=2, depth=2, image_size=28),
            backbone=GemmaConfig(width=32, hidden=64, heads=4, kv_heads=2, head_dim=8),
            expert=GemmaConfig(width=24, hidden=48, heads=4, kv_heads=2, head_dim=8),
            depth=3,
            vocabulary=50,
            horizon=5,
            action_dim=3,
            robot_action_dim=3,
            state_dim=3,
            cameras=("base", "wrist"),
            prompt_length=8,
            state_in_prompt=True,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 10
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / math.sqrt(fan_in)
        parameter.requires_grad_(False)
    return module


def random_inputs(config: Pi05Config, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, token ids and noise of a batch, always the same."""
    generator = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    pixels = torch.rand((batch, len(config.cameras), 3, size, size), generator=generator)
    token_ids = torch.randint(config.vocabulary, (batch, tokens), generator=generator)
    noise = torch.randn((batch, config.horizon, config.action_dim), generator=generator)
    return 2.0 * pixels - 1.0, token_ids, noise


def prefill(module: Pi05Module, prefix: Tensor) -> list[KeyValue]:
    return module.prefill(prefix, torch.arange(prefix.shape[1]).unsqueeze(0))[0]


def joint_velocity(module: Pi05Module, prefix: Tensor, x_t: Tensor, time: float) -> Tensor:
    """Prefix and actions side by side through one masked attention per layer, nothing cached."""
    head_dim, length = module.config.expert.head_dim, prefix.shape[1]
    total = length + x_t.shape[1]
    rotary = module.prefix_rotary(torch.arange(total).unsqueeze(0))
    may_see = torch.ones(total, total, dtype=torch.bool)
    may_see[:length, length:] = False
    modulation = module.step_modulation(torch.tensor([time]))
    actions = module.action_in_proj(x_t)
    layers = zip(module.backbone_layers, module.expert_layers, strict=True)
    for i, (backbone, expert) in enumerate(layers):
        last = i == module.config.depth - 1
        ours = backbone.input_layernorm(prefix)
        theirs, gate = adaptive_rms_norm(actions, modulation[:, 2 * i])
        keys = (backbone.self_attn.k_proj(ours), expert.self_attn.k_proj(theirs))
        values = (backbone.self_attn.v_proj(ours), expert.self_attn.v_proj(theirs))
        key = split_heads(torch.cat(keys, dim=1), head_dim)
        value = split_heads(torch.cat(values, dim=1), head_dim)
        query = expert.self_attn.q_proj(theirs)
        # Nobody reads what the prefix would ask in the last layer: zeros keep the rows aligned.
        asked = query.new_zeros((*ours.shape[:2], query.shape[-1]))
        if not last:
            asked = backbone.self_attn.q_proj(ours)
        query = split_heads(torch.cat((asked, query), dim=1), head_dim)
        out = attend(TORCH.rotate(query, rotary), TORCH.rotate(key, rotary), value, may_see)
        if not last:
            prefix = prefix + backbone.self_attn.o_proj(out[:, :length])
            prefix = prefix + backbone.mlp(backbone.post_attention_layernorm(prefix))
        actions = actions + gate * expert.self_attn.o_proj(out[:, length:])
        normed, gate = adaptive_rms_norm(actions, modulation[:, 2 * i + 1])
        actions = actions + gate * expert.mlp(normed)
    return module.read_out(actions, modulation)


def test_dropped_weights_have_their_official_shapes(full: Pi05Module) -> None:
    official = official_shapes(full.config)
    dropped = dropped_shapes(full.config)
    assert dropped == {key: official[key] for key in dropped_shapes(full.config)}


def test_full_state_dict_plus_dropped_keys_is_the_official_one(full: Pi05Module) -> None:
    expected, dropped = official_shapes(full.config), dropped_shapes(full.config).keys()
    lines = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(expected.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == FULL_KEYS_SHA256
    assert dropped <= expected.keys()
    assert allocated_shapes(full) == {k: s for k, s in expected.items() if k not in dropped}


def test_tiny_state_dict_follows_the_same_rule() -> None:
    config = Pi05Config.tiny(vocabulary=64)
    expected, dropped = official_shapes(config), dropped_shapes(config).keys()
    allocated = allocated_shapes(Pi05Module(config))
    assert allocated == {k: s for k, s in expected.items() if k not in dropped}


def test_official_parameter_counts_are_the_published_ones(full: Pi05Module) -> None:
    shapes = official_shapes(full.config)
    assert {part: millions(shapes, part) for part in PARTS} == {
        "vision": 412.4,
        "projector": 2.4,
        "backbone": 1981.9,
        "embedding": 526.6,  # 526.647; the project's table rounds it to 526.7
        "expert": 311.4,
        "adaptive norms": 116.5,
        "action and time": 2.2,
    }
    assert math.prod(shapes[HEADS[1]]) == 263_323_648
    # The backbone's head is tied to the embedding, so a checkpoint counts it once.
    total = sum(math.prod(shape) for key, shape in shapes.items() if key != HEADS[0])
    assert total == 3_616_757_520


def test_full_module_allocates_the_official_parameters_minus_the_dropped(full: Pi05Module) -> None:
    official, allocated = official_shapes(full.config), allocated_shapes(full)
    dropped = {key: official[key] for key in dropped_shapes(full.config)}
    for part in PARTS:
        expected = {k: s for k, s in official.items() if PARTS[part](k) and k not in dropped}
        assert {k: s for k, s in allocated.items() if PARTS[part](k)} == expected
    assert sum(parameter.numel() for parameter in full.parameters()) == 3_244_377_872
    assert sum(math.prod(s) for s in allocated.values()) == 3_244_377_872


def test_full_module_has_the_published_linears_minus_the_dropped(full: Pi05Module) -> None:
    names = [f"{name}." for name, m in full.named_modules() if isinstance(m, nn.Linear)]
    dense = [name for name in names if name.endswith(".dense.")]
    counts = {part: sum(PARTS[part](name + "weight") for name in names) for part in PARTS}
    assert counts == {
        "vision": 162,
        "projector": 1,
        "backbone": 126 - 5,  # the last layer keeps only k_proj and v_proj
        "embedding": 0,
        "expert": 126,
        "adaptive norms": 37,
        "action and time": 4,
    }
    assert len(dense) == full.config.norms == 37
    assert sum(counts.values()) == len(names)


def test_every_site_names_existing_linears_once(full: Pi05Module) -> None:
    stages = pi05_stages(full, FlowClock(), steps=10)
    sites = [site for stage in stages for site in stage.sites]
    names = [name for site in sites for name in site.linears]
    assert len(set(names)) == len(names) == 162 + 1 + 121 + 126
    assert all(isinstance(full.get_submodule(name), nn.Linear) for name in names)
    for site in sites:
        widths = {full.get_submodule(name).weight.shape[1] for name in site.linears}
        assert len(widths) == 1, site.name


def test_prefix_computed_once_equals_recomputing_it_in_every_step(small: Pi05Module) -> None:
    pixels, token_ids, noise = random_inputs(small.config, batch=2, tokens=6)
    prefix = small.embed_prefix(pixels, token_ids)
    times = euler_times(4)
    modulation = small.step_modulation(torch.tensor(times))
    cache = prefill(small, prefix)
    once = sample_chunk(small, cache, prefix.shape[1], noise, modulation, FlowClock())
    x = noise
    for time in times:
        x = x - joint_velocity(small, prefix, x, time) / len(times)
    torch.testing.assert_close(once, x, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25])
def test_any_number_of_steps_integrates_from_one_to_zero(small: Pi05Module, steps: int) -> None:
    pixels, token_ids, noise = random_inputs(small.config, batch=1, tokens=6)
    prefix = small.embed_prefix(pixels, token_ids)
    cache, length = prefill(small, prefix), prefix.shape[1]
    clock, seen = FlowClock(), []
    hook = small.action_in_proj.register_forward_hook(
        lambda *_: seen.append((clock.index, clock.time))
    )
    modulation = small.step_modulation(torch.tensor(euler_times(steps)))
    chunk = sample_chunk(small, cache, length, noise, modulation, clock)
    hook.remove()
    x, rotary = noise, small.suffix_rotary(length)
    for i in range(steps):
        row = small.step_modulation(torch.tensor([1.0 - i / steps]))
        x = x - small.velocity(x, row, cache, rotary) / steps
    assert seen == [(i, 1.0 - i / steps) for i in range(steps)]
    assert (clock.index, clock.time) == (None, None)
    # Batched rows of the time MLP round differently from single ones: summation order again.
    torch.testing.assert_close(chunk, x, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        euler_times(steps)


def test_batched_prefill_with_a_padding_mask_equals_dropping_the_padding(
    small: Pi05Module,
) -> None:
    pixels, token_ids, noise = random_inputs(small.config, batch=2, tokens=6)
    patches = small.config.tokens_per_image
    prefix = small.embed_prefix(pixels, token_ids)
    real = torch.ones(prefix.shape[:2], dtype=torch.bool)
    real[0, -2:] = False  # a padded prompt
    real[1, :patches] = False  # a masked first camera
    positions = real.long().cumsum(dim=1) - 1
    mask = real[:, None, None, :]
    batched, _ = small.prefill(prefix, positions, mask)
    time = small.step_modulation(torch.tensor([0.5]))
    rotary = small.suffix_rotary(real.sum(dim=1, keepdim=True))
    actions_seen = torch.ones(2, 1, 1, small.config.horizon, dtype=torch.bool)
    seen = torch.cat((mask, actions_seen), dim=-1)
    together = small.velocity(noise, time, batched, rotary, seen)
    for b in range(2):
        kept = prefix[b : b + 1, real[b]]
        alone = prefill(small, kept)
        for (key, value), (padded_key, padded_value) in zip(alone, batched, strict=True):
            torch.testing.assert_close(padded_key[b, :, real[b]], key[0], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(
                padded_value[b, :, real[b]], value[0], rtol=0, atol=TOLERANCE
            )
        rotary = small.suffix_rotary(kept.shape[1])
        velocity = small.velocity(noise[b : b + 1], time, alone, rotary)
        torch.testing.assert_close(together[b : b + 1], velocity, rtol=0, atol=TOLERANCE)


def test_stages_in_turn_compute_what_the_module_computes(small: Pi05Module) -> None:
    pixels, token_ids, noise = random_inputs(small.config, batch=1, tokens=6)
    steps = 3
    state = {"pixels": pixels, "token_ids": token_ids, "noise": noise}
    for stage in pi05_stages(small, FlowClock(), steps):
        state = stage.run(state)
    prefix = small.embed_prefix(pixels, token_ids)
    cache, rotary = prefill(small, prefix), small.suffix_rotary(prefix.shape[1])
    modulation = small.step_modulation(torch.tensor(euler_times(steps)))
    x = noise
    for i in range(steps):
        row = modulation[i : i + 1]
        velocity = small.velocity(x, row, cache, rotary)
        staged = small.read_out(state["hidden"][i], row)
        torch.testing.assert_close(staged, velocity, rtol=0, atol=TOLERANCE)
        x = x - velocity / steps


class FusedLinear(nn.Linear):
    """What a quantizer puts in the first slot of a site: all outputs side by side."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__(linears[0].in_features, 1, bias=False)
        self.weight = nn.Parameter(torch.cat([each.weight for each in linears]))
        self.splits = [each.out_features for each in linears]


def test_shared_input_applies_each_linear_to_the_same_input() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((2, 3, 4), generator=generator)
    first, second = nn.Linear(4, 5), nn.Linear(4, 6)
    ours = shared_input(x, first, second)
    assert len(ours) == 2
    assert torch.equal(ours[0], first(x))
    assert torch.equal(ours[1], second(x))
    (alone,) = shared_input(x, first)
    assert torch.equal(alone, first(x))


def test_shared_input_splits_the_output_of_a_fused_first_slot() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((2, 3, 4), generator=generator)
    linears = [nn.Linear(4, width, bias=False) for width in (5, 6, 7)]
    fused = shared_input(x, FusedLinear(*linears), None, None)
    for ours, theirs in zip(fused, shared_input(x, *linears), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_shared_input_refuses_an_empty_first_slot() -> None:
    with pytest.raises(ValueError, match="first slot"):
        shared_input(torch.zeros(1, 4), None, nn.Linear(4, 5))


def test_fusing_every_site_without_bias_leaves_the_actions_unchanged() -> None:
    config = Pi05Config.tiny(vocabulary=32)
    module = Pi05Module(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if ".dense." in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    pixels, token_ids, noise = random_inputs(config, batch=1, tokens=6)

    def chunk() -> Tensor:
        prefix = module.embed_prefix(pixels, token_ids)
        modulation = module.step_modulation(torch.tensor(euler_times(2)))
        cache = prefill(module, prefix)
        return sample_chunk(module, cache, prefix.shape[1], noise, modulation, FlowClock())

    before = chunk()
    for stage in pi05_stages(module, FlowClock(), steps=2):
        for site in stage.sites:
            linears = [module.get_submodule(name) for name in site.linears]
            if len(linears) == 1 or any(each.bias is not None for each in linears):
                continue
            module.set_submodule(site.linears[0], FusedLinear(*linears))
            for name in site.linears[1:]:
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, None)
    assert not torch.equal(before, noise)
    torch.testing.assert_close(chunk(), before, rtol=0, atol=TOLERANCE)


def test_a_roomy_cache_gives_what_putting_side_by_side_gives_again_and_again() -> None:
    past = (torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4))
    preallocated = PreallocatedKVCache.after(past, 3)
    for _ in range(2):
        own = (torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
        for whole, before, behind in zip(preallocated.filled(own), past, own, strict=True):
            assert torch.equal(whole, torch.cat((before, behind), dim=-2))
