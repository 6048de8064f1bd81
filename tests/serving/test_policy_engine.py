"""What a policy tells a server about itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    NormalizationStatistics,
    Part,
    Parts,
    Range,
    Unchanged,
)
from omega_qvla.policies.processing.tokenizers import ByteTokenizer
from omega_qvla.serving.server.policy_engine import PolicyEngine
from omega_qvla.serving.wire.specification import LAYOUTS

ARM = Part(name="arm", normalization=Range(low=(0.0, -1.0), high=(2.0, 1.0)))
WRIST = Part(name="wrist", normalization=MeanStd(mean=(1.0,), std=(0.5,)))
GRIPPER = Part(name="gripper", normalization=Binary(width=1))


@pytest.fixture
def quantized(small_gr00t: NativePolicy, few: Observations) -> Any:
    """A small GR00T policy, with statistics a test can replace."""
    return oq.quantize(small_gr00t, few, recipe="rtn")


def with_actions(quantized: Any, actions: Any) -> PolicyEngine:
    processor = quantized.policy.processor
    statistics = NormalizationStatistics(state=processor.statistics.state, actions=actions)
    quantized.policy.processor = Gr00tProcessor(processor.config, statistics, processor.tokenizer)
    return PolicyEngine(quantized.policy)


def test_limits_are_the_range_of_every_kind_of_statistics_and_the_margin(quantized: Any) -> None:
    """Mean and deviation count as three deviations each way; the margin is a share of the range."""
    engine = with_actions(quantized, Parts(parts=(ARM, WRIST, GRIPPER)))
    limits = engine.limits(0.5)
    np.testing.assert_allclose(limits.low, [-1.0, -2.0, -2.0, -0.5])
    np.testing.assert_allclose(limits.high, [3.0, 2.0, 4.0, 1.5])
    specification = engine.specification()
    assert specification.action_parts == (("arm", 2), ("wrist", 1), ("gripper", 1))


@pytest.mark.parametrize(
    "actions",
    [
        Unchanged(width=4),
        Parts(parts=(ARM, Part(name="rest", normalization=Unchanged(width=2)))),
    ],
)
def test_without_statistics_limits_must_be_given(quantized: Any, actions: Any) -> None:
    with pytest.raises(PolicyError, match="`limits`"):
        with_actions(quantized, actions).limits(0.25)


def test_the_warm_up_runs_whatever_the_tokenizer_knows(quantized: Any) -> None:
    """A closed vocabulary knows other words than an open one."""
    for tokenizer in (quantized.policy.processor.tokenizer, ByteTokenizer()):
        processor = quantized.policy.processor
        config = processor.config.model_copy(update={"vocabulary": 400, "image_token": 399})
        policy = PolicyEngine(quantized.policy)
        quantized.policy.processor = Gr00tProcessor(config, processor.statistics, tokenizer)
        assert policy.encode(policy.warm_up_observation())


def test_a_layout_for_other_cameras_is_refused(quantized: Any) -> None:
    with pytest.raises(PolicyError, match="base_0_rgb"):
        PolicyEngine(quantized.policy).specification(LAYOUTS["libero"])


def test_a_module_of_the_users_own_does_not_say_what_it_needs(few: Observations) -> None:
    class Other:
        family = "torch"

    other: Any = Other()
    with pytest.raises(PolicyError, match="cannot be served"):
        PolicyEngine(other)
