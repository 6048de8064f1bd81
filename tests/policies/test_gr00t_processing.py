"""Observation → tensors → actions, as GR00T N1.5 wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.gr00t_n15 import CHAT_PROMPT, PLAIN_PROMPT, PromptTemplate
from omega_qvla.policies.gr00t_policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_processing import (
    Gr00tProcessor,
    Gr00tStatistics,
    Scaling,
    crop_and_resize,
    identity_statistics,
)
from omega_qvla.policies.processing import ByteTokenizer

NUMBERS = st.floats(-100, 100, width=32)


def test_a_range_becomes_minus_one_to_one() -> None:
    scaling = Scaling.from_range([0.0, -2.0], [10.0, 2.0])
    found = scaling.normalize(np.array([[0.0, -2.0], [5.0, 0.0], [10.0, 2.0], [20.0, 4.0]]))
    assert found.tolist() == [[-1, -1], [0, 0], [1, 1], [3, 2]]
    assert found.dtype == np.float32


def test_moments_become_zero_and_one() -> None:
    scaling = Scaling.from_moments([3.0], [2.0])
    assert scaling.normalize(np.array([3.0, 5.0])[:, None]).ravel().tolist() == [0.0, 1.0]


def test_a_dimension_that_never_changed_becomes_zero_and_comes_back() -> None:
    scaling = Scaling.from_range([4.0], [4.0])
    assert scaling.normalize(np.array([9.0])).tolist() == [0.0]
    assert scaling.unnormalize(np.array([0.7])).tolist() == [4.0]


@given(st.lists(st.tuples(NUMBERS, st.floats(0.125, 100, width=32), NUMBERS), min_size=1))
def test_unnormalize_inverts_normalize(rows: list[tuple[float, float, float]]) -> None:
    low, width, value = (np.array(column) for column in zip(*rows, strict=True))
    scaling = Scaling.from_range(low, low + width)
    back = scaling.unnormalize(scaling.normalize(value))
    # float32 in units of the range: values lie up to 1600 ranges outside.
    assert np.allclose(back, value, atol=1e-3 * (1 + np.abs(value).max()))


def test_joined_scalings_keep_their_dimensions_apart() -> None:
    both = Scaling.from_range([0.0], [2.0]).joined(Scaling.from_moments([5.0], [10.0]))
    assert both.normalize(np.array([2.0, 25.0])).tolist() == [1.0, 2.0]


def test_statistics_survive_their_file_and_refuse_others() -> None:
    scaling = Scaling(offset=(0.5, 1.0), scale=(2.0, 0.0))
    statistics = Gr00tStatistics(state=scaling, actions=scaling)
    assert Gr00tStatistics.parse(statistics.dump(), "s.json") == statistics
    for text in ("", "[]", '{"state": {}}', statistics.dump().replace("2.0", "NaN")):
        with pytest.raises(PolicyError, match=r"s\.json"):
            Gr00tStatistics.parse(text, "s.json")
    with pytest.raises(ValueError, match="same length"):
        Scaling(offset=(0.0,), scale=(1.0, 1.0))
    with pytest.raises(ValueError, match="negative"):
        Scaling(offset=(0.0,), scale=(-1.0,))


def test_an_image_of_the_right_size_is_only_mapped() -> None:
    image = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
    found = crop_and_resize(image, 28, 1.0)
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1.0
    assert torch.equal(found, expected)


def test_the_margin_is_cropped_and_the_rest_stretched() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[4:36, 8:72] = 255  # exactly what a crop of 0.8 keeps
    # Rounding down may take a grey level from what interpolation puts just below 255.
    assert float(crop_and_resize(image, 28, 0.8).min()) >= 254 / 127.5 - 1.0
    assert float(crop_and_resize(image, 28, 1.0).min()) == -1.0


def test_chat_prompt_frames_every_image() -> None:
    assert CHAT_PROMPT.pieces("pick up", 2) == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image 1><img>",
        "</img><image 2><img>",
        "</img>pick up<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_an_instruction_cannot_add_images() -> None:
    assert PLAIN_PROMPT.pieces("{tokens} {images}", 1) == ["", "{tokens} {images}"]
    ahead = PromptTemplate(text="{instruction}:{images}", image="[{tokens}]")
    assert ahead.pieces("go {tokens}", 1) == ["go {tokens}:[", "]"]


def test_an_observation_becomes_pixels_places_words_and_a_padded_state(
    small_gr00t: Gr00tN15Policy, few: Observations
) -> None:
    config = small_gr00t.config
    pixels, token_ids, state = small_gr00t.processor.encode(few[0])
    assert pixels.shape == (1, 2, 3, 28, 28)
    assert float(pixels.min()) >= -1.0 and float(pixels.max()) <= 1.0
    places = (token_ids == config.image_token).sum()
    assert places == 2 * config.tokens_per_image
    words = small_gr00t.processor.tokenizer.encode(few[0]["prompt"])
    assert token_ids[0, places:].tolist() == words
    assert torch.equal(state[0, :4], torch.from_numpy(few[0]["state"]))
    assert state[0, 4:].tolist() == [0.0, 0.0]


def test_a_camera_that_is_switched_off_leaves_no_places(
    small_gr00t: Gr00tN15Policy, few: Observations
) -> None:
    seen = small_gr00t.processor.encode({**few[0], "image_masks": {"wrist": False}})
    assert seen.pixels.shape[1] == 1
    places = (seen.token_ids == small_gr00t.config.image_token).sum()
    assert places == small_gr00t.config.tokens_per_image
    assert np.isfinite(
        small_gr00t.sample_actions({**few[0], "image_masks": {"wrist": False}})
    ).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": ""}, "non-empty"),
        ({"prompt": "press " * 40}, "at most 32"),
        ({"prompt": "<pad> the button"}, "words|stands for images"),
        ({"state": np.zeros(6)}, r"shape \[4\]"),
        ({"state": np.full(4, np.nan)}, "NaN"),
        ({"images": {}}, "missing"),
    ],
)
def test_bad_observations_are_refused(
    change: dict[str, Any], expected: str, small_gr00t: Gr00tN15Policy, few: Observations
) -> None:
    with pytest.raises(ObservationError, match=expected):
        small_gr00t.sample_actions({**few[0], **change})


def test_text_that_encodes_to_the_image_token_is_refused(small_gr00t: Gr00tN15Policy) -> None:
    config = small_gr00t.config.model_copy(update={"image_token": 3 + ord("x"), "vocabulary": 259})
    processor = Gr00tProcessor(config, identity_statistics(config), ByteTokenizer())
    with pytest.raises(ObservationError, match="stands for images"):
        processor.tokenize("a box", 1)
    assert len(processor.tokenize("a bag", 1)) == config.tokens_per_image + 6


def test_statistics_and_tokenizer_must_fit_the_network(small_gr00t: Gr00tN15Policy) -> None:
    config, tokenizer = small_gr00t.config, small_gr00t.processor.tokenizer
    narrow = identity_statistics(config.model_copy(update={"state_dim": 3}))
    with pytest.raises(PolicyError, match="3 dimensions of state, the policy 4"):
        Gr00tProcessor(config, narrow, tokenizer)
    few_tokens = config.model_copy(update={"vocabulary": 100})
    with pytest.raises(PolicyError, match=rf"{tokenizer.size} tokens, the embedding 100"):
        Gr00tProcessor(few_tokens, identity_statistics(config), tokenizer)


def test_actions_come_back_in_the_robot_s_units(small_gr00t: Gr00tN15Policy) -> None:
    config = small_gr00t.config
    statistics = Gr00tStatistics(
        state=identity_statistics(config).state,
        actions=Scaling.from_range([0.0] * 4, [10.0, 1.0, 1.0, 2.0]),
    )
    processor = Gr00tProcessor(config, statistics, small_gr00t.processor.tokenizer)
    actions = processor.decode(torch.tensor([[1.0, 1.0, -1.0, 0.0]]))
    assert actions.tolist() == [[10.0, 1.0, 0.0, 1.0]] and actions.dtype == np.float32
