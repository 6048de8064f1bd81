from __future__ import annotations

import io

import numpy as np
import pytest

from omega_qvla.evaluation.png import encode_png


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (144, 96)])
def test_another_decoder_reads_the_same_pixels(shape):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow, the oracle, is not installed")
    source = np.random.default_rng(0)
    image = source.integers(0, 256, (*shape, 3), dtype=np.uint8)
    with image_module.open(io.BytesIO(encode_png(image))) as decoded:
        decoded.load()
        assert decoded.format == "PNG"
        np.testing.assert_array_equal(np.asarray(decoded), image)


def test_even_surfaces_are_small():
    assert len(encode_png(np.full((144, 144, 3), 200, dtype=np.uint8))) < 500


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        encode_png(image)
