"""Observations and sizes of what the user named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from omega_qvla.calibration.lerobot import state_names
from omega_qvla.calibration.lerobot_metadata import is_dataset
from omega_qvla.calibration.observations import Observations
from omega_qvla.cli.options import Calibrated, names_of
from omega_qvla.errors import ObservationError
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import dimension_names


def calibration_of(
    source: str, policy: NativePolicy | LeRobotPolicy, options: Calibrated, limit: int
) -> Observations:
    """Observations by name; ``random:COUNT`` is noise in the shape the policy wants."""
    scheme, _, count = source.partition(":")
    if scheme != "random":
        return observations_of(source, policy, options, limit=limit)
    if not count.isdecimal() or int(count) < 1:
        raise ObservationError(f"{source!r}: give a number of observations, as in random:8")
    about = policy.config if isinstance(policy, NativePolicy) else policy
    return Observations.random(about.cameras, about.state_dim, count=int(count))


def observations_of(
    source: str,
    policy: NativePolicy | LeRobotPolicy,
    options: Calibrated,
    *,
    split: str = "calibration",
    limit: int = 64,
) -> Observations:
    """Observations from files; those of a LeRobot dataset under the policy's names."""
    if not is_dataset(Path(source)):
        if options.cameras or options.state or options.instruction:
            raise ObservationError(
                "--cameras, --state and --instruction are for LeRobot datasets, which "
                f"{source} is not"
            )
        return Observations.load(source, split=split)
    native = policy if isinstance(policy, NativePolicy) else None
    about = policy.config if isinstance(policy, NativePolicy) else policy
    observations = Observations.from_lerobot(
        source,
        policy=native,
        cameras=_camera_choice(options.cameras, about.cameras),
        state=names_of(options.state),
        instruction=options.instruction,
        split=split,
        limit=limit,
    )
    try:
        policy.initial_state(observations[0], torch.Generator())
    except ObservationError as error:
        wanted = () if native is None else dimension_names(native.processor.statistics.state)
        names = f", where the policy has {', '.join(wanted)}" if wanted else ""
        raise ObservationError(
            f"the observations of {source} do not fit the policy: {error}. --state names the parts "
            f"the state is put together from, in order; there are "
            f"{', '.join(state_names(source))}{names}"
        ) from error
    return observations


def _camera_choice(text: str | None, cameras: Sequence[str]) -> dict[str, str | None]:
    """The policy's cameras → what the dataset calls them, from ``NAME=FEATURE,..``."""
    choice: dict[str, str | None] = {name: name for name in cameras}
    for pair in names_of(text) or ():
        name, equals, feature = pair.partition("=")
        if not equals or name not in choice or not feature:
            raise ObservationError(
                f"--cameras {pair!r}: give POLICYNAME=FEATURE; the policy has {', '.join(cameras)}"
            )
        choice[name] = None if feature == "none" else feature
    return choice
