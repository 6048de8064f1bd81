"""The bridge to LeRobot's policies, as far as it goes without LeRobot (see tests/lerobot)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.lerobot_bridge.coverage import coverage, coverage_lines
from omega_qvla.policies.lerobot_bridge.empty import cast, require_filled, weights_on_meta
from omega_qvla.policies.lerobot_bridge.watching import watch


def missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


class Robot(nn.Module):
    """Two tokens, two images and four denoising steps, as LeRobot's policies have them."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(96, 64)
        self.vision = nn.Linear(64, 64)
        self.both = nn.Linear(64, 64)
        layer = {"q": nn.Linear(64, 64), "k": nn.Linear(64, 16)}
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])
        self.out = nn.Linear(64, 64)
        self.state = nn.Linear(8, 64)
        self.head = nn.Linear(64, 96)
        self.register_buffer("table", torch.arange(64.0), persistent=False)

    def step(self, x: Tensor) -> Tensor:
        query, key = self.layers[0].values()
        return self.out(self.both(query(x)) + key(x).repeat(1, 4))

    def sample(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).mean(dim=1)
        for _ in range(2):
            x = self.vision(x)
        x = self.both(x) + self.state(torch.ones(1, 8)) + self.table
        for _ in range(4):
            x = self.step(x)
        return x


LAYER = ("layers.0.q", "layers.0.k")
TOKENS = torch.tensor([[3, 1]])


def test_a_pass_sorts_the_linears_and_names_what_is_left() -> None:
    robot = Robot()
    seen = watch(robot, "step", lambda module: module.sample(TOKENS))
    assert (seen.steps, seen.once, seen.per_step) == (4, ("vision",), LAYER)
    assert {left.reason: left.names for left in seen.kept} == {
        "run inside and outside of the denoising steps": ("both",),
        "narrower than 64 channels": ("state",),
        "in a denoising step, outside of its layers": ("out",),
    }
    assert seen.absent == ("head",)
    rows = coverage(robot, seen)
    counted = sum(row["parameters"] for row in rows)
    assert counted == sum(p.numel() for p in Robot().parameters())
    lines = coverage_lines(rows)
    assert lines[0].startswith("quantized") and "1 linears that run once" in lines[0]
    assert any(line.startswith("left out") and line.endswith(": head") for line in lines)


def test_a_linear_that_was_left_out_answers_with_its_shape_and_refuses_to_compute() -> None:
    robot = Robot()
    watch(robot, "step", lambda module: module.sample(TOKENS))
    assert robot.head.weight.shape == (96, 64) and robot.head.weight.dtype is torch.float32
    assert not [name for name in robot.state_dict() if name.startswith("head")]
    with pytest.raises(PolicyError, match="'head' was never called"):
        robot.head(torch.ones(1, 64))
    with pytest.raises(PolicyError, match=r"'head\.weight' directly"):
        torch.nn.functional.linear(torch.ones(1, 64), robot.head.weight)


def test_a_linear_whose_weight_is_read_stays() -> None:
    class Reader(Robot):
        def step(self, x: Tensor) -> Tensor:
            return super().step(x) + self.head.weight.sum()

    robot = Reader()
    seen = watch(robot, "step", lambda module: module.sample(TOKENS))
    assert seen.absent == ()
    assert {left.reason for left in seen.kept} >= {"never called, but their weights are read"}
    assert isinstance(robot.head, nn.Linear)


def test_a_step_that_is_never_called_is_named() -> None:
    with pytest.raises(PolicyError, match="'state', which LeRobot calls once per denoising step"):
        watch(Robot(), "state", lambda module: module.words(TOKENS))
    with pytest.raises(PolicyError, match="no 'denoise'"):
        watch(Robot(), "denoise", lambda module: module.sample(TOKENS))


def test_a_module_is_built_without_its_weights_and_with_everything_else() -> None:
    with weights_on_meta():
        robot = Robot().to("cpu").to(torch.float32)
    assert all(parameter.is_meta for parameter in robot.parameters())
    assert torch.equal(robot.table, torch.arange(64.0))
    require_filled(robot)
    cast(robot, "torch.float32", {"vision.weight": "torch.bfloat16"})
    assert robot.vision.weight.dtype is torch.bfloat16 and robot.vision.weight.is_meta
    assert robot.out.weight.dtype is torch.float32


def test_a_table_that_nothing_fills_is_named() -> None:
    class Forgetful(Robot):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.empty(4), persistent=False)

    with weights_on_meta():
        robot = Forgetful()
    with pytest.raises(PolicyError, match="'mask' of the module is neither in a checkpoint"):
        require_filled(robot)


def policy_of(kind: str, directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps({"type": kind}))
    return directory


@pytest.mark.parametrize("kind", ["smolvla", "diffusion"])
def test_without_lerobot_it_is_said_what_to_install(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omega_qvla.policies.lerobot_bridge.library.version", missing)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        (tmp_path / name).write_text('{"steps": []}')
    with pytest.raises(ResourceError, match=r"not installed here: install lerobot==0\.6\.1"):
        oq.load_policy(policy_of(kind, tmp_path))


def test_a_type_that_was_not_tried_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"type 'wall_x' was not tried.*smolvla, xvla"):
        oq.load_policy(policy_of("wall_x", tmp_path))
    with pytest.raises(PolicyError, match=r"'pi0_fast' is not quantized.*trust_remote_code"):
        oq.load_policy(policy_of("pi0_fast", tmp_path))


def test_a_policy_on_the_hub_needs_its_revision() -> None:
    with pytest.raises(PolicyError, match=r"pin the revision: owner/name@<commit>"):
        oq.load_policy("lerobot/smolvla_base")
