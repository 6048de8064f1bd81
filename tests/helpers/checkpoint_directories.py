"""Directories in the layouts of openpi and LeRobot, and a real sentencepiece model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_formats import (
    QWEN_IMAGE_TOKEN,
    QWEN_TOKENS,
    TRAINING,
    gr00t_metadata,
    gr00t_settings,
    gr00t_tensors,
    official_tensors,
    openpi_statistics,
    small_qwen,
    tiny_gr00t,
    tiny_official,
    train_sentencepiece,
    write_groot,
    write_lerobot_pi05,
)
from safetensors.torch import save_file

from omega_qvla.policies.gr00t_n15.checkpoints import sizes as gr00t_sizes
from omega_qvla.policies.layers import siglip_checkpoints
from omega_qvla.policies.paligemma.config import PaligemmaConfig


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A real sentencepiece model with PaliGemma's special tokens and single digits."""
    pytest.importorskip("sentencepiece", reason="the extra hub is not installed")
    return train_sentencepiece()


@pytest.fixture
def small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of the small vision tower, which its shapes do not tell."""
    monkeypatch.setitem(siglip_checkpoints.VISION_HEADS, (64, 72), 2)


@pytest.fixture
def openpi_directory(
    tmp_path: Path, sentencepiece_model: bytes, small_tower: None
) -> Callable[..., Path]:
    """Writes an openpi checkpoint as its converter does; ``training.json`` is beside it."""

    def write(name: str = "openpi", config: PaligemmaConfig | None = None) -> Path:
        config = config or tiny_official()
        directory = tmp_path / name
        statistics = directory / "assets" / "physical-intelligence" / "libero"
        statistics.mkdir(parents=True)
        save_file(official_tensors(config), directory / "model.safetensors")
        (statistics / "norm_stats.json").write_text(json.dumps(openpi_statistics()))
        converted = {"action_dim": 8, "action_horizon": 4, "precision": "bfloat16"}
        converted |= {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
        (directory / "config.json").write_text(json.dumps(converted))
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
        (tmp_path / "training.json").write_text(json.dumps(TRAINING))
        return directory

    return write


@pytest.fixture
def lerobot_directory(
    tmp_path: Path, sentencepiece_model: bytes, small_tower: None
) -> Callable[..., Path]:
    """Writes a pi05 checkpoint as LeRobot 0.4.4 does; settings may be changed."""

    def write(name: str = "lerobot", prefix: str = "model.", **changes: Any) -> Path:
        return write_lerobot_pi05(tmp_path / name, sentencepiece_model, prefix, **changes)

    return write


@pytest.fixture
def gr00t_directory(tmp_path: Path, small_tower: None) -> Callable[..., Path]:
    """Writes a GR00T N1.5 checkpoint as Isaac-GR00T does, in two shards."""
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")

    def write(name: str = "gr00t", tags: tuple[str, ...] = ("new_embodiment",)) -> Path:
        directory = tmp_path / name
        (directory / "experiment_cfg").mkdir(parents=True)
        config = tiny_gr00t(QWEN_TOKENS, QWEN_IMAGE_TOKEN)
        tensors = gr00t_tensors(config)
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2]}
        shards["model-00002-of-00002.safetensors"] = names[1::2]
        for file, keys in shards.items():
            save_file({key: tensors[key] for key in keys}, directory / file)
        index = {key: file for file, keys in shards.items() for key in keys}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (directory / "config.json").write_text(json.dumps(gr00t_settings(config)))
        text = json.dumps(gr00t_metadata(tags))
        (directory / "experiment_cfg" / "metadata.json").write_text(text)
        for file, content in small_qwen().items():
            (directory / file).write_bytes(content)
        return directory

    return write


@pytest.fixture
def groot_directory(
    tmp_path: Path, small_tower: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a groot checkpoint as LeRobot 0.4.4 does; settings may be changed."""
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")
    monkeypatch.setitem(gr00t_sizes.FEATURE_HEADS, 64, 2)
    monkeypatch.setitem(gr00t_sizes.HEAD_HEADS, 32, 4)

    def write(name: str = "groot", **changes: Any) -> Path:
        return write_groot(tmp_path / name, **changes)

    return write
