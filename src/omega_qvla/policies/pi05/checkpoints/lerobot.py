"""pi0.5 as LeRobot saves it (``paligemma/lerobot.py``)."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.lerobot_pipelines import NORMALIZE, RENAME, StepSettings, parse_config
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.paligemma.lerobot import TOKENIZE, Marker, open_lerobot
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import ADAPTIVE_NORM
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.lerobot import RELATIVE, RELATIVE_IN_0_5_1
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer

PROMPT = "pi05_prepare_state_tokenizer_processor_step"
STEPS = (RENAME, RELATIVE, RELATIVE_IN_0_5_1, NORMALIZE, PROMPT, TOKENIZE)


class _Prompt(StepSettings):
    """The step that writes the prompt has no settings in any release."""


def stream_lerobot_pi05(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A pi0.5 policy from a directory in LeRobot's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, a setting or a processing step is not known,
            statistics are missing, the weights do not fit the configuration, or something has to
            be said that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    found = open_lerobot(directory, options, Marker("pi0.5", ADAPTIVE_NORM), STEPS)
    if PROMPT in found.before:
        step = found.before[PROMPT]
        parse_config(step.config, _Prompt, step.where)
    pads = PROMPT in found.before and found.writer.pads_state
    config = Pi05Config(
        **found.fields(),
        state_in_prompt=PROMPT in found.before,
        prompt_state_dim=found.settings.max_state_dim if pads else None,
    )
    tokenizer = paligemma_tokenizer(directory, options.tokenizer)
    policy = Pi05Policy.of_processor(Pi05Processor(config, found.statistics(config), tokenizer))
    decisions = found.decisions(config, _state(config), options)
    return policy.read_from(found.stored, dropped_shapes(config), decisions)


def _state(config: Pi05Config) -> str:
    """What of the state is in the prompt, for the user."""
    if not config.state_in_prompt:
        return "none"
    own, padded = f"the robot's {config.state_dim} numbers", config.prompt_state_dim
    return own if padded is None else f"{own}, then zeros up to {padded}"
