"""Damaged policy directories: every one is refused with an error of ours, or read.

The short version of a longer run: whatever is done to a file beside the weights, or to the header
of the weights, nothing but ``OmegaError`` may come out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_formats import (
    QWEN_IMAGE_TOKEN,
    QWEN_TOKENS,
    gr00t_metadata,
    gr00t_settings,
    gr00t_tensors,
    small_qwen,
    tiny_gr00t,
    train_sentencepiece,
    write_groot,
    write_lerobot_pi05,
)
from safetensors.torch import save_file

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import OmegaError
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.gr00t_n15.checkpoints import sizes as gr00t_sizes
from omega_qvla.policies.layers import siglip_checkpoints

ROUNDS = 120
VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 0.5, "", "../x", [], {}, [[]], {"a": 1}, "é")


def write_gr00t(directory: Path) -> Path:
    config = tiny_gr00t(QWEN_TOKENS, QWEN_IMAGE_TOKEN)
    (directory / "experiment_cfg").mkdir(parents=True)
    save_file(gr00t_tensors(config), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(gr00t_settings(config)))
    (directory / "experiment_cfg/metadata.json").write_text(json.dumps(gr00t_metadata()))
    for file, content in small_qwen().items():
        (directory / file).write_bytes(content)
    return directory


def write_pi05(directory: Path) -> Path:
    pytest.importorskip("sentencepiece", reason="the extra hub is not installed")
    return write_lerobot_pi05(directory, train_sentencepiece())


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, the value itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in items if isinstance(value, dict | list) else ():
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


def change_json(path: Path, source: random.Random) -> None:
    """Put something else into one place, or take the place away."""
    content = json.loads(path.read_text())
    *outer, last = source.choice(places(content))
    inner = content
    for key in outer:
        inner = inner[key]
    if source.random() < 0.25:
        del inner[last]
    else:
        inner[last] = source.choice(VALUES)
    path.write_text(json.dumps(content))


def change_bytes(path: Path, source: random.Random) -> None:
    """Flip bytes near the beginning, cut the end off, or add to it."""
    content = bytearray(path.read_bytes())
    kind = source.randrange(3)
    if kind == 0:
        for _ in range(source.randint(1, 4)):
            content[source.randrange(min(len(content), 4000))] = source.randrange(256)
    elif kind == 1:
        del content[source.randrange(len(content)) :]
    else:
        content += bytes(source.randrange(1, 64))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "choices"),
    [
        (write_pi05, CheckpointOptions()),
        (write_groot, CheckpointOptions()),
        (write_gr00t, CheckpointOptions(data_config="libero")),
    ],
)
def test_a_damaged_directory_is_refused_with_an_error_of_ours(
    write: Callable[[Path], Path],
    choices: CheckpointOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")
    monkeypatch.setitem(siglip_checkpoints.VISION_HEADS, (64, 72), 2)
    monkeypatch.setitem(gr00t_sizes.FEATURE_HEADS, 64, 2)
    monkeypatch.setitem(gr00t_sizes.HEAD_HEADS, 32, 4)
    whole = write(tmp_path / "whole")
    stream_policy(whole, choices)
    for seed in range(ROUNDS):
        source = random.Random(seed)
        directory = tmp_path / str(seed)
        shutil.copytree(whole, directory)
        file = source.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
        as_json = file.suffix == ".json" and source.random() < 0.7
        (change_json if as_json else change_bytes)(file, source)
        try:
            stream_policy(directory, choices)
        except OmegaError:
            pass
        except Exception as error:
            pytest.fail(f"seed {seed}, {file.name}: {type(error).__name__}: {error}")
        shutil.rmtree(directory)
