"""GR00T N1.5 while it is trained: its share of the loss, and weights to start from.

Attention of the backbone is causal, so padding behind a prompt does not reach the tokens before it;
the later layers are given the mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from omega_qvla.policies.gr00t_n15.layers import EmbodimentLinear
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module, Observed
from omega_qvla.training.dataset import Batch
from omega_qvla.training.learner import Learner, draw_dense, repeat

EMBEDDING_SPREAD = 0.5
"""Standard deviation of the words and learned tokens at the start; the image tokens' is about 1."""
POSITION_SPREAD = 0.3


class Gr00tLearner(Learner):
    """GR00T N1.5 (``policies/gr00t_n15``) with the plain prompt: images, then instruction."""

    policy: Gr00tN15Module
    direction = -1.0

    def __init__(self, module: Gr00tN15Module) -> None:
        super().__init__(module, module.config.backbone.width)

    def embed_text(self, tokens: Tensor) -> Tensor:
        # Not by ``embed_prompt``: padding is the token that stands for images.
        return self.policy.embed_tokens(tokens)

    def prefill(self, prompt: Tensor, seen: Tensor, batch: Batch) -> tuple[Tensor, Observed]:
        policy, mask = self.policy, seen[:, None, None, :]
        features = policy.backbone_features(prompt)
        padding = policy.config.state_width - batch.state.shape[-1]
        state = F.pad(batch.state, (0, padding))
        return features, policy.observe(policy.head_features(features, mask), state, mask)

    def velocity(self, x_t: Tensor, times: Tensor, observed: Observed) -> Tensor:
        schedule = self.policy.schedule(times)
        return self.policy.velocity(x_t, schedule, _repeated(observed, len(times)))


def _repeated(observed: Observed, count: int) -> Observed:
    """Every observation several times in a row, ``count`` rows in all."""
    times = count // len(observed.state)
    cross = tuple((repeat(key, times), repeat(value, times)) for key, value in observed.cross)
    mask = None if observed.mask is None else repeat(observed.mask, times)
    return Observed(cross, repeat(observed.state, times), mask)


def initialize_gr00t(module: Gr00tN15Module, seed: int) -> None:
    """Starting weights that suit a small network and a short run.

    Adaptive norms start as plain norms, and the velocity near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        draw_dense(module, generator)
        for layer in module.modules():
            if isinstance(layer, EmbodimentLinear):
                layer.W.normal_(0.0, layer.W.shape[1] ** -0.5, generator=generator)
                layer.b.zero_()
        for norm in module.adaptive_norms():
            if norm.linear is not None:
                norm.linear.weight.zero_()
        module.action_head.model.proj_out_1.weight.zero_()
        module.action_head.action_decoder.layer2.W.mul_(0.1)
        for table, spread in (
            (module.embed_tokens, EMBEDDING_SPREAD),
            (module.action_head.future_tokens, EMBEDDING_SPREAD),
            (module.action_head.position_embedding, POSITION_SPREAD),
            (module.vision_model.embeddings.position_embedding, POSITION_SPREAD),
        ):
            table.get_parameter("weight").normal_(0.0, spread, generator=generator)
