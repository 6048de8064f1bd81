"""What a checkpoint leaves open and only its user knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omega_qvla.checkpoints.tied import TiedHalf

WrittenBy = Literal["lerobot-0.4", "lerobot-0.5"]
"""Releases that show a network different things; the second stands for all from 0.5.0 on."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Answers to what some checkpoints do not say; none is needed where they do.

    Attributes:
        training_config: name of openpi's training configuration, or a JSON file with the fields of
            ``TrainingConfig``.
        tokenizer: PaliGemma's ``tokenizer.model``, or the directory of Qwen's files.
        embodiment: tag of the robot, for a checkpoint that knows several.
        data_config: name of NVIDIA's data configuration (``libero``), or a JSON file.
        written_by: the release of LeRobot that wrote a checkpoint, where its files do not tell.
        ignore_settings: settings of a LeRobot ``config.json`` that this version does not know and
            the user knows to be of no consequence.
        base: of a LoRA adapter: the whole policy it was trained on, a directory or
            ``owner/name@revision`` on the hub; the adapter's own files name one as well.
        tied: which of token embedding and head to read, where a file has both and they differ.
    """

    training_config: str | None = None
    tokenizer: Path | None = None
    embodiment: str | None = None
    data_config: str | None = None
    written_by: WrittenBy | None = None
    ignore_settings: tuple[str, ...] = ()
    base: str | None = None
    tied: TiedHalf | None = None
