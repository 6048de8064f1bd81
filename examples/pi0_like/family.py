"""Policies like pi0 as the rest of the project sees them."""

from __future__ import annotations

from omega_qvla.policies.family import Family
from omega_qvla.policies.pi0_like.config import Pi0LikeConfig
from omega_qvla.policies.pi0_like.policy import Pi0LikePolicy
from omega_qvla.policies.pi0_like.processing import Pi0LikeProcessor
from omega_qvla.policies.processing.normalization import NormalizationStatistics, unit_quantiles
from omega_qvla.policies.processing.tokenizers import ByteTokenizer


def _tiny() -> Pi0LikePolicy:
    config = Pi0LikeConfig.tiny(vocabulary=ByteTokenizer.size)
    statistics = NormalizationStatistics(
        state=unit_quantiles(config.state_dim), actions=unit_quantiles(config.robot_action_dim)
    )
    return Pi0LikePolicy.of_processor(Pi0LikeProcessor(config, statistics, ByteTokenizer()))


FAMILY = Family(policy=Pi0LikePolicy, title="pi0-like", sizes={"tiny-pi0-like": _tiny})
