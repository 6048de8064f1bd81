"""The plug-in: an artifact as a policy of LeRobot's, by LeRobot's own factories.

It has to be installed in LeRobot's environment (``make test-lerobot``), since LeRobot finds it by
the name of its distribution.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lerobot_directories
import lerobot_policies
import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.errors import OmegaError, PolicyError, ResourceError

try:
    version("lerobot_policy_omega_qvla")
except PackageNotFoundError:
    pytest.skip("integrations/lerobot is not installed here", allow_module_level=True)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = oq.load_policy("builtin:tiny-pi05")
    observations = oq.Observations.load("builtin:tiny-pi05").spread(2)
    out = tmp_path_factory.mktemp("plugin") / "native"
    oq.quantize(policy, observations, "rtn").save_pretrained(out)
    return out


def made(directory: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """Policy and pipelines, as ``lerobot-eval`` makes them."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(directory)
    for name, value in changes.items():
        setattr(config, name, value)
    policy = get_policy_class(config.type).from_pretrained(directory, config=config)
    policy.to(config.device)
    overrides = {
        "device_processor": {"device": "cpu"},
        "rename_observations_processor": {"rename_map": {}},
    }
    pair = make_pre_post_processors(config, str(directory), preprocessor_overrides=overrides)
    return policy, *pair


def batch_of(observations: list[Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What ``lerobot-eval`` makes of the observations of as many environments."""
    pixels = {
        f"observation.images.{name}": torch.stack(
            [torch.from_numpy(o["images"][name].copy()).permute(2, 0, 1) for o in observations]
        ).float()
        / 255
        for name in names
    }
    states = torch.stack([torch.as_tensor(np.asarray(o["state"])) for o in observations])
    prompts = [o["prompt"] for o in observations]
    return {**pixels, "observation.state": states.float(), "task": prompts}


def test_a_native_policy_gives_what_it_gives_outside_of_lerobot(native: Path) -> None:
    policy, before, after = made(native, noise_seed=5)
    observations = list(oq.Observations.load("builtin:tiny-pi05", split="heldout").spread(2))
    loaded = oq.load(native)
    batch = before(batch_of(observations, tuple(loaded.policy.config.cameras)))
    policy.reset()
    chunk = after(policy.predict_action_chunk(batch))
    assert chunk.shape[0] == 2 and policy.device == torch.device("cpu")
    for row, observation in enumerate(observations):
        stream = np.random.default_rng((5 + row, 0))
        noise = stream.standard_normal(loaded.noise_shape, dtype=np.float32)
        alone = loaded.sample_actions(observation, noise)
        # Two rows share a pass: sums of floats may be ordered in another way.
        assert np.abs(chunk[row].numpy() - alone).max() < 1e-4


def test_actions_are_taken_one_by_one_and_a_new_episode_has_noise_of_its_own(native: Path) -> None:
    policy, before, _ = made(native, noise_seed=5, n_action_steps=3)
    observations = list(oq.Observations.load("builtin:tiny-pi05").spread(1))
    batch = before(batch_of(observations, tuple(oq.load(native).policy.config.cameras)))
    policy.reset()
    first = policy.predict_action_chunk(batch)
    policy.reset()
    second = [policy.select_action(batch) for _ in range(3)]
    policy.reset()
    again = policy.predict_action_chunk(batch)
    assert not torch.equal(first[:, :3].transpose(0, 1), torch.stack(second))
    assert not torch.equal(first, again)


def test_a_chunk_continues_the_one_before_as_lerobots_rollout_asks(native: Path) -> None:
    """In the call shape of its real-time chunking: [T, A], filled up with zeros to the horizon."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    policy, before, _ = made(native)
    assert supports_rtc_inference(policy)
    policy.config.rtc_config = RTCConfig(execution_horizon=8)
    loaded = oq.load(native)
    (observation,) = oq.Observations.load("builtin:tiny-pi05").spread(1)
    batch = before(batch_of([observation], tuple(loaded.policy.config.cameras)))
    noise = torch.randn(1, *loaded.noise_shape, generator=torch.Generator().manual_seed(1))
    left = policy.predict_action_chunk(batch, noise)[0, 4:]
    filled = torch.cat((left, torch.zeros(8 - len(left), left.shape[1])))
    found = policy.predict_action_chunk(
        batch, -noise, inference_delay=2, prev_chunk_left_over=filled
    )
    wanted = loaded.sample_actions(
        observation,
        -noise[0],
        previous=left,
        delay=2,
        chunking=oq.RealTimeChunking(execution_horizon=8),
    )
    assert np.abs(found[0].numpy() - wanted).max() < 1e-5
    free = policy.predict_action_chunk(batch, -noise)
    assert (found[0, :2] - left[:2]).abs().max() < (free[0, :2] - left[:2]).abs().max()


def test_a_missing_camera_is_named(native: Path) -> None:
    policy, _, _ = made(native)
    with pytest.raises(OmegaError, match=r"observation\.images\.wrist.*--rename_map"):
        policy.select_action({"observation.state": torch.zeros(1, 4)})


def test_it_is_neither_trained_nor_found_on_a_hub(native: Path) -> None:
    policy, _, _ = made(native)
    with pytest.raises(NotImplementedError, match="not trained"):
        policy.forward({})
    with pytest.raises(PolicyError, match="hf download"):
        type(policy).from_pretrained("somebody/something")


@pytest.fixture(scope="module")
def bridged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory of LeRobot's, and an artifact made of it."""
    directory = lerobot_directories.write_policy("act", tmp_path_factory.mktemp("plugin") / "act")
    out = directory.with_name("act-out")
    policy = oq.load_policy(directory)
    oq.quantize(policy, lerobot_directories.observations(), "rtn").save_pretrained(out)
    return directory, out


def test_a_policy_of_lerobots_acts_as_lerobot_lets_it(bridged: tuple[Path, Path]) -> None:
    """Against LeRobot's own policy with its own pipelines: up to what four bits cost."""
    _, out = bridged
    observations = lerobot_directories.observations(2)
    batch = batch_of(observations, lerobot_policies.CAMERAS)
    policy, before, after = made(out)
    policy.reset()
    actions = [after(policy.select_action(before(batch))) for _ in range(3)]
    loaded = oq.load(out)
    for row, observation in enumerate(observations):
        chunk = loaded.sample_actions(observation)
        found = torch.stack(actions)[:, row].numpy()
        assert np.abs(found - chunk[:3]).max() < 1e-4


def test_a_policy_of_lerobots_continues_no_chunk(bridged: tuple[Path, Path]) -> None:
    policy, _, _ = made(bridged[1])
    assert not policy.supports_rtc()
    with pytest.raises(PolicyError, match="continues no chunk"):
        policy.predict_action_chunk({}, inference_delay=1)


def test_a_gpu_is_refused_where_lerobots_code_runs(bridged: tuple[Path, Path]) -> None:
    with pytest.raises(ResourceError, match=r"--policy\.device=cpu"):
        made(bridged[1], device="cuda")


def test_lerobot_eval_solves_the_episodes_that_our_eval_solves(
    native: Path, tmp_path: Path
) -> None:
    pytest.importorskip("metaworld")
    common = {"cwd": tmp_path, "check": True, "capture_output": True, "env": {**os.environ}}
    task, episodes = "drawer-open-v3", 2
    subprocess.run(
        [
            *(sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={native}"),
            *("--env.type=omega_metaworld", f"--env.task={task}", "--eval.batch_size=1"),
            *(f"--eval.n_episodes={episodes}", "--seed=0", "--policy.noise_seed=0"),
            *("--policy.n_action_steps=5", "--policy.device=cpu", "--output_dir=theirs"),
        ],
        **common,
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "omega_qvla.cli", "eval", str(native), "--tasks", task),
            *("--episodes", str(episodes), "--seed", "0", "--workers", "1"),
            *("--processes", "1", "--json", "ours.json"),
        ],
        **common,
    )
    theirs = json.loads((tmp_path / "theirs" / "eval_info.json").read_text())
    solved = theirs["per_task"][0]["metrics"]["successes"]
    row = json.loads((tmp_path / "ours.json").read_text())["row"]
    assert row["success"][task] == [sum(map(bool, solved)), episodes]
