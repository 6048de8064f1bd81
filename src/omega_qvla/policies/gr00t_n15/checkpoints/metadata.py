"""``experiment_cfg/metadata.json``: statistics and shapes per embodiment tag.

    {tag: {"statistics": {"state": {part: {"min": [...], "max": ..., "mean": ..., "std": ...,
                                           "q01": ..., "q99": ...}}, "action": {...}},
           "modalities": {"video": {name: {"resolution": [w, h], "channels": 3, "fps": ...}},
                          "state": {part: {"absolute": ..., "rotation_type": ..., "shape": [n],
                                           "continuous": ...}}, "action": {...}},
           "embodiment_tag": tag}}

The tag also selects the projector: embodiment-specific layers are stacked, and a tag has a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from omega_qvla.checkpoints.files import read_json
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.checkpoints.data_config import DataConfig, Mode
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    NormalizationStatistics,
    Part,
    Parts,
    Range,
    Simple,
    SineCosine,
    Unchanged,
)

METADATA = "experiment_cfg/metadata.json"

EMBODIMENT_IDS: dict[str, int] = {
    "gr1": 24,
    "oxe_droid": 17,
    "agibot_genie1": 26,
    "new_embodiment": 31,
}
"""Isaac-GR00T's ``EMBODIMENT_TAG_MAPPING`` at N1.5."""


class PartStatistics(BaseModel):
    """One part's statistics, per dimension, in the robot's units."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PartShape(BaseModel):
    """One part's shape and kind."""

    model_config = ConfigDict(frozen=True)
    shape: tuple[int, ...]
    continuous: bool = True


class _Video(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Statistics(BaseModel):
    model_config = ConfigDict(frozen=True)
    state: dict[str, PartStatistics]
    action: dict[str, PartStatistics]


class _Modalities(BaseModel):
    model_config = ConfigDict(frozen=True)
    video: dict[str, _Video]
    state: dict[str, PartShape]
    action: dict[str, PartShape]


class EmbodimentMetadata(BaseModel):
    """What a checkpoint knows of one robot."""

    model_config = ConfigDict(frozen=True)
    statistics: _Statistics
    modalities: _Modalities


def read_metadata(directory: Path, tag: str | None) -> tuple[str, EmbodimentMetadata]:
    """The metadata of the chosen embodiment, or of the only one.

    Returns:
        Its tag and what is known of it.

    Raises:
        PolicyError: the file is missing or invalid; the tag is unknown, or one has to be chosen.
    """
    where = directory / METADATA
    if not where.exists():
        raise PolicyError(
            f"{directory} has no {METADATA}, so the statistics of its robot are unknown. It is "
            "beside the weights in every checkpoint that Isaac-GR00T saves; get it from there"
        )
    content = read_json(directory, METADATA)
    known = ", ".join(content)
    if tag is None:
        if len(content) != 1:
            raise PolicyError(
                f"{where} knows {len(content)} embodiments: {known}. Choose one: --embodiment TAG, "
                "or CheckpointOptions(embodiment=...)"
            )
        (tag,) = content
    if tag not in content:
        raise PolicyError(f"{where} has no embodiment {tag!r}; it knows {known}")
    try:
        return tag, EmbodimentMetadata.model_validate(content[tag])
    except ValidationError as error:
        raise PolicyError(f"{where}: the metadata of {tag} are invalid: {error}") from error


def embodiment_id(tag: str, known: Mapping[str, int], where: Path) -> int:
    """The number of a tag's layers.

    Raises:
        PolicyError: the tag has no number (LeRobot would silently take number 0).
    """
    if tag not in known:
        raise PolicyError(
            f"{where}: embodiment {tag!r} has no layers of its own; known: {', '.join(known)}"
        )
    return known[tag]


def part_statistics(
    metadata: EmbodimentMetadata, data: DataConfig, where: Path
) -> NormalizationStatistics:
    """How the concatenated state and actions are normalized.

    Raises:
        PolicyError: a part has no statistics or shape, or its normalization does not suit it.
    """
    statistics, shapes = metadata.statistics, metadata.modalities
    return NormalizationStatistics(
        state=_parts("state", data.state, statistics.state, shapes.state, where),
        actions=_parts("action", data.actions, statistics.action, shapes.action, where),
    )


def require_cameras(metadata: EmbodimentMetadata, data: DataConfig, where: Path) -> None:
    """The cameras of the data configuration must be those the policy was trained with.

    Raises:
        PolicyError: one is not among them.
    """
    missing = [name for name in data.cameras if name not in metadata.modalities.video]
    if missing:
        raise PolicyError(
            f"{where} has no camera {', '.join(missing)}; it knows "
            f"{', '.join(metadata.modalities.video)}: another data configuration is needed"
        )


def _parts(
    modality: str,
    modes: Mapping[str, Mode],
    statistics: Mapping[str, PartStatistics],
    shapes: Mapping[str, PartShape],
    where: Path,
) -> Parts:
    missing = [name for name in modes if name not in statistics or name not in shapes]
    if missing:
        raise PolicyError(
            f"{where} has no statistics or shape of {modality} {', '.join(missing)}; it knows "
            f"{', '.join(statistics)}: another data configuration is needed"
        )
    parts = [
        Part(
            name=name,
            normalization=_part(
                mode, statistics[name], shapes[name], f"{where}: {modality}.{name}"
            ),
        )
        for name, mode in modes.items()
    ]
    return Parts(parts=tuple(parts))


def _part(mode: Mode, given: PartStatistics, described: PartShape, where: str) -> Simple:
    if len(described.shape) != 1:
        raise PolicyError(f"{where} has shape {list(described.shape)}, not one dimension")
    (width,) = described.shape
    widths = {len(given.min), len(given.max), len(given.mean), len(given.std)}
    if widths != {width}:
        raise PolicyError(f"{where} has {width} dimensions and statistics of {sorted(widths)}")
    if not described.continuous and mode not in ("binary", "unchanged", "sine_cosine"):
        raise PolicyError(f"{where} is not continuous and cannot be normalized by {mode}")
    try:
        match mode:
            case "min_max":
                return Range(low=given.min, high=given.max)
            case "mean_std":
                return MeanStd(mean=given.mean, std=given.std)
            case "binary":
                return Binary(width=width)
            case "sine_cosine":
                return SineCosine(width=width)
            case "unchanged":
                return Unchanged(width=width)
    except ValidationError as error:
        raise PolicyError(f"{where}: invalid statistics: {error}") from error
