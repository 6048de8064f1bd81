"""Between the robot's units and the network's, against cases computed by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.images import pad_bilinear
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Quantiles
from omega_qvla.policies.processing.prompts import discretize_state, format_prompt
from omega_qvla.policies.processing.tokenizers import ByteTokenizer, WordTokenizer, load_tokenizer

QUANTILES = Quantiles(q01=(-2.0, 0.0, 5.0), q99=(2.0, 10.0, 5.0))


def test_quantiles_map_to_the_unit_range_and_back() -> None:
    """2 (x - q01)/(q99 - q01 + 1e-6) - 1; a dimension without spread divides by 1e-6."""
    x = np.array([[-2.0, 5.0, 5.0], [2.0, 10.0, 5.0]])
    found = QUANTILES.normalize(x)
    assert found.dtype == np.float32
    assert np.allclose(found, [[-1.0, 0.0, -1.0], [1.0, 1.0, -1.0]], atol=1e-6)
    assert np.allclose(QUANTILES.unnormalize(found), x, atol=1e-5)


def test_quantiles_longer_than_the_quantity_are_cut() -> None:
    assert np.allclose(QUANTILES.normalize(np.array([2.0])), [1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-1.001, -1),
        (-1.0, 0),
        (-0.9922, 0),
        (-0.9921, 1),
        (0.0, 128),
        (0.9921, 254),
        (0.9922, 255),
        (1.0, 255),
        (7.0, 255),
        (-7.0, -1),
    ],
)
def test_state_bins_by_hand(value: float, expected: int) -> None:
    """256 bins of width 1/128 from -1; bin 1 begins at -0.9921875."""
    assert discretize_state(np.array([value])) == [expected]


@settings(deadline=None)
@given(st.floats(-3, 3, width=16))
def test_state_bins_are_the_floor_of_the_scaled_value(value: float) -> None:
    """Half-precision values, for which (value + 1) · 128 is exact."""
    expected = -1 if value < -1 else min(255, int(np.floor((value + 1) * 128)))
    assert discretize_state(np.array([value])) == [expected]


def test_the_prompt_is_openpis() -> None:
    assert format_prompt("pick_up the\ncup ", None) == "pick up the cup\n"
    expected = "Task: pick up, State: -1 0 255;\nAction: "
    assert format_prompt(" pick_up", [-1, 0, 255]) == expected


def test_words_numbers_and_punctuation_are_tokens() -> None:
    tokenizer = WordTokenizer.for_instructions(["pick up"])
    ids = tokenizer.encode(format_prompt("pick up", [-1, 12]))
    words = [tokenizer.vocabulary[i] for i in ids]
    expected = ["<bos>", "Task", ":", "pick", "up", ",", "State", ":", "-1", "12", ";"]
    assert words == [*expected, "Action", ":"]
    assert tokenizer.size == len(set(tokenizer.vocabulary)) == 2 + 257 + 6 + 2


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    tokenizer = WordTokenizer.for_instructions(["pick up"])
    with pytest.raises(ObservationError, match=r"never taught: grab.*pick, up"):
        tokenizer.encode("Task: grab")


def test_tokenizers_come_back_from_what_they_dump() -> None:
    words = WordTokenizer.for_instructions(["pick up"])
    for tokenizer in (words, ByteTokenizer()):
        again = load_tokenizer(json.loads(json.dumps(tokenizer.dump())), "t.json")
        assert again.encode("pick up") == tokenizer.encode("pick up")
    assert ByteTokenizer().encode("é") == [1, 3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"kind": "other"},
        {"kind": "words"},
        {"kind": "words", "vocabulary": ["<bos>", 3]},
        {"kind": "words", "vocabulary": ["no", "beginning"]},
    ],
)
def test_a_description_of_no_tokenizer_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"t\.json"):
        load_tokenizer(content, "t.json")


def test_an_image_of_the_right_size_is_only_rescaled() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 1] = (255, 51, 102)
    found = pad_bilinear(image, 2)
    assert found.shape == (3, 2, 2)
    assert torch.allclose(found[:, 0, 1], torch.tensor([1.0, -0.6, -0.2]), atol=1e-6)
    assert bool((found[:, 0, 0] == -1).all())


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (4, 8, (2, 6), (0, 8)),
        (8, 4, (0, 8), (2, 6)),
        (16, 16, (0, 8), (0, 8)),
        (3, 8, (2, 5), (0, 8)),
    ],
)
def test_other_shapes_are_centred_between_black_bars(
    height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """White becomes 1, bars -1; of an odd number of bar rows the larger part is below."""
    found = pad_bilinear(np.full((height, width, 3), 255, np.uint8), 8)
    expected = torch.full((3, 8, 8), -1.0)
    expected[:, slice(*rows), slice(*columns)] = 1.0
    assert torch.equal(found, expected)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 200), width=st.integers(1, 200))
def test_any_shape_gives_a_square(height: int, width: int) -> None:
    """Even a line of pixels, whose shorter side would round to nothing."""
    found = pad_bilinear(np.zeros((height, width, 3), np.uint8), 14)
    assert found.shape == (3, 14, 14) and bool((found == -1).all())


def test_resizing_is_bilinear_and_rounds_to_whole_levels() -> None:
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 255
    found = pad_bilinear(image, 4)  # one row of two pixels → two rows of four
    levels = (found[0, 1] + 1) * 127.5
    assert torch.allclose(levels, torch.tensor([0.0, 64.0, 191.0, 255.0]), atol=1e-3)


def test_an_observation_becomes_pixels_and_tokens(
    policy: Pi05Policy, observations: Observations
) -> None:
    pixels, tokens = policy.processor.encode(observations[0])
    assert pixels.shape == (1, 2, 3, 28, 28) and tokens.dtype == torch.int64
    bins = discretize_state(observations[0]["state"])
    assert policy.processor.prompt(observations[0]).startswith("Task: press the button, State: ")
    words = [policy.processor.tokenizer.vocabulary[i] for i in tokens[0].tolist()]
    assert words[9:13] == [str(i) for i in bins]


def changed(observation: Any, **changes: Any) -> dict[str, Any]:
    result = {**observation, **changes}
    return {key: value for key, value in result.items() if value is not None}


GOOD = np.zeros((28, 28, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"images": None}, "needs 'images'"),
        ({"images": [GOOD]}, "needs 'images'"),
        ({"images": {"base": GOOD}}, r"missing \['wrist'\]"),
        ({"images": {"base": GOOD, "wrist": GOOD, "top": GOOD}}, r"unknown \['top'\]"),
        ({"images": {"base": GOOD.astype(np.float32), "wrist": GOOD}}, "'base' must be uint8"),
        ({"images": {"base": GOOD, "wrist": GOOD[..., 0]}}, r"'wrist' must be .*\[28, 28\]"),
        ({"images": {"base": GOOD, "wrist": GOOD.transpose(2, 0, 1)}}, r"\[3, 28, 28\]"),
        ({"images": {"base": GOOD, "wrist": GOOD[:0]}}, r"\[0, 28, 3\]"),
        ({"images": {"base": GOOD, "wrist": [[1], [1, 2]]}}, "'wrist' is not an array"),
        ({"image_masks": {"base": False, "wrist": False}}, "images must be"),
        ({"image_masks": [True, False]}, "image_masks"),
        ({"state": None}, r"needs 'state' \[4\]"),
        ({"state": [0.0, 0.0, float("nan"), 0.0]}, r"NaN or Inf at \[2\]"),
        ({"state": [0.0, float("inf"), 0.0, 0.0]}, r"NaN or Inf at \[1\]"),
        ({"state": np.zeros(5)}, r"shape \[4\], got \[5\]"),
        ({"state": np.zeros((1, 4))}, r"got \[1, 4\]"),
        ({"state": ["a", "b", "c", "d"]}, "not numeric"),
        ({"prompt": None}, "needs 'prompt'"),
        ({"prompt": "  "}, "needs 'prompt'"),
        ({"prompt": 3}, "needs 'prompt'"),
        ({"prompt": "press the other button"}, "never taught: other"),
        ({"prompt": "press " * 40}, r"prompt has \d+ tokens, this policy takes at most 32"),
    ],
)
def test_a_wrong_observation_is_refused_and_says_what_is_wrong(
    changes: dict[str, Any], expected: str, policy: Pi05Policy, observations: Observations
) -> None:
    with pytest.raises(ObservationError, match=expected):
        policy.sample_actions(changed(observations[0], **changes))


def test_a_camera_that_is_switched_off_may_be_absent(
    policy: Pi05Policy, observations: Observations, noise: np.ndarray
) -> None:
    one = {"base": observations[0]["images"]["base"]}
    off = changed(observations[0], images=one, image_masks={"wrist": False})
    assert policy.processor.encode(off)[0].shape[1] == 1
    assert policy.sample_actions(off, noise).shape == (4, 4)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(np.zeros((4, 3)), r"\[4, 4\], got \[4, 3\]"), (np.full((4, 4), np.nan), "NaN")],
)
def test_wrong_noise_is_refused(
    noise: np.ndarray, expected: str, policy: Pi05Policy, observations: Observations
) -> None:
    with pytest.raises(ObservationError, match=expected):
        policy.sample_actions(observations[0], noise)


def test_the_same_generator_state_gives_the_same_chunk(
    policy: Pi05Policy, observations: Observations
) -> None:
    chunks = [
        policy.sample_actions(observations[0], generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(chunks[0], chunks[1]) and not np.array_equal(chunks[0], chunks[2])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"norm_stats": {"state": {}}}',
        b"\xff",
        '{"norm_stats": {"state": {"q01": [NaN], "q99": [1]}, "actions": {"q01": [], "q99": []}}}',
    ],
)
def test_statistics_that_cannot_be_used_are_refused(text: str | bytes) -> None:
    with pytest.raises(PolicyError, match=r"stats\.json is not an openpi"):
        NormalizationStatistics.parse(text, "stats.json")


def test_statistics_and_tokenizer_must_fit_the_network(policy: Pi05Policy) -> None:
    processor = policy.processor
    short = Quantiles(q01=(-1.0,) * 3, q99=(1.0,) * 3)
    statistics = processor.statistics.model_copy(update={"state": short})
    with pytest.raises(PolicyError, match="statistics of 3 dimensions of state, the robot has 4"):
        Pi05Processor(policy.config, statistics, processor.tokenizer)
    words = WordTokenizer([*processor.tokenizer.vocabulary, "more"])
    with pytest.raises(PolicyError, match="tokens, the embedding"):
        Pi05Processor(policy.config, processor.statistics, words)
