"""What openpi's layouts refuse, and what a client is told of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.serving.wire.specification import LAYOUTS, Specification, parse_request

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
HIGH = np.zeros((3, 6, 8), np.uint8)


def aloha(cameras: tuple[str, ...] = CAMERAS, prompt: str | None = "fold") -> Specification:
    layout = LAYOUTS["aloha"]
    return Specification(cameras, 14, 5, 14, (5, 32), layout=layout, default_prompt=prompt)


def message(**changes: Any) -> dict[str, Any]:
    return {"state": np.zeros(14), "images": {"cam_high": HIGH}, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": {}}, r"missing \['base_0_rgb'\]"),
        ({"images": {"cam_high": HIGH, "cam_top": HIGH}}, r"unknown cameras \['cam_top'\]"),
        ({"images": HIGH}, r"'images' must map the cameras \['cam_high'"),
        (
            {"images": {"cam_high": HIGH.transpose(1, 2, 0)}},
            r"channels first, \[3, height, width\]",
        ),
        ({"images": {"cam_high": HIGH.astype(np.float32) + 2}}, "not within 0 and 1"),
        ({"images": {"cam_high": np.full((3, 6, 8), np.nan, np.float32)}}, "not within 0 and 1"),
        ({"images": {"cam_high": HIGH[0]}}, "channels first"),
        ({"images": {"cam_high": "none"}}, "must be an array"),
        ({"state": np.zeros(13)}, r"must hold 14 numbers, found 13"),
        ({"state": np.full(14, 1e300)}, "NaN or Inf"),
        ({"prompt": b"\xff"}, "no UTF-8"),
        ({"prompt": ""}, "'prompt' must be a sentence"),
        ({"image_masks": {}}, r"unknown keys \['image_masks'\]"),
        ({"cam_high": HIGH}, r"unknown keys \['cam_high'\]"),
    ],
)
def test_what_an_aloha_must_not_send_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ServingError, match=told):
        parse_request(message(**changes), aloha())


def test_cameras_that_an_aloha_does_not_have_are_masked() -> None:
    observation = parse_request(message(), aloha()).observation
    assert set(observation["images"]) == {"base_0_rgb"}
    assert observation["image_masks"] == {"left_wrist_0_rgb": False, "right_wrist_0_rgb": False}
    assert observation["prompt"] == "fold"


def test_without_an_instruction_of_its_own_a_policy_needs_one() -> None:
    with pytest.raises(ServingError, match="'prompt' must be a sentence"):
        parse_request(message(), aloha(prompt=None))


def test_a_policy_with_fewer_cameras_refuses_the_others() -> None:
    with pytest.raises(ServingError, match=r"unknown \['left_wrist_0_rgb'\]"):
        parse_request(
            message(images={"cam_high": HIGH, "cam_left_wrist": HIGH}), aloha(("base_0_rgb",))
        )


def test_a_layout_is_refused_for_a_policy_with_other_cameras() -> None:
    for cameras in (("front",), ("left_wrist_0_rgb",), (*CAMERAS, "front")):
        with pytest.raises(PolicyError, match="choose another `layout`"):
            aloha(cameras)


def test_a_client_is_told_how_to_send_what() -> None:
    told = aloha().dump()
    assert told["image_map"] == "images" and told["image_axes"] == "chw"
    assert told["image_keys"]["cam_high"] == "base_0_rgb" and told["default_prompt"] == "fold"


def test_the_state_is_as_exact_as_it_was_sent() -> None:
    """An open gripper's angle depends on digits that float32 has not."""
    state = np.full(14, 0.999999999)
    observation = parse_request(message(state=state), aloha()).observation
    assert observation["state"].dtype == np.float64
    assert np.array_equal(observation["state"], state)
