"""The optimizer's steps, checkpoints and curve of a training run on a CPU.

AdamW with linear warm-up and a cosine to 2 %; the weights that are kept are an exponential moving
average.  Randomness of step n comes from a generator seeded with (seed, n), so that an interrupted
run that is started again continues as if it had not been interrupted.  Checkpoints are safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omega_qvla.errors import ResumeError
from omega_qvla.policies.native import NativePolicy
from omega_qvla.training.dataset import Batch, TrainingSet
from omega_qvla.training.families import TrainedFamily

Losses = Callable[[Batch, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that fixes a training run, the data aside.

    Attributes:
        steps: optimizer steps.
        batch: observations a step.
        noise_samples: (noise, time) pairs per observation.
        position_weight, point_weight: weights of the auxiliary losses.
        shift: largest shift of the images, in pixels, the same for a whole batch and camera.
        brightness: largest relative change of brightness.
        half: bfloat16 matrix products (weights, norms and optimizer stay in float32).
    """

    steps: int = 6000
    batch: int = 64
    noise_samples: int = 4
    learning_rate: float = 1e-3
    warmup: int = 150
    weight_decay: float = 0.02
    average_decay: float = 0.998
    position_weight: float = 0.5
    point_weight: float = 0.1
    shift: int = 2
    brightness: float = 0.15
    half: bool = True
    compiled: bool = True
    seed: int = 0


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """Warm-up, then a cosine from ``learning_rate`` to 2 % of it."""
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(learner: nn.Module, plan: TrainingPlan) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in learner.parameters() if p.ndim >= 2]
    vectors = [p for p in learner.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def augment(batch: Batch, plan: TrainingPlan, generator: torch.Generator) -> Batch:
    """Shift each camera by a few pixels and change its brightness, one draw a batch."""
    views: list[Tensor] = []
    points = batch.points.clone()
    for camera, view in enumerate(batch.pixels.unbind(1)):
        dy, dx = torch.randint(-plan.shift, plan.shift + 1, (2,), generator=generator).tolist()
        gain = 1.0 + plan.brightness * float(torch.rand((), generator=generator) * 2.0 - 1.0)
        moved = torch.roll(view, (dy, dx), dims=(1, 2)).to(torch.float32)
        views.append((moved * gain).clamp_(0.0, 255.0))
        points[:, camera] += torch.tensor([dx / view.shape[2], dy / view.shape[1]])
    return replace(batch, pixels=torch.stack(views, dim=1), points=points)


class Trainer:
    """One run: its state, its steps and its files under ``directory``."""

    def __init__(
        self, family: TrainedFamily, data: TrainingSet, plan: TrainingPlan, directory: Path
    ) -> None:
        self.family, self.data, self.plan, self.directory = family, data, plan, directory
        self.learner = family.learner(data.processor, plan.seed)
        weights = self.learner.policy.state_dict()
        self.average = {k: v.detach().clone() for k, v in weights.items()}
        self.optimizer = make_optimizer(self.learner, plan)
        self._losses = _compiled(self.learner.losses) if plan.compiled else self.learner.losses
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self._resume()

    def train(
        self,
        report: Callable[[Mapping[str, float]], None],
        *,
        until: int | None = None,
        checkpoint_s: float = 240.0,
    ) -> None:
        """Run to step ``until`` (the end by default), reporting every 50 steps and saving often."""
        smooth, started, saved = [math.nan] * 3, time.monotonic(), time.monotonic()
        first = self.step
        self.learner.train()
        while self.step < (self.plan.steps if until is None else until):
            losses = self.train_step()
            smooth = [
                new if math.isnan(old) else 0.97 * old + 0.03 * new
                for old, new in zip(smooth, losses, strict=True)
            ]
            if self.step % 50 == 0:
                rate = (self.step - first) / (time.monotonic() - started)
                point = {
                    "step": self.step,
                    "flow": smooth[0],
                    "position": smooth[1],
                    "point": smooth[2],
                }
                self.curve.append(point)
                report({**point, "steps_per_s": rate})
            if time.monotonic() - saved > checkpoint_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def train_step(self) -> tuple[float, float, float]:
        """One optimizer step; returns the three losses."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        batch = augment(self.data.batch(plan.batch, generator), plan, generator)
        draws = plan.batch * plan.noise_samples
        noise = torch.randn((draws, *batch.actions.shape[1:]), generator=generator)
        uniform = torch.rand(draws, generator=generator)
        times = 0.001 + 0.999 * uniform ** (1.0 / 1.5)  # inverse of Beta(1.5, 1)'s distribution
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(plan, self.step)
        with _precision(plan.half), sdpa_kernel(SDPBackend.MATH):
            flow, position, point = self._losses(batch, noise, times)
        self.optimizer.zero_grad(set_to_none=True)
        total = flow + plan.position_weight * position + plan.point_weight * point
        total.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        return float(flow.detach()), float(position.detach()), float(point.detach())

    def averaged_policy(self) -> NativePolicy:
        """The policy with the averaged weights."""
        policy = self.family.policy(self.data.processor)
        policy.module.load_state_dict(self.average)
        return policy

    def save(self) -> None:
        """Write everything that ``_resume`` reads, atomically, and the curve."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "state.partial"
        meta = {"step": str(self.step), "plan": json.dumps(asdict(self.plan))}
        save_file(dict(self._tensors()), partial, metadata=meta)
        partial.replace(self.directory / "state.safetensors")
        partial = self.directory / "curve.partial"
        partial.write_text(json.dumps({"step": self.step, "curve": self.curve}))
        partial.replace(self.directory / "curve.json")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.learner.state_dict().items():
            yield f"weights/{name}", value.contiguous()
        for name, value in self.average.items():
            yield f"average/{name}", value
        for name, parameter in self.learner.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                yield f"optimizer/{key}/{name}", torch.as_tensor(value).detach().contiguous()

    def _resume(self) -> None:
        path, curve = self.directory / "state.safetensors", self.directory / "curve.json"
        if not path.is_file() or not curve.is_file():
            return
        tensors, content = load_file(path), json.loads(curve.read_text())
        try:
            self.learner.load_state_dict(_below(tensors, "weights/"))
            self.average = _below(tensors, "average/")
            for name, parameter in self.learner.named_parameters():
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer/{key}/{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        except (RuntimeError, KeyError) as error:
            raise ResumeError(
                f"{path} belongs to a policy of another shape; remove it to start again: {error}"
            ) from error
        self.step = int(next(iter(_below(tensors, "optimizer/step/").values())))
        self.curve = [point for point in content["curve"] if point["step"] <= self.step]

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.plan.average_decay, (1 + self.step) / (10 + self.step))
        weights = self.learner.policy.state_dict()
        for name, value in self.average.items():
            value.lerp_(weights[name], 1.0 - decay)


def _compiled(losses: Losses) -> Losses:
    return torch.compile(losses, dynamic=False) if shutil.which("c++") else losses


def _precision(half: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
