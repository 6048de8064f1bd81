"""pi0 as LeRobot saves it (``paligemma/lerobot.py``)."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.lerobot_pipelines import (
    NORMALIZE,
    PREPROCESSOR,
    RENAME,
    StepSettings,
    parse_config,
    require_step,
)
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.paligemma.lerobot import TOKENIZE, Marker, open_lerobot
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi import STATE_TOKEN
from omega_qvla.policies.pi0.checkpoints.openpi import STATE, padded_state_dim
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi0.processing import Pi0Processor
from omega_qvla.policies.processing.lerobot import RELATIVE, RELATIVE_IN_0_5_1
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer

NEW_LINE = "pi0_new_line_processor"
STEPS = (RENAME, NEW_LINE, TOKENIZE, RELATIVE, RELATIVE_IN_0_5_1, NORMALIZE)


class _NewLine(StepSettings):
    """The step that ends the prompt with a line break has no settings in any release."""


def stream_lerobot_pi0(directory: Path, options: CheckpointOptions) -> Pi0Policy:
    """A pi0 policy from a directory in LeRobot's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, a setting or a processing step is not known,
            statistics are missing, the weights do not fit the configuration, or something has to
            be said that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    found = open_lerobot(directory, options, Marker("pi0", STATE_TOKEN), STEPS)
    step = require_step(found.before, NEW_LINE, directory / PREPROCESSOR)
    parse_config(step.config, _NewLine, step.where)
    padded, said = padded_state_dim(found.stored), found.settings.max_state_dim
    if padded != said:
        raise PolicyError(f"{found.where} has max_state_dim {said}, the weights need {padded}")
    if found.state_dim > padded:
        raise PolicyError(
            f"{found.where} has a state of {found.state_dim} numbers and max_state_dim {padded}"
        )
    config = Pi0Config(**found.fields(), padded_state_dim=padded, prompt="as_given")
    tokenizer = paligemma_tokenizer(directory, options.tokenizer)
    policy = Pi0Policy.of_processor(Pi0Processor(config, found.statistics(config), tokenizer))
    decisions = found.decisions(config, STATE, options)
    return policy.read_from(found.stored, dropped_shapes(config), decisions)
