"""What training a small GR00T N1.5 policy minimizes; batches and steps are those of ``train.py``.

The flow-matching loss is the original's, in this project's flow time t = 1 - τ: with noise e,
normalized actions a and x_t = t e + (1 - t) a,

    L = E ‖v(x_t, t, observation) - (a - e)‖²

(pi0.5's velocity has the other sign).  ``noise_samples`` pairs (e, t) share one pass through the
backbone.  Prompts of a batch are padded on the right, where causal attention does not look, and the
padding is masked in every later layer: the loss is that of prompts without padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.policies.gr00t_n15 import Gr00tN15Module, Observed
from omega_qvla.training.dataset import Batch
from omega_qvla.training.train import AuxiliaryHeads, prefix_mask, repeat, to_unit


class Gr00tLearner(nn.Module):
    """The policy's network and two auxiliary heads that are thrown away afterwards."""

    def __init__(self, module: Gr00tN15Module) -> None:
        super().__init__()
        self.policy = module
        self.heads = AuxiliaryHeads(module.config.backbone.width)

    def losses(self, batch: Batch, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flow-matching, position and point loss; noise [B·K, horizon, A], times [B·K]."""
        policy, repeats = self.policy, len(times) // len(batch.actions)
        images = policy.embed_images(to_unit(batch.pixels))
        point_loss = self.heads.point_loss(images, batch.points)
        # The plain prompt: images first.  Written out, because padding may be the image token.
        prompt = torch.cat((images, policy.embed_tokens(batch.tokens)), dim=1)
        seen = prefix_mask(batch, prompt.shape[1])
        features = policy.backbone_features(prompt)
        last = features[torch.arange(len(features)), seen.sum(1) - 1]
        position_loss = self.heads.position_loss(last, batch.positions)

        mask = seen[:, None, None, :]
        once = policy.observe(policy.head_features(features, mask), self._state(batch), mask)
        actions = repeat(batch.actions, repeats)
        t = times[:, None, None]
        velocity = policy.velocity(
            t * noise + (1.0 - t) * actions, policy.schedule(times), _repeated(once, repeats)
        )
        return F.mse_loss(velocity.float(), actions - noise), position_loss, point_loss

    def _state(self, batch: Batch) -> Tensor:
        return F.pad(batch.state, (0, self.policy.config.state_width - batch.state.shape[-1]))


def _repeated(observed: Observed, times: int) -> Observed:
    """Every observation ``times`` times in a row."""
    cross = tuple((repeat(key, times), repeat(value, times)) for key, value in observed.cross)
    mask = None if observed.mask is None else repeat(observed.mask, times)
    return Observed(cross, repeat(observed.state, times), mask)
