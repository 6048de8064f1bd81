"""pi0 in four bits: quantized from memory and from its files, saved, loaded and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoint_formats import TRAINING, openpi_statistics, tiny_pi0

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.full_precision import stream_policy


def test_a_checkpoint_of_openpi_is_quantized_saved_loaded_and_run(
    openpi_directory: Callable[..., Path], tmp_path: Path
) -> None:
    directory = openpi_directory("pi0", tiny_pi0())
    statistics = directory / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    statistics.write_text(json.dumps(openpi_statistics()))
    training = {key: value for key, value in TRAINING.items() if key != "state_in_prompt"}
    (tmp_path / "pi0.json").write_text(json.dumps(training))
    options = CheckpointOptions(training_config=str(tmp_path / "pi0.json"))
    policy = oq.load_policy(directory, options)
    config = policy.config
    seen = Observations.random(config.cameras, config.state_dim, count=4, size=28)
    noise = np.random.default_rng(0).standard_normal(policy.noise_shape).astype(np.float32)
    exact = policy.sample_actions(seen[0], noise)

    quantized = oq.quantize(policy, seen)
    assert len(quantized.config["sites"]) == len(sites_of(policy))
    actions = quantized.sample_actions(seen[0], noise=noise)
    assert 0.0 < np.linalg.norm(actions - exact) < 0.3 * np.linalg.norm(exact)
    streamed = oq.quantize(stream_policy(directory, options), seen)
    assert np.array_equal(streamed.sample_actions(seen[0], noise=noise), actions)

    quantized.save_pretrained(tmp_path / "artifact")
    loaded = oq.load(tmp_path / "artifact")
    assert np.array_equal(loaded.sample_actions(seen[0], noise=noise), actions)
    other = dict(seen[0]) | {"state": -seen[0]["state"]}
    assert not np.array_equal(loaded.sample_actions(other, noise=noise), actions)
