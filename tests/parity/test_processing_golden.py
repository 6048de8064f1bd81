"""Our processing against numbers that the originals' own code produced (docs/parity.md).

Tolerances.  The originals normalize in float32, we in float64 rounded once: some 1e-7 of the value
and of its offset, 2e-6 is allowed.  Pillow's resize and torch's work in fixed point and may round a
half differently: one level of 255.  Everything else is equal.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT
from omega_qvla.policies.processing.images import (
    crop_and_resize,
    pad_antialiased,
    pad_lerobot,
    stretch_bicubic,
)
from omega_qvla.policies.processing.normalization import Binary, MeanStd, Quantiles, Range, Simple
from omega_qvla.policies.processing.prompts import discretize_state, format_prompt
from omega_qvla.policies.processing.published_tokenizers import QWEN_FILES, QwenTokenizer

GOLDEN = Path(__file__).parent / "golden" / "processing.safetensors"
QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen_tokenizer"
WIDTH, IMAGES, SIZE = 6, 4, 28


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with safe_open(GOLDEN, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def texts() -> dict[str, list]:
    with safe_open(GOLDEN, framework="np") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def kind(name: str, golden: dict[str, np.ndarray]) -> Simple:
    def statistic(key: str) -> tuple[float, ...]:
        return tuple(map(float, golden[f"statistics.{key}"]))

    def bounds(low: str, high: str, flat_width: float | None) -> Range:
        return Range(low=statistic(low), high=statistic(high), flat_width=flat_width)

    mean, std = statistic("mean"), statistic("std")
    return {
        "openpi.quantiles": Quantiles(q01=statistic("q01"), q99=statistic("q99")),
        "openpi.mean_std": MeanStd(mean=mean, std=std, margin=1e-6, inverse_margin=1e-6),
        "lerobot.MEAN_STD": MeanStd(mean=mean, std=std, margin=1e-8),
        "lerobot.MIN_MAX": bounds("min", "max", 1e-8),
        "lerobot.QUANTILES": bounds("q01", "q99", 1e-8),
        "lerobot.QUANTILE10": bounds("q10", "q90", 1e-8),
        "gr00t.mean_std": MeanStd(mean=mean, std=std),
        "gr00t.min_max": bounds("min", "max", None),
        "gr00t.binary": Binary(width=WIDTH),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "openpi.quantiles",
        "openpi.mean_std",
        "lerobot.MEAN_STD",
        "lerobot.MIN_MAX",
        "lerobot.QUANTILES",
        "lerobot.QUANTILE10",
        "gr00t.mean_std",
        "gr00t.min_max",
        "gr00t.binary",
    ],
)
def test_normalization_and_its_inverse_are_the_originals(
    name: str, golden: dict[str, np.ndarray]
) -> None:
    """One of the six dimensions never moves."""
    ours = kind(name, golden)
    for found, expected in (
        (ours.normalize(golden["x"]), golden[f"{name}.normalize"]),
        (ours.unnormalize(golden["y"]), golden[f"{name}.unnormalize"]),
    ):
        assert np.allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("number", range(IMAGES))
def test_images_are_what_the_originals_show_the_network(
    number: int, golden: dict[str, np.ndarray]
) -> None:
    image = golden[f"image.{number}"]
    openpi = torch.from_numpy(golden[f"openpi.image.{number}"]).permute(2, 0, 1) / 127.5 - 1.0
    difference = (pad_antialiased(image, SIZE) - openpi).abs() * 127.5
    assert difference.max() <= 1.001 and (difference > 0.5).float().mean() < 0.02
    lerobot = torch.from_numpy(golden[f"lerobot.image.{number}"])
    assert torch.equal(pad_lerobot(image, SIZE), lerobot)
    for scale in (0.95, 1.0):
        levels = torch.from_numpy(golden[f"gr00t.image.{number}.{scale}"]).permute(2, 0, 1)
        found = crop_and_resize(image, SIZE, scale)
        assert torch.allclose(found, levels / 127.5 - 1.0, rtol=0, atol=3e-7)


@pytest.mark.parametrize("number", range(IMAGES))
def test_lerobots_groot_images_are_stretched_as_eagle_does(
    number: int, golden: dict[str, np.ndarray]
) -> None:
    found = stretch_bicubic(golden[f"image.{number}"], SIZE)
    levels = torch.from_numpy(golden[f"groot.image.{number}"]).permute(2, 0, 1)
    assert torch.allclose(found, levels / 127.5 - 1.0, rtol=0, atol=3e-7)


def test_lerobots_prompts_are_ours(golden: dict[str, np.ndarray], texts: dict[str, list]) -> None:
    """Six numbers, padded to 32 after normalization; below the range is -1."""
    normalized = kind("lerobot.QUANTILES", golden).normalize(golden["x"])
    padded = np.pad(normalized, ((0, 0), (0, 32 - WIDTH)))
    found = [format_prompt("pick up\nthe black_bowl ", discretize_state(row)) for row in padded]
    assert found == texts["lerobot.prompts"]


def test_qwens_tokens_are_those_of_transformers(texts: dict[str, list]) -> None:
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")
    if not QWEN.is_dir():
        pytest.skip(f"GR00T's tokenizer is not at {QWEN}")
    tokenizer = QwenTokenizer({name: (QWEN / name).read_bytes() for name in QWEN_FILES}, "qwen")
    for text, ids in texts["qwen"]:
        assert tokenizer.encode(text) == ids
    pieces = CHAT_PROMPT.pieces("open the drawer", 2)
    assert texts["qwen"][-1][0] == ("<IMG_CONTEXT>" * 4).join(pieces)
