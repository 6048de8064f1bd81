"""The GR00T N1.5 module on its own: sizes, keys, and equalities its speed depends on.

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

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.gr00t_n15.config import EMBODIMENTS, Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import (
    Gr00tN15Module,
    Observed,
    dropped_parameters,
    dropped_shapes,
    sample_chunk,
    stacked_keys,
    time_buckets,
)
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.stages import component_of, gr00t_stages

TOLERANCE = 2e-5
Shapes = dict[str, tuple[int, ...]]

EAGLE = "backbone.eagle_model"
VISION = f"{EAGLE}.vision_model.vision_model"
LANGUAGE = f"{EAGLE}.language_model.model"
HEAD = "action_head"
FEATURES = f"{HEAD}.vl_self_attention.transformer_blocks"
BLOCKS = f"{HEAD}.model.transformer_blocks"
TIME = f"{HEAD}.model.timestep_encoder.timestep_embedder"
LM_HEAD = f"{EAGLE}.language_model.lm_head.weight"

FULL_KEYS_SHA256 = "3e35b74d88e13394293cb9f88a3c43cdc0f1e6137dae9e610a8a0bb7e4f87d74"
"""Digest of LeRobot 0.4.4's own full-size state dict, one ``key [shape]`` line per sorted key."""


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes(config: Gr00tN15Config) -> Shapes:
    vision, width = config.vision, config.vision.width
    patch = f"{VISION}.embeddings.patch_embedding"
    shapes: Shapes = {
        f"{patch}.weight": (width, 3, vision.patch_size, vision.patch_size),
        f"{patch}.bias": (width,),
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
    pooling = f"{VISION}.head"
    shapes |= {
        f"{pooling}.probe": (1, 1, width),
        f"{pooling}.attention.in_proj_weight": (3 * width, width),
        f"{pooling}.attention.in_proj_bias": (3 * width,),
    }
    shapes |= linear(f"{pooling}.attention.out_proj", width, width)
    shapes |= layer_norm(f"{pooling}.layernorm", width)
    shapes |= linear(f"{pooling}.mlp.fc1", vision.hidden, width)
    return shapes | linear(f"{pooling}.mlp.fc2", width, vision.hidden)


def language_shapes(config: Gr00tN15Config) -> Shapes:
    sizes = config.backbone
    width, query, key = sizes.width, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes: Shapes = {
        f"{LANGUAGE}.embed_tokens.weight": (config.vocabulary, width),
        f"{LANGUAGE}.norm.weight": (width,),
        LM_HEAD: (config.vocabulary, width),
    }
    for i in range(sizes.depth):
        layer = f"{LANGUAGE}.layers.{i}"
        for part, rows, columns in (
            ("self_attn.q_proj", query, width),
            ("self_attn.k_proj", key, width),
            ("self_attn.v_proj", key, width),
            ("self_attn.o_proj", width, query),
            ("mlp.gate_proj", sizes.hidden, width),
            ("mlp.up_proj", sizes.hidden, width),
            ("mlp.down_proj", width, sizes.hidden),
        ):
            shapes |= linear(f"{layer}.{part}", rows, columns, bias=False)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            shapes[f"{layer}.{norm}.weight"] = (sizes.head_dim,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (width,)
    return shapes


def block_shapes(name: str, width: int, keys: int) -> Shapes:
    """Attention and feed-forward of one block whose keys and values read ``keys`` channels."""
    shapes = linear(f"{name}.attn1.to_q", width, width)
    shapes |= linear(f"{name}.attn1.to_k", width, keys)
    shapes |= linear(f"{name}.attn1.to_v", width, keys)
    shapes |= linear(f"{name}.attn1.to_out.0", width, width)
    shapes |= linear(f"{name}.ff.net.0.proj", 4 * width, width)
    return shapes | linear(f"{name}.ff.net.2", width, 4 * width)


def embodiment_shapes(config: Gr00tN15Config, embodiments: int) -> Shapes:
    width, inner = config.head.width, config.head_hidden
    shapes: Shapes = {}
    for name, inputs, outputs in (
        ("state_encoder.layer1", config.state_width, inner),
        ("state_encoder.layer2", inner, width),
        ("action_encoder.W1", config.action_dim, width),
        ("action_encoder.W2", 2 * width, width),
        ("action_encoder.W3", width, width),
        ("action_decoder.layer1", inner, inner),
        ("action_decoder.layer2", inner, config.action_dim),
    ):
        shapes[f"{HEAD}.{name}.W"] = (embodiments, inputs, outputs)
        shapes[f"{HEAD}.{name}.b"] = (embodiments, outputs)
    return shapes


def official_shapes(config: Gr00tN15Config, embodiments: int = EMBODIMENTS) -> Shapes:
    """Every key of the official state dict and its shape, dead weights included."""
    features, width = config.backbone.width, config.head.width
    shapes = vision_shapes(config) | language_shapes(config)
    shapes |= linear(f"{EAGLE}.mlp1.0", features, config.vision.width)
    shapes |= layer_norm(f"{HEAD}.vlln", features)
    for i in range(config.features.depth):
        block = f"{FEATURES}.{i}"
        shapes |= block_shapes(block, features, features)
        shapes |= layer_norm(f"{block}.norm1", features) | layer_norm(f"{block}.norm3", features)
    for i in range(config.head.depth):
        shapes |= block_shapes(f"{BLOCKS}.{i}", width, width if i % 2 else features)
        shapes |= linear(f"{BLOCKS}.{i}.norm1.linear", 2 * width, width)
    shapes |= linear(f"{TIME}.linear_1", width, 256) | linear(f"{TIME}.linear_2", width, width)
    shapes |= linear(f"{HEAD}.model.proj_out_1", 2 * width, width)
    shapes |= linear(f"{HEAD}.model.proj_out_2", config.head_hidden, width)
    shapes[f"{HEAD}.future_tokens.weight"] = (config.future_tokens, width)
    shapes[f"{HEAD}.position_embedding.weight"] = (config.positions, width)
    return shapes | embodiment_shapes(config, embodiments)


def allocated_shapes(module: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


PARTS: dict[str, Callable[[str], bool]] = {
    "vision": lambda key: key.startswith(VISION),
    "projector": lambda key: key.startswith(f"{EAGLE}.mlp1"),
    "backbone": lambda key: key.startswith(LANGUAGE) and "embed_tokens" not in key,
    "embedding": lambda key: "embed_tokens" in key,
    "feature layers": lambda key: key.startswith(FEATURES),
    "head": lambda key: key.startswith(BLOCKS) and ".norm1." not in key,
    "adaptive norms": lambda key: key.startswith(BLOCKS) and ".norm1." in key,
    "time and output": lambda key: ".timestep_encoder." in key or ".proj_out" in key,
    "embodiments": lambda key: key in stacked_keys(),
}


@pytest.fixture(scope="module")
def full() -> Gr00tN15Module:
    with torch.device("meta"):
        return Gr00tN15Module(Gr00tN15Config.full())


@pytest.fixture
def small(small_gr00t: Gr00tN15Policy) -> Gr00tN15Module:
    return small_gr00t.module


def random_inputs(
    config: Gr00tN15Config, batch: int, words: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, token ids (words, images, words), state and noise of a batch, always the same."""
    generator = torch.Generator().manual_seed(1)
    size, views = config.vision.image_size, len(config.cameras)
    pixels = torch.rand((batch, views, 3, size, size), generator=generator)
    text = torch.randint(1, config.vocabulary, (batch, words), generator=generator)
    places = torch.full((batch, views * config.tokens_per_image), config.image_token)
    token_ids = torch.cat((text[:, :2], places, text[:, 2:]), dim=1)
    state = torch.randn((batch, config.state_width), generator=generator)
    noise = torch.randn((batch, config.horizon, config.action_dim), generator=generator)
    return 2.0 * pixels - 1.0, token_ids, state, noise


def features_of(module: Gr00tN15Module, pixels: Tensor, token_ids: Tensor) -> Tensor:
    prompt = module.embed_prompt(module.embed_images(pixels), token_ids)
    return module.backbone_features(prompt)


def observe(module: Gr00tN15Module, pixels: Tensor, token_ids: Tensor, state: Tensor) -> Observed:
    return module.observe(module.head_features(features_of(module, pixels, token_ids)), state)


def test_dropped_weights_have_their_official_shapes(full: Gr00tN15Module) -> None:
    official = official_shapes(full.config)
    dropped = dropped_shapes(full.config)
    assert dropped == {key: official[key] for key in dropped_shapes(full.config)}


def test_full_state_dict_plus_dropped_keys_is_the_official_one(full: Gr00tN15Module) -> None:
    expected, dropped = official_shapes(full.config), dropped_shapes(full.config).keys()
    lines = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(expected.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == FULL_KEYS_SHA256
    assert dropped <= expected.keys()
    assert allocated_shapes(full) == {k: s for k, s in expected.items() if k not in dropped}


@pytest.mark.parametrize("config", [Gr00tN15Config.tiny(vocabulary=64), Gr00tN15Config.libero()])
def test_other_sizes_follow_the_same_rule(config: Gr00tN15Config) -> None:
    with torch.device("meta"):
        module = Gr00tN15Module(config)
    expected = official_shapes(config, len(config.embodiments))
    dropped = dropped_shapes(config).keys()
    assert allocated_shapes(module) == {k: s for k, s in expected.items() if k not in dropped}


def test_official_parameter_counts_are_the_published_ones(full: Gr00tN15Module) -> None:
    shapes = official_shapes(full.config)
    counts = {
        part: round(sum(math.prod(s) for k, s in shapes.items() if mine(k)) / 1e6, 1)
        for part, mine in PARTS.items()
    }
    assert counts == {
        "vision": 427.7,
        "projector": 2.4,
        "backbone": 604.0,
        "embedding": 310.6,
        "feature layers": 201.4,
        "head": 465.8,
        "adaptive norms": 75.5,  # 75.547; the project's table rounds it to 75.6
        "time and output": 9.1,
        "embodiments": 315.4,
    }
    # The language-model head is tied to the embedding: counted once.
    assert sum(math.prod(s) for k, s in shapes.items() if k != LM_HEAD) == 2_413_522_880


@pytest.mark.parametrize("config", [Gr00tN15Config.full(), Gr00tN15Config.libero()])
def test_dropped_parameters_are_all_that_is_not_allocated(config: Gr00tN15Config) -> None:
    with torch.device("meta"):
        module = Gr00tN15Module(config)
    official = sum(math.prod(s) for k, s in official_shapes(config).items() if k != LM_HEAD)
    allocated = sum(parameter.numel() for parameter in module.parameters())
    assert dropped_parameters(config) == official - allocated


def test_every_site_names_existing_linears_once(full: Gr00tN15Module) -> None:
    stages = gr00t_stages(full, FlowClock(), steps=4)
    sites = [site for stage in stages for site in stage.sites]
    names = [name for site in sites for name in site.linears]
    assert len(set(names)) == len(names) == 162 + 1 + 84 + 24 + 96
    assert all(isinstance(full.get_submodule(name), nn.Linear) for name in names)
    for site in sites:
        widths = {full.get_submodule(name).weight.shape[1] for name in site.linears}
        assert len(widths) == 1, site.name


def test_cross_keys_and_values_are_sites_that_run_once(full: Gr00tN15Module) -> None:
    stages = gr00t_stages(full, FlowClock(), steps=4)
    head = [s for stage in stages for s in stage.sites if s.component == "action_head"]
    once = [site for site in head if not site.per_step]
    assert [site.name for site in once] == [f"{BLOCKS}.{i}.attn1.to_kv" for i in range(0, 16, 2)]
    assert len(head) == 8 + 8 * 4 + 8 * 4


def test_every_parameter_belongs_to_a_known_component(full: Gr00tN15Module) -> None:
    found = {component_of(name) for name, _ in full.named_parameters()}
    assert found == {
        "vision",
        "projector",
        "token embedding",
        "backbone",
        "adaptive norms",
        "action_head",
        "embodiments",
    }


def test_stages_in_turn_compute_what_the_module_computes(small: Gr00tN15Module) -> None:
    pixels, token_ids, state, noise = random_inputs(small.config, batch=1)
    steps = 3
    carried = {"pixels": pixels, "token_ids": token_ids, "state": state, "noise": noise}
    for stage in gr00t_stages(small, FlowClock(), steps):
        carried = stage.run(carried)
    observed = observe(small, pixels, token_ids, state)
    schedule = small.schedule(torch.tensor(euler_times(steps)))
    x = noise
    for i in range(steps):
        step = schedule.row(i)
        velocity = small.velocity(x, step, observed)
        staged = small.read_out(carried["hidden"][i], step.modulation[:, -1])
        torch.testing.assert_close(staged, velocity, rtol=0, atol=TOLERANCE)
        x = x + velocity / steps


def test_keys_and_values_computed_once_equal_computing_them_in_every_step(
    small: Gr00tN15Module,
) -> None:
    pixels, token_ids, state, noise = random_inputs(small.config, batch=2)
    features = small.head_features(features_of(small, pixels, token_ids))
    schedule = small.schedule(torch.tensor(euler_times(4)))
    calls: list[int] = []
    hook = small.cross_blocks[0].attn1.to_k.register_forward_hook(lambda *_: calls.append(1))
    chunk = sample_chunk(small, small.observe(features, state), noise, schedule, FlowClock())
    assert len(calls) == 1
    x = noise
    for i in range(4):
        x = x + small.velocity(x, schedule.row(i), small.observe(features, state)) / 4
    hook.remove()
    torch.testing.assert_close(chunk, x, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 25])
def test_any_number_of_steps_integrates_from_one_to_zero(small: Gr00tN15Module, steps: int) -> None:
    pixels, token_ids, state, noise = random_inputs(small.config, batch=1)
    observed = observe(small, pixels, token_ids, state)
    clock, seen = FlowClock(), []
    hook = small.action_head.model.proj_out_2.register_forward_hook(
        lambda *_: seen.append((clock.index, clock.time))
    )
    schedule = small.schedule(torch.tensor(euler_times(steps)))
    chunk = sample_chunk(small, observed, noise, schedule, clock)
    hook.remove()
    assert seen == [(i, 1.0 - i / steps) for i in range(steps)]
    assert (clock.index, clock.time) == (None, None)
    assert chunk.shape == noise.shape and bool(torch.isfinite(chunk).all())


def test_time_buckets_are_the_original_s_for_any_number_of_steps() -> None:
    """Through float32, as schedules hand times over; the original takes int(i / steps · 1000)."""
    for steps in range(1, 129):
        times = torch.tensor(euler_times(steps))
        expected = [int(i / float(steps) * 1000) for i in range(steps)]
        assert time_buckets(times).tolist() == expected


def test_a_prompt_without_padding_gives_what_a_masked_one_gives(small: Gr00tN15Module) -> None:
    pixels, token_ids, state, noise = random_inputs(small.config, batch=2)
    real = torch.ones(token_ids.shape, dtype=torch.bool)
    real[0, -2:] = False
    mask = real[:, None, None, :]
    features = small.head_features(features_of(small, pixels, token_ids), mask)
    step = small.schedule(torch.tensor([0.5]))
    together = small.velocity(noise, step, small.observe(features, state, mask))
    for b in range(2):
        row = slice(b, b + 1)
        alone = observe(small, pixels[row], token_ids[row, real[b]], state[row])
        velocity = small.velocity(noise[row], step, alone)
        torch.testing.assert_close(together[row], velocity, rtol=0, atol=TOLERANCE)


def test_images_enter_where_the_prompt_holds_places(small: Gr00tN15Module) -> None:
    pixels, token_ids, *_ = random_inputs(small.config, batch=1)
    images = small.embed_images(pixels)
    prompt = small.embed_prompt(images, token_ids)
    places = token_ids[0] == small.config.image_token
    assert torch.equal(prompt[0, places], images[0])
    assert torch.equal(prompt[0, ~places], small.embed_tokens(token_ids[0, ~places]))


@pytest.mark.parametrize("kept", [(1,), (2, 1), (0, 1, 2)])
def test_dropping_other_embodiments_changes_no_action(
    small_gr00t: Gr00tN15Policy, kept: tuple[int, ...]
) -> None:
    fewer = small_gr00t.keep_embodiments(kept)
    inputs = random_inputs(small_gr00t.config, batch=1)
    schedule = small_gr00t.module.schedule(torch.tensor(euler_times(4)))
    chunks = [
        sample_chunk(m, observe(m, *inputs[:3]), inputs[3], schedule, FlowClock())
        for m in (small_gr00t.module, fewer.module)
    ]
    assert torch.equal(*chunks)
    sizes = [sum(p.numel() for p in m.module.parameters()) for m in (small_gr00t, fewer)]
    assert sizes[0] == sizes[1] + fewer.dropped_parameters
    assert fewer.config.embodiments == kept


def test_another_kept_embodiment_acts_with_its_own_layers(small_gr00t: Gr00tN15Policy) -> None:
    inputs = random_inputs(small_gr00t.config, batch=1)
    chunks = []
    for number in (1, 2):
        module = small_gr00t.keep_embodiments((number,), number).module
        schedule = module.schedule(torch.tensor(euler_times(4)))
        observed = observe(module, *inputs[:3])
        chunks.append(sample_chunk(module, observed, inputs[3], schedule, FlowClock()))
    assert not torch.allclose(*chunks)


@pytest.mark.parametrize(("kept", "acting"), [((0,), None), ((7,), 7), ((), None), ((1, 2), 0)])
def test_embodiments_that_are_not_there_or_would_not_act_are_refused(
    small_gr00t: Gr00tN15Policy, kept: tuple[int, ...], acting: int | None
) -> None:
    with pytest.raises(PolicyError, match=r"the policy has \[0, 1, 2\]"):
        small_gr00t.keep_embodiments(kept, acting)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"embodiment": 5}, "embodiment 5"),
        ({"embodiments": (1, 1)}, "twice"),
        ({"image_token": 10_000}, "image_token"),
        ({"horizon": 9}, "no more than 8"),
        ({"state_dim": 7}, "wider"),
        ({"features": {"width": 32, "heads": 2, "depth": 1}}, "widths must be the same"),
        ({"image_crop": 0.0}, "image_crop"),
        ({"prompt": {"text": "{instruction}", "image": "{tokens}"}}, "images"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    small: Gr00tN15Module, change: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        Gr00tN15Config.model_validate({**small.config.model_dump(), **change})


def test_gradients_reach_every_parameter_of_the_acting_embodiment() -> None:
    module = Gr00tN15Module(Gr00tN15Config.tiny(vocabulary=32))
    pixels, token_ids, state, noise = random_inputs(module.config, batch=2)
    observed = observe(module, pixels, token_ids, state)
    module.velocity(
        noise, module.schedule(torch.tensor([0.3, 0.8])), observed
    ).square().mean().backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert without == set()
