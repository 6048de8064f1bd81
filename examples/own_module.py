"""Quantize a module of your own: a small flow-matching policy, saved and loaded into a new process.

    python examples/own_module.py [--recipe rtn] [--out out/own]

The policy has a backbone that reads tokens once, and an action head that denoises a chunk over ten
steps while it attends to the backbone's features.  Its weights are random: what is shown is how to
name its parts, what ``sample`` must do, and that what was saved computes the same bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import omega_qvla as oq

WIDTH, HORIZON, ACTIONS, STEPS = 64, 8, 4, 10


class Attention(nn.Module):
    """Queries of the actions over the backbone's features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        queries, keys, values = self.q(x), self.k(memory), self.v(memory)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return x + self.o(attended)


class Policy(nn.Module):
    """Tokens [T] → features [T, WIDTH]; noisy actions and their time → velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.backbone = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.action_in = nn.Linear(ACTIONS + 1, WIDTH)
        self.head = nn.ModuleList(Attention() for _ in range(2))
        self.action_out = nn.Linear(WIDTH, ACTIONS)

    def observe(self, tokens: Tensor) -> Tensor:
        return self.backbone(self.embed(tokens))

    def velocity(self, x: Tensor, t: float, memory: Tensor) -> Tensor:
        x = self.action_in(torch.cat((x, x.new_full((HORIZON, 1), t)), dim=-1))
        for layer in self.head:
            x = layer(x, memory)
        return self.action_out(x)


def build(seed: int) -> Policy:
    """A policy with random weights."""
    policy = Policy()
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, std=spread, generator=generator)
    return policy


def sample(module: Policy, observation: dict[str, Tensor], noise: Tensor, clock: oq.FlowClock):
    """One chunk [HORIZON, ACTIONS]: the same observation and noise give the same one."""
    memory, x = module.observe(observation["tokens"]), noise
    for i in range(STEPS):
        t = 1 - i / STEPS
        with clock.step(i, t):  # every denoising step, at its flow time
            x = x - module.velocity(x, t, memory) / STEPS
    return x


def wrapped(module: Policy) -> oq.TorchPolicy:
    """What ``quantize`` and ``load`` take."""
    return oq.TorchPolicy(
        module,
        backbone=r"backbone\..*",
        action_head=r"head\..*",
        sample=sample,
        steps=STEPS,
        noise_shape=(HORIZON, ACTIONS),
    )


def main() -> None:
    """Quantize, save, load into another module, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="omega-w4a4")
    parser.add_argument("--out", type=Path, default=Path("out/own"))
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    observations = [{"tokens": torch.randint(100, (16,), generator=generator)} for _ in range(16)]
    policy = wrapped(build(seed=1))
    quantized = oq.quantize(policy, observations[:12], options.recipe)
    quantized.save_pretrained(options.out)
    loaded = oq.load(options.out, policy=wrapped(build(seed=2)))  # other weights: none is kept
    noise = torch.randn(HORIZON, ACTIONS, generator=generator)
    for number, held_out in enumerate(observations[12:]):
        exact = torch.as_tensor(policy.sample_actions(held_out, noise))
        chunk = torch.as_tensor(quantized.sample_actions(held_out, noise=noise))
        again = torch.as_tensor(loaded.sample_actions(held_out, noise=noise))
        error = float((chunk - exact).square().sum() / exact.square().sum())
        print(f"observation {number}: error {error:.5f}, loaded is equal: {chunk.equal(again)}")


if __name__ == "__main__":
    main()
