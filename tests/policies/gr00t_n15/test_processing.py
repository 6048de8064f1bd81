"""Observation → tensors → actions, as GR00T N1.5 wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT, PLAIN_PROMPT, PromptTemplate
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor, identity_statistics
from omega_qvla.policies.processing.images import crop_and_resize
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Range
from omega_qvla.policies.processing.tokenizers import ByteTokenizer


def test_statistics_survive_their_file_and_refuse_others() -> None:
    moved = Range(low=(0.5, 1.0), high=(2.0, 1.0))
    statistics = NormalizationStatistics(state=moved, actions=moved)
    assert NormalizationStatistics.parse(statistics.dump(), "s.json") == statistics
    for text in ("", "[]", '{"state": {}}', statistics.dump().replace("2.0", "NaN")):
        with pytest.raises(PolicyError, match=r"s\.json"):
            NormalizationStatistics.parse(text, "s.json")


def test_an_instruction_may_be_written_as_a_list_of_one() -> None:
    """As numpy prints an array of one text, which is what Isaac-GR00T's inference does."""
    listed = CHAT_PROMPT.model_copy(update={"instruction": "listed"})
    for text in ("open it", 'it\'s "here"', "a\nb"):
        assert listed.pieces(text, 0)[0].count(str(np.array([text]))) == 1


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
    statistics = NormalizationStatistics(
        state=identity_statistics(config).state,
        actions=Range(low=(0.0,) * 4, high=(10.0, 1.0, 1.0, 2.0)),
    )
    processor = Gr00tProcessor(config, statistics, small_gr00t.processor.tokenizer)
    actions = processor.decode(torch.tensor([[1.0, 1.0, -1.0, 0.0]]))
    assert actions.tolist() == [[10.0, 1.0, 0.0, 1.0]] and actions.dtype == np.float32
