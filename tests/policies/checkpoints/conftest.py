"""Directories in the layouts of openpi and LeRobot, and a real sentencepiece model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_formats import (
    SENTENCES,
    TRAINING,
    lerobot_config,
    lerobot_pipelines,
    lerobot_statistics,
    official_tensors,
    openpi_statistics,
    tiny_official,
)
from safetensors.torch import save_file

from omega_qvla.policies.checkpoints import pi05_sizes
from omega_qvla.policies.pi05 import Pi05Config


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A real sentencepiece model with PaliGemma's special tokens and single digits."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra hub is not installed")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of the small vision tower, which its shapes do not tell."""
    monkeypatch.setitem(pi05_sizes.VISION_HEADS, (64, 72), 2)


@pytest.fixture
def openpi_directory(
    tmp_path: Path, sentencepiece_model: bytes, small_tower: None
) -> Callable[..., Path]:
    """Writes an openpi checkpoint as its converter does; ``training.json`` is beside it."""

    def write(name: str = "openpi", config: Pi05Config | None = None) -> Path:
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
        directory = tmp_path / name
        directory.mkdir()
        config = lerobot_config() | changes
        tensors = official_tensors(tiny_official())
        save_file({prefix + k: v for k, v in tensors.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
        for kind, pipeline in zip(("pre", "post"), lerobot_pipelines(config), strict=True):
            (directory / f"policy_{kind}processor.json").write_text(json.dumps(pipeline))
            for step in pipeline["steps"]:
                if "state_file" in step:
                    save_file(lerobot_statistics(), directory / step["state_file"])
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
        return directory

    return write
