"""Images: against Pillow itself, by hand, and the properties that every way of fitting has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omega_qvla.policies.processing.images import (
    FITS,
    ImageFit,
    crop_and_resize,
    pad_antialiased,
    pad_lerobot,
)

SIDES = st.integers(1, 90)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.sampled_from([7, 28, 56]))
@example(43, 43, 56)
def test_antialiased_is_pillows_bilinear(height: int, width: int, size: int) -> None:
    """openpi-client resizes with Pillow.  Both filters work in fixed point and round to bytes after
    either axis; each time they may round a value that is half way differently, which is one level
    of 255.  Both times at one pixel is rare (43 to 56 has it, at one value of 9408)."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = noise(height, width)
    ratio = max(width / size, height / size)
    inner = int(width / ratio), int(height / ratio)
    if 0 in inner:
        return  # Pillow cannot, and openpi fails
    resized = np.asarray(image_module.fromarray(image).resize(inner, image_module.BILINEAR))
    expected = np.zeros((size, size, 3), np.uint8)
    top, left = (size - inner[1]) // 2, (size - inner[0]) // 2
    expected[top : top + inner[1], left : left + inner[0]] = resized
    found = ((pad_antialiased(image, size) + 1.0) * 127.5).round().permute(1, 2, 0).numpy()
    differences = np.abs(found - expected.astype(float))
    assert differences.max() <= 2 and (differences == 2).sum() <= 1 + differences.size / 10_000


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_size_is_only_rescaled(fit: ImageFit) -> None:
    image = noise(28, 28)
    expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1.0
    assert torch.allclose(FITS[fit](image, 28), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("fit", FITS)
@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES)
def test_the_image_is_in_range_and_the_bars_are_where_it_is_not(
    fit: ImageFit, height: int, width: int
) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    found = FITS[fit](white, 28)
    bar = -3.0 if fit == "lerobot" else -1.0
    inside = found > 0.99
    assert found.shape == (3, 28, 28) and found.max() <= 1.0
    assert torch.equal(found[~inside], torch.full_like(found[~inside], bar))
    ratio = max(height, width) / 28
    assert inside[0].sum() == max(1, int(height / ratio)) * max(1, int(width / ratio))


def test_lerobot_pads_before_it_maps_to_the_symmetric_range() -> None:
    """Hand-computed: a white 1×2 image in a square of two has one bar of 2 (-1) - 1 below it."""
    found = pad_lerobot(np.full((1, 2, 3), 255, np.uint8), 2)
    assert found[0].tolist() == [[1.0, 1.0], [-3.0, -3.0]]


def test_the_crop_keeps_the_middle() -> None:
    """Ten columns of value 10 i, 0.5 kept: columns 2 to 6 (2.5 rounds to even)."""
    image = np.repeat(np.arange(10, dtype=np.uint8)[None, :, None] * 10, 10, 0).repeat(3, 2)
    found = (crop_and_resize(image, 5, 0.5)[0, 0] * 0.5 + 0.5) * 255.0
    assert torch.allclose(found, torch.tensor([20.0, 30.0, 40.0, 50.0, 60.0]), atol=1.01)


def test_the_crop_ignores_proportions_and_fills_the_square() -> None:
    found = crop_and_resize(np.full((17, 61, 3), 255, np.uint8), 28, 0.95)
    assert found.shape == (3, 28, 28) and (found >= 1.0 - 2.01 / 255).all()
