"""What training a policy minimizes, whatever its network.

The loss is flow matching.  For a normalized action chunk a, noise e ~ N(0, 1) and a flow time
t ~ 0.001 + 0.999 · Beta(1.5, 1):

    x_t = t e + (1 - t) a,      L = E ‖v(x_t, t, observation) - d (e - a)‖²

with d = 1 for pi0.5, whose velocity points to the noise, and d = -1 for GR00T N1.5.
``noise_samples`` pairs (e, t) share one pass through the backbone, which is the expensive part.

Actions alone teach a vision tower slowly where things are.  Two heads that are thrown away
afterwards help: one predicts object and goal positions, absolute and relative to the hand, from the
residual stream of the last prompt token; one says for every image token whether the object or the
goal is in its patch.  Both targets come from the simulator.

Prompts of a batch are padded on the right; a mask keeps every later layer from seeing the padding,
so the loss is that of prompts without padding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.training.dataset import Batch

POSITION_TARGETS = 12
POINTS = 2


class AuxiliaryHeads(nn.Module):
    """Two small layers that say where things are, and are thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_head = nn.Linear(width, POSITION_TARGETS)
        self.point_head = nn.Linear(width, POINTS)
        with torch.no_grad():
            for head in (self.position_head, self.point_head):
                head.weight.zero_()
                head.bias.zero_()

    def position_loss(self, residual: Tensor, positions: Tensor) -> Tensor:
        """Squared error of the positions guessed from one token's residual stream [B, D]."""
        guess = self.position_head(F.rms_norm(residual, (residual.shape[-1],)))
        return F.mse_loss(guess.float(), positions)

    def point_loss(self, images: Tensor, points: Tensor) -> Tensor:
        """Cross-entropy of "which patch is it in" for every visible point of every view."""
        views = points.shape[1]
        logits = self.point_head(F.rms_norm(images, (images.shape[-1],))).float()
        logits = logits.unflatten(1, (views, -1)).transpose(2, 3)  # [B, V, points, patches]
        target = patch_weights(points, math.isqrt(logits.shape[-1]))
        surprise = -(target * logits.log_softmax(-1)).sum(-1)
        return surprise.sum() / target.sum().clamp_min(1.0)


class Learner(nn.Module, ABC):
    """A policy's network and the auxiliary heads.

    Attributes:
        policy: the network; its ``embed_images`` takes pixels [B, V, 3, S, S] in [-1, 1] to tokens
            [B, V·patches, D].
        direction: +1 if its velocity is noise minus actions, -1 if it is the opposite.
    """

    policy: Any
    direction: ClassVar[float]

    def __init__(self, policy: nn.Module, width: int) -> None:
        super().__init__()
        self.policy = policy
        self.heads = AuxiliaryHeads(width)

    def losses(self, batch: Batch, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flow-matching, position and point loss; noise [B·K, horizon, A], times [B·K]."""
        images = self.policy.embed_images(to_unit(batch.pixels))
        point_loss = self.heads.point_loss(images, batch.points)
        prompt = torch.cat((images, self.embed_text(batch.tokens)), dim=1)
        seen = prefix_mask(batch, prompt.shape[1])
        residual, observed = self.prefill(prompt, seen, batch)
        last = residual[torch.arange(len(residual)), seen.sum(1) - 1]
        position_loss = self.heads.position_loss(last, batch.positions)

        actions = repeat(batch.actions, len(times) // len(batch.actions))
        t = times[:, None, None]
        velocity = self.velocity(t * noise + (1.0 - t) * actions, times, observed)
        target = self.direction * (noise - actions)
        return F.mse_loss(velocity.float(), target), position_loss, point_loss

    @abstractmethod
    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] → [B, T, D]."""

    @abstractmethod
    def prefill(self, prompt: Tensor, seen: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """Run everything that does not depend on the flow time, once per observation.

        Args:
            prompt: [B, P, D] image tokens, then text.
            seen: [B, P] bool, False at padding.

        Returns:
            The backbone's residual stream [B, P, D], and what ``velocity`` takes.
        """

    @abstractmethod
    def velocity(self, x_t: Tensor, times: Tensor, observed: Any) -> Tensor:
        """The learned velocity of every pair: x_t [B·K, horizon, A], times [B·K]."""


def patch_weights(points: Tensor, grid: int) -> Tensor:
    """Image points [..., 2] in [0, 1] → bilinear weights over grid² patches; zero if not visible.

    A point between the centres of patches is shared among them, so that the target keeps its
    position to less than a patch.
    """
    visible = ((points >= 0.0) & (points < 1.0)).all(-1)
    place = (points * grid - 0.5).clamp(0.0, grid - 1.0)
    centres = torch.arange(grid, dtype=points.dtype)
    near = (1.0 - (place[..., None] - centres).abs()).clamp_min(0.0)  # [..., 2, grid]
    across, down = near.unbind(-2)
    return (down[..., :, None] * across[..., None, :]).flatten(-2) * visible[..., None]


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 or float [B, V, H, W, 3] in 0..255 → [B, V, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 1, 4, 2, 3).to(torch.float32) / 127.5 - 1.0


def repeat(x: Tensor, times: int) -> Tensor:
    """Every row ``times`` times in a row."""
    return x.repeat_interleave(times, dim=0)


def prefix_mask(batch: Batch, length: int) -> Tensor:
    """[B, P] bool: image tokens and prompt tokens, not the padding after them."""
    images = length - batch.tokens.shape[1]
    return torch.arange(length)[None] < (images + batch.lengths)[:, None]


def draw_dense(module: nn.Module, generator: torch.Generator) -> None:
    """Linears and convolutions that keep the variance of what they read; biases zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.normal_(0.0, layer.weight[0].numel() ** -0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
