"""LeRobot's policy directories: quantized as a user does it, loaded in another process and run.

The other process has no full-precision weights, no tokenizer folder and no hub: everything comes
out of the artifact.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lerobot_directories
import lerobot_policies
import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
from omega_qvla.runtime.inspection import inspect_artifact

# Linears in all, of which the artifact has integers; sites they make; linears that are left out.
COVERAGE = {
    "smolvla": (69, 45, 1),
    "xvla": (37, 33, 0),
    "multi_task_dit": (35, 27, 0),
    "act": (6, 6, 11),
}

_LOAD = """
import sys, numpy as np, torch, omega_qvla as oq
import lerobot_directories
name, directory, out = sys.argv[1:]
loaded = oq.load(directory)
generator = torch.Generator().manual_seed(3)
found = [loaded.sample_actions(o, generator=generator) for o in lerobot_directories.observations()]
np.save(out, np.stack(found))
"""


def chunks(policy: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    observations = lerobot_directories.observations()
    return np.stack([policy.sample_actions(item, generator=generator) for item in observations])


def directory_of(name: str, tmp_path: Path) -> Path:
    return lerobot_directories.write_policy(name, tmp_path / name)


@pytest.mark.parametrize("name", list(COVERAGE))
def test_a_directory_is_quantized_and_runs_in_another_process_to_the_bit(
    name: str, tmp_path: Path
) -> None:
    directory = directory_of(name, tmp_path)
    with lerobot_policies.shrunken(name):
        policy = oq.load_policy(directory)
    assert isinstance(policy, LeRobotPolicy)
    quantized = oq.quantize(policy, lerobot_directories.observations())
    ours = chunks(quantized)
    linears = sum(len(site.site.linears) for site in quantized.sites)
    assert (linears, len(quantized.sites), len(policy.watched.absent)) == COVERAGE[name]
    # The same module by plain TorchPolicy, with the patterns that a user would write.
    plain = lerobot_policies.torch_policy(name)
    batches = [policy.preprocess(policy.batch_of(o)) for o in lerobot_directories.observations()]
    theirs = _error(plain, oq.quantize(plain, _tensors(batches)), _tensors(batches))
    error = _error(policy, quantized, batches)
    print(f"{name}: error {error:.4f}, {theirs:.4f} by TorchPolicy")
    assert error < 1.1 * theirs
    quantized.save_pretrained(tmp_path / "out")
    shutil.rmtree(directory)
    shutil.rmtree(directory.with_name(f"{name}-tokenizer"))
    helpers = str(Path(lerobot_policies.__file__).parent)
    subprocess.run(
        [sys.executable, "-c", _LOAD, name, str(tmp_path / "out"), str(tmp_path / "again.npy")],
        env={**os.environ, "PYTHONPATH": helpers, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    assert np.array_equal(np.load(tmp_path / "again.npy"), ours)
    coverage = inspect_artifact(tmp_path / "out").config["policy"]["config"]["coverage"]
    assert coverage == [dict(row) for row in policy.coverage]


def _error(exact: oq.TorchPolicy, quantized: Any, batches: list[dict[str, Any]]) -> float:
    """Relative error of the normalized actions."""

    def sampled(policy: oq.TorchPolicy) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.stack(
            [oq.TorchPolicy.sample_actions(policy, b, generator=generator) for b in batches]
        )

    before = sampled(exact)
    difference = sampled(quantized.policy) - before
    return float((difference.square().mean() / before.square().mean()).sqrt())


def _tensors(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of LeRobot's batches, what the network reads."""
    return [
        {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k.startswith("obs")}
        for batch in batches
    ]


@pytest.fixture(scope="module")
def act(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_of("act", tmp_path_factory.mktemp("bridge"))


def changed(directory: Path, tmp_path: Path, file: str, change: Any) -> Path:
    copy = Path(shutil.copytree(directory, tmp_path / "changed"))
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return copy


def test_a_step_of_another_plug_in_is_refused(act: Path, tmp_path: Path) -> None:
    def add(content: Any) -> None:
        content["steps"].append({"registry_name": "somebodys_step", "config": {}})

    with pytest.raises(PolicyError, match="'somebodys_step', which is not LeRobot's own"):
        oq.load_policy(changed(act, tmp_path, "policy_preprocessor.json", add))


def test_a_step_that_is_code_from_elsewhere_is_not_imported(act: Path, tmp_path: Path) -> None:
    def add(content: Any) -> None:
        content["steps"].append({"class": "antigravity.Step", "config": {}})

    with pytest.raises(PolicyError, match=r"'antigravity\.Step', which is not LeRobot's own"):
        oq.load_policy(changed(act, tmp_path, "policy_postprocessor.json", add))
    assert "antigravity" not in sys.modules


def test_a_field_that_this_lerobot_does_not_know_is_refused(act: Path, tmp_path: Path) -> None:
    directory = changed(act, tmp_path, "config.json", lambda c: c.update(wings=2))
    with pytest.raises(PolicyError, match=r"LeRobot refuses the policy's config\.json.*wings"):
        oq.load_policy(directory)


def test_weights_that_do_not_fit_are_refused_although_lerobot_would_go_on(
    act: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(act, tmp_path / "changed"))
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.action_head.weight")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(PolicyError, match=r"action_head\.weight"):
        oq.load_policy(copy)


def test_diffusion_is_refused_with_the_share_that_would_be_quantized(tmp_path: Path) -> None:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    config = DiffusionConfig(**lerobot_policies.features(), n_obs_steps=1, horizon=16)
    config._save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"not quantized: \d+\.\d% of its weights"):
        oq.load_policy(tmp_path)


def test_an_artifact_of_another_lerobot_is_refused(
    act: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = oq.load_policy(act)
    observations = lerobot_directories.observations(1)
    oq.quantize(policy, observations, "rtn").save_pretrained(tmp_path / "out")
    library = "omega_qvla.policies.lerobot_bridge.library"
    monkeypatch.setattr(f"{library}.TESTED", ("0.6.1", "9.9.9"))
    monkeypatch.setattr(f"{library}.version", lambda name: "9.9.9")
    with pytest.raises(ResourceError, match=r"made with LeRobot 0\.6\.1.*LeRobot 9\.9\.9 is"):
        oq.load(tmp_path / "out")


def test_another_version_of_lerobot_is_refused(act: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omega_qvla.policies.lerobot_bridge.library.version", lambda name: "0.7.0")
    with pytest.raises(ResourceError, match=r"LeRobot 0\.7\.0 is installed.*0\.6\.1 only"):
        oq.load_policy(act)
