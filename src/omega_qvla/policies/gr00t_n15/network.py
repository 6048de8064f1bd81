"""GR00T N1.5 as a compact native module with the official state-dict keys.

The graph (NVIDIA's GR00T N1.5; semantics after Isaac-GR00T's N1.5 release and LeRobot 0.4.4):

1. **Backbone.** Every camera image goes through SigLIP2 and one linear; the image tokens take the
   places that the prompt holds free for them.  Twelve causal Qwen3 layers and their final norm
   give the features.
2. **Feature layers.** A layer norm and four self-attention blocks, once per observation.
3. **Action head.** A diffusion transformer over 1 state token, ``future_tokens`` learned tokens
   and ``horizon`` action tokens.  Even blocks attend to the features, odd ones to the tokens
   themselves.  The features do not change while a chunk is denoised, so the keys and values of the
   even blocks are computed once per observation.  State, actions and outputs pass through layers
   that every *embodiment* has its own of.
4. **Flow matching.** The original counts τ = 0 → 1 from noise to actions: x ← x + v(x, τ)/steps at
   τ = i/steps, with v = actions - noise.  This project's flow time runs the other way, t = 1 - τ,
   as for pi0.5; ``Gr00tN15Module`` takes t everywhere and keeps v as the original defines it.

**Time.**  The network never sees τ itself but the bucket ⌊1000 τ⌋, twice: as sines and cosines
through a small MLP in the adaptive norms (and in the final norm), and as another set of sines and
cosines beside the noisy actions.  Both depend on t alone and are computed once per schedule.

Kept from a checkpoint are the embodiments in ``Gr00tN15Config.embodiments``, by default all 32.
What a checkpoint holds but inference never reads is not allocated: SigLIP2's pooling head and the
language-model head (``dropped_shapes``).  The original pads prompts of a batch on the left and
masks the padding in the backbone only; here an observation has no padding, which is what a batch of
one gives there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.gr00t_n15.config import EMBODIMENTS, Gr00tN15Config
from omega_qvla.policies.gr00t_n15.layers import (
    ActionEncoder,
    AdaptiveLayerNorm,
    CrossBlock,
    EmbodimentMLP,
    FeatureBlock,
    SelfBlock,
    adaptive_layer_norm,
)
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import KeyValue, rotary_table
from omega_qvla.policies.layers.elementwise import ElementwiseModule
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.layers.modules import Node, embedding
from omega_qvla.policies.layers.norms import LayerNorm
from omega_qvla.policies.layers.qwen3 import QwenLayer, QwenRMSNorm
from omega_qvla.policies.layers.siglip import SiglipVisionModel

TIME_BUCKETS = 1000

TIME_FEATURES = 256

TIME_PERIOD = 10_000.0

FINAL_NORM_EPS = 1e-6

_ROUNDING = 1e-3
"""Buckets: flow times pass through float32, which may put 1000 τ some 1e-4 below a whole number."""


class Schedule(NamedTuple):
    """What depends on the flow time alone, one row per denoising step.

    Attributes:
        modulation: [S, norms, 2, D] scale and shift of every adaptive norm.
        time_part: [S, 1, D] the flow time's share in the action encoder.
    """

    modulation: Tensor
    time_part: Tensor

    def row(self, step: int) -> Schedule:
        """One step, still with a leading dimension of 1."""
        return Schedule(self.modulation[step : step + 1], self.time_part[step : step + 1])


@dataclass(frozen=True)
class Observed:
    """What denoising reads of an observation, computed once.

    Attributes:
        cross: keys and values of the even blocks.
        state: [B, 1, D] state token.
        mask: [B, 1, 1, S] bool, True where a feature may be seen; None without padding.
    """

    cross: tuple[KeyValue, ...]
    state: Tensor
    mask: Tensor | None = None


class TimestepEncoder(nn.Module):
    """Bucket number → condition of the adaptive norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = Node()
        self.timestep_embedder.linear_1 = nn.Linear(TIME_FEATURES, width)
        self.timestep_embedder.linear_2 = nn.Linear(width, width)

    def forward(self, buckets: Tensor) -> Tensor:
        """Bucket numbers [B] → [B, D], before the nonlinearity that every reader applies."""
        half = TIME_FEATURES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=buckets.device) / (half - 1)
        angle = buckets.unsqueeze(-1) * torch.exp(-math.log(TIME_PERIOD) * exponent)
        embedder = self.timestep_embedder
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(embedder.linear_1.weight)
        return embedder.linear_2(F.silu(embedder.linear_1(features)))


def time_buckets(times: Tensor) -> Tensor:
    """Flow times t [B] → the bucket numbers ⌊1000 (1 - t)⌋ that the network sees, float32 [B]."""
    progress = TIME_BUCKETS * (1.0 - times.to(torch.float64))
    return (progress + _ROUNDING).floor().to(torch.float32)


def time_code(buckets: Tensor, width: int) -> Tensor:
    """Bucket numbers [B] → the sines and cosines beside the actions, [B, width]."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=buckets.device) / half
    angle = buckets.unsqueeze(-1) * torch.exp(-math.log(TIME_PERIOD) * exponent)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Gr00tN15Module(ElementwiseModule):
    """The network: official keys, no dead weights.  All methods accept a leading batch."""

    def __init__(self, config: Gr00tN15Config) -> None:
        super().__init__()
        self.config = config
        backbone, width, rows = config.backbone, config.head.width, len(config.embodiments)
        eagle, language = Node(), Node()
        eagle.vision_model = Node()
        eagle.vision_model.vision_model = SiglipVisionModel(**config.vision.model_dump())
        eagle.mlp1 = nn.ModuleList([nn.Linear(config.vision.width, backbone.width)])
        language.embed_tokens = embedding(config.vocabulary, backbone.width)
        language.layers = nn.ModuleList(
            QwenLayer(
                backbone.width,
                backbone.hidden,
                backbone.heads,
                backbone.kv_heads,
                backbone.head_dim,
            )
            for _ in range(backbone.depth)
        )
        language.norm = QwenRMSNorm(backbone.width)
        eagle.language_model = Node()
        eagle.language_model.model = language
        self.backbone = Node()
        self.backbone.eagle_model = eagle

        head, transformer = Node(), Node()
        transformer.timestep_encoder = TimestepEncoder(width)
        transformer.transformer_blocks = nn.ModuleList(
            SelfBlock(width, config.head.heads)
            if i % 2
            else CrossBlock(width, config.head.heads, backbone.width)
            for i in range(config.head.depth)
        )
        transformer.proj_out_1 = nn.Linear(width, 2 * width)
        transformer.proj_out_2 = nn.Linear(width, config.head_hidden)
        head.model = transformer
        head.vlln = LayerNorm(backbone.width)
        head.vl_self_attention = Node()
        head.vl_self_attention.transformer_blocks = nn.ModuleList(
            FeatureBlock(backbone.width, config.features.heads)
            for _ in range(config.features.depth)
        )
        head.future_tokens = embedding(config.future_tokens, width)
        head.position_embedding = embedding(config.positions, width)
        head.state_encoder = EmbodimentMLP(rows, config.state_width, config.head_hidden, width)
        head.action_encoder = ActionEncoder(rows, config.action_dim, width)
        head.action_decoder = EmbodimentMLP(
            rows, config.head_hidden, config.head_hidden, config.action_dim
        )
        self.action_head = head

    @property
    def vision_model(self) -> SiglipVisionModel:
        return self.backbone.eagle_model.vision_model.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.backbone.eagle_model.mlp1[0]

    @property
    def embed_tokens(self) -> nn.Module:
        return self.backbone.eagle_model.language_model.model.embed_tokens

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.backbone.eagle_model.language_model.model.layers

    @property
    def backbone_norm(self) -> nn.Module:
        return self.backbone.eagle_model.language_model.model.norm

    @property
    def feature_blocks(self) -> nn.ModuleList:
        return self.action_head.vl_self_attention.transformer_blocks

    @property
    def head_blocks(self) -> nn.ModuleList:
        return self.action_head.model.transformer_blocks

    @property
    def cross_blocks(self) -> list[CrossBlock]:
        """The even blocks, which attend to the features."""
        return [block for block in self.head_blocks if isinstance(block, CrossBlock)]

    def adaptive_norms(self) -> list[AdaptiveLayerNorm]:
        """The adaptive norms of the head's blocks; the final one is ``proj_out_1``."""
        norms = self.action_head.model.modules()
        return [norm for norm in norms if isinstance(norm, AdaptiveLayerNorm)]

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels [B, V, 3, S, S] in [-1, 1] → tokens [B, V·patches, D]."""
        batch, views = pixels.shape[:2]
        tokens = self.projector(self.vision_model(pixels.flatten(0, 1)))
        return tokens.unflatten(0, (batch, views)).flatten(1, 2)

    def embed_prompt(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Image tokens [B, V·patches, D] in the places that token ids [B, T] hold → [B, T, D]."""
        places = (token_ids == self.config.image_token).unsqueeze(-1)
        text = self.embed_tokens(token_ids)
        return text.masked_scatter(places, images.to(text.dtype))

    def rotary(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table of the positions of an embedded prompt [B, T, D]."""
        positions = torch.arange(prompt.shape[1], device=prompt.device).unsqueeze(0)
        return rotary_table(
            positions, self.config.backbone.head_dim, self.config.backbone.rotary_period
        )

    def backbone_features(self, prompt: Tensor) -> Tensor:
        """Embedded prompt [B, T, D] → the backbone's features [B, T, D], final norm included.

        Attention is causal, so padding behind a prompt does not change its features.
        """
        rotary = self.rotary(prompt)
        for layer in self.backbone_layers:
            prompt = layer(prompt, rotary)
        return self.backbone_norm(prompt)

    def head_features(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The backbone's features → what the action head attends to, [B, T, D]."""
        features = self.action_head.vlln(features)
        for block in self.feature_blocks:
            features = block(features, mask)
        return features

    def observe(self, features: Tensor, state: Tensor, mask: Tensor | None = None) -> Observed:
        """Everything of an observation that does not change while a chunk is denoised.

        Args:
            features: [B, T, D] from ``head_features``.
            state: [B, state_width] normalized.
            mask: [B, 1, 1, T] bool, True where a feature may be seen; None without padding.
        """
        cross = tuple(block.attn1.key_value(features) for block in self.cross_blocks)
        return Observed(cross, self.embed_state(state), mask)

    def embed_state(self, state: Tensor) -> Tensor:
        """Normalized state [B, state_width] → its token [B, 1, D]."""
        return self.action_head.state_encoder(state.unsqueeze(1), self.config.embodiment_row)

    def step_modulation(self, times: Tensor) -> Tensor:
        """Scale and shift of every adaptive norm at flow times [B] → [B, norms, 2, D].

        Norm i is block i's, the last one the final norm.

        Raises:
            PolicyError: the layers that compute it were removed (``remove_modulation``).
        """
        head = self.action_head.model
        if head.timestep_encoder is None:
            raise PolicyError("this network's adaptive norms were replaced by a step table")
        condition = F.silu(head.timestep_encoder(time_buckets(times)))
        blocks = [norm.modulation(condition) for norm in self.adaptive_norms()]
        # The final norm's layer gives shift and scale in the other order.
        final = head.proj_out_1(condition).unflatten(-1, (2, -1)).flip(-2)
        return torch.stack((*blocks, final), dim=-3)

    def time_part(self, times: Tensor) -> Tensor:
        """The flow times' [B] share in the action encoder, [B, 1, D]."""
        code = time_code(time_buckets(times), self.config.head.width)
        return self.action_head.action_encoder.time_part(code, self.config.embodiment_row)

    def schedule(self, times: Tensor) -> Schedule:
        """All that depends on the flow times [S] alone."""
        return Schedule(self.step_modulation(times), self.time_part(times))

    def embed_step(self, x_t: Tensor, time_part: Tensor, state: Tensor) -> Tensor:
        """State, future and action tokens of one step, [B, 1 + future + horizon, D]."""
        head = self.action_head
        actions = head.action_encoder(x_t, time_part, self.config.embodiment_row)
        actions = actions + head.position_embedding.weight[: x_t.shape[1]]
        future = head.future_tokens.weight.expand(x_t.shape[0], -1, -1)
        return torch.cat((state, future, actions), dim=1)

    def velocity(self, x_t: Tensor, step: Schedule, observed: Observed) -> Tensor:
        """The learned velocity at one flow time.

        Args:
            x_t: [B, horizon, action_dim] noisy normalized actions.
            step: one row of a ``Schedule``, or one per batch element.
            observed: from ``observe``.

        Returns:
            [B, horizon, action_dim] velocity (actions - noise, as the original has it).
        """
        x = self.embed_step(x_t, step.time_part, observed.state)
        for i, block in enumerate(self.head_blocks):
            modulation = step.modulation[:, i]
            if i % 2:
                x = block(x, modulation)
            else:
                x = block(x, modulation, observed.cross[i // 2], observed.mask)
        return self.read_out(x, step.modulation[:, -1])

    def read_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Final norm, projection and decoder of the action tokens, [B, horizon, action_dim]."""
        actions = x[:, -self.config.horizon :]
        normed = adaptive_layer_norm(actions, modulation, FINAL_NORM_EPS, self.elementwise)
        hidden = self.action_head.model.proj_out_2(normed)
        return self.action_head.action_decoder(hidden, self.config.embodiment_row)


def sample_chunk(
    module: Gr00tN15Module,
    observed: Observed,
    noise: Tensor,
    schedule: Schedule,
    clock: FlowClock,
    guidance: Guidance | None = None,
) -> Tensor:
    """Integrate the flow from noise to a normalized action chunk.

    Args:
        observed: from ``Gr00tN15Module.observe``, batch B.
        noise: [B, horizon, action_dim] at t = 1.
        schedule: one row per Euler step.
        clock: entered once per step.
        guidance: what the chunk continues, or None.
    """

    def velocity(x: Tensor, step: int) -> Tensor:
        return -module.velocity(x, schedule.row(step), observed)

    return integrate(velocity, noise, schedule.modulation.shape[0], clock, guidance)


def stacked_keys() -> set[str]:
    """Official keys whose first dimension counts embodiments."""
    layers = [f"{part}.layer{i}" for part in ("state_encoder", "action_decoder") for i in (1, 2)]
    layers += [f"action_encoder.W{i}" for i in (1, 2, 3)]
    return {f"action_head.{layer}.{kind}" for layer in layers for kind in ("W", "b")}


def dropped_shapes(config: Gr00tN15Config) -> dict[str, tuple[int, ...]]:
    """Official checkpoint keys that inference never reads and this module does not allocate."""
    width, hidden = config.vision.width, config.vision.hidden
    pooling = "backbone.eagle_model.vision_model.vision_model.head"
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.eagle_model.language_model.lm_head.weight": (
            config.vocabulary,
            config.backbone.width,
        ),
        f"{pooling}.probe": (1, 1, width),
        f"{pooling}.attention.in_proj_weight": (3 * width, width),
        f"{pooling}.attention.in_proj_bias": (3 * width,),
    }
    for layer, rows, columns in (
        ("attention.out_proj", (width,), (width,)),
        ("layernorm", (width,), ()),
        ("mlp.fc1", (hidden,), (width,)),
        ("mlp.fc2", (width,), (hidden,)),
    ):
        shapes |= {f"{pooling}.{layer}.weight": rows + columns, f"{pooling}.{layer}.bias": rows}
    return shapes


def dropped_parameters(config: Gr00tN15Config, embodiments: int = EMBODIMENTS) -> int:
    """Parameters of a checkpoint with this many embodiments that this module does not allocate.

    The language-model head is not counted: it is tied to the embedding.
    """
    shapes = dropped_shapes(config)
    del shapes["backbone.eagle_model.language_model.lm_head.weight"]
    inner, head = config.head_hidden, config.head.width
    one = (config.state_width + 1) * inner + (inner + 1) * head
    one += (config.action_dim + 1) * head + (2 * head + 1) * head + (head + 1) * head
    one += (inner + 1) * inner + (inner + 1) * config.action_dim
    return sum(map(math.prod, shapes.values())) + (embodiments - len(config.embodiments)) * one


def remove_modulation(module: Gr00tN15Module) -> None:
    """Take out the adaptive norms' layers and the time MLP, which a step table replaces."""
    for norm in module.adaptive_norms():
        norm.linear = None
    module.action_head.model.proj_out_1 = None
    module.action_head.model.timestep_encoder = None
