"""Camera images uint8 [H, W, 3] → what a vision tower was trained to see, float32 in [-1, 1].

The originals differ in ways that are visible to a policy, so each is reproduced as it is:

| function | resize (bilinear) | rounds | bars | as in |
|---|---|---|---|---|
| ``pad_bilinear`` | not antialiased | yes | black | openpi ``image_tools.py``, tensors |
| ``pad_antialiased`` | antialiased, as Pillow's | yes | black | openpi-client ``image_tools.py`` |
| ``pad_lerobot`` | not antialiased | no | -3 | LeRobot ``modeling_pi05.py`` up to 0.4.4 |
| ``pad_lerobot_black`` | not antialiased | no | black | the same from 0.5.0 on |
| ``crop_and_resize`` | antialiased, after a crop | down | none | Isaac-GR00T ``video.py`` |
| ``stretch_bicubic`` | bicubic, antialiased | yes | none | LeRobot's groot, Eagle's processor |

Up to 0.4.4 LeRobot pads images in [0, 1] with -1 before it maps them to [-1, 1], hence the -3:
policies that were fine-tuned with such bars must see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ImageFit = Literal["bilinear", "antialiased", "lerobot", "lerobot-0.5"]
"""Names of the ways to fit an image into a square without distortion."""


def pad_bilinear(image: np.ndarray, size: int) -> Tensor:
    """One image uint8 [H, W, 3] → float32 [3, size, size] in [-1, 1], black bars where needed."""
    pixels = _channels_first(image).to(torch.float32)
    inner = _inner_size(image, size)
    if pixels.shape[1:] != inner:
        pixels = _resize(pixels, inner, antialias=False).round().clamp_(0, 255)
    return _bars(pixels / 127.5 - 1.0, size, -1.0)


def pad_antialiased(image: np.ndarray, size: int) -> Tensor:
    """As ``pad_bilinear``, with the filter of Pillow's bilinear resize, rounded as Pillow does."""
    pixels = _resize(_channels_first(image), _inner_size(image, size), antialias=True)
    return _bars(pixels.to(torch.float32) / 127.5 - 1.0, size, -1.0)


def pad_lerobot(image: np.ndarray, size: int) -> Tensor:
    """One image uint8 [H, W, 3] → float32 [3, size, size] in [-1, 1], bars of -3 where needed."""
    return _pad_unit(image, size, -1.0) * 2.0 - 1.0


def pad_lerobot_black(image: np.ndarray, size: int) -> Tensor:
    """As ``pad_lerobot``, with black bars (-1)."""
    return _pad_unit(image, size, 0.0) * 2.0 - 1.0


FITS: Mapping[ImageFit, Callable[[np.ndarray, int], Tensor]] = {
    "bilinear": pad_bilinear,
    "antialiased": pad_antialiased,
    "lerobot": pad_lerobot,
    "lerobot-0.5": pad_lerobot_black,
}
assert set(FITS) == set(get_args(ImageFit))


def crop_and_resize(image: np.ndarray, size: int, scale: float) -> Tensor:
    """The center of an image, resized to a square without regard to its proportions.

    Args:
        image: uint8 [H, W, 3].
        size: edge of the square.
        scale: kept fraction of height and of width; 1 keeps all.

    Returns:
        float32 [3, size, size] in [-1, 1]: (x/255 - 0.5)/0.5, after rounding to bytes.
    """
    pixels = _channels_first(image).to(torch.float32) / 255.0
    height, width = (int(edge * scale) for edge in image.shape[:2])
    # torchvision's center crop rounds halves to even, as Python does.
    top, left = round((image.shape[0] - height) / 2.0), round((image.shape[1] - width) / 2.0)
    pixels = pixels[:, top : top + height, left : left + width]
    pixels = _resize(pixels, (size, size), antialias=True)
    # Handed to the vision-language model as bytes: scaled by 255 and cut off, not rounded.
    levels = (pixels * 255.0).to(torch.uint8).to(torch.float32)
    return (levels / 255.0 - 0.5) / 0.5


def stretch_bicubic(image: np.ndarray, size: int) -> Tensor:
    """An image uint8 [H, W, 3], resized to a square without regard to its proportions.

    LeRobot's cameras give x/255; its processor takes them back to bytes by cutting off, then
    Eagle's image processor makes one tile of them.

    Returns:
        float32 [3, size, size] in [-1, 1].
    """
    levels = (_channels_first(image).to(torch.float32) / 255.0 * 255.0).to(torch.uint8)
    if tuple(levels.shape[1:]) != (size, size):
        levels = F.interpolate(
            levels.unsqueeze(0), (size, size), mode="bicubic", align_corners=False, antialias=True
        )[0]
    return (levels.to(torch.float32) / 255.0 - 0.5) / 0.5


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()


def _inner_size(image: np.ndarray, size: int) -> tuple[int, int]:
    """Height and width of the image inside the square."""
    ratio = max(image.shape[:2]) / size
    return max(1, int(image.shape[0] / ratio)), max(1, int(image.shape[1] / ratio))


def _resize(pixels: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(
        pixels.unsqueeze(0), size=size, mode="bilinear", align_corners=False, antialias=antialias
    )[0]


def _pad_unit(image: np.ndarray, size: int, bars: float) -> Tensor:
    """An image in [0, 1] with bars of the given value, which is also the least that may remain."""
    pixels = _channels_first(image).to(torch.float32) / 255.0
    pixels = _resize(pixels, _inner_size(image, size), antialias=False)
    return _bars(pixels.clamp(bars, 1.0), size, bars)


def _bars(pixels: Tensor, size: int, value: float) -> Tensor:
    height, width = pixels.shape[1:]
    top, left = (size - height) // 2, (size - width) // 2
    edges = (left, size - width - left, top, size - height - top)
    return F.pad(pixels, edges, value=value) if any(edges) else pixels
