"""LeRobot's policy directories: ``config.json`` and two saved processing pipelines.

LeRobot 0.4 and later writes beside the weights

* ``config.json``: the policy's configuration, ``type`` naming its family;
* ``policy_preprocessor.json`` and ``policy_postprocessor.json``: lists of steps by registered name,
  each with a configuration; steps with statistics keep them as ``<feature>.<statistic>`` in a
  safetensors file that the step names (``*_step_N_<name>.safetensors``).

The pipelines are code by name.  Steps that are known are read; any other step, order of steps or
setting would change what the network sees, and is refused by name.  So is a setting of
``config.json`` that is not known: it may be the one that leaves the state out of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from omega_qvla.checkpoints.files import contained_file, read_json
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.errors import PolicyError

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
_PLACEHOLDER = f"{IMAGES}empty_camera_"
RENAME, NORMALIZE, UNNORMALIZE = (
    "rename_observations_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)
PLUMBING = ("to_batch_processor", "device_processor")
"""Steps that move tensors about and change no value."""

BOOKKEEPING = frozenset(
    [
        "type",
        "n_obs_steps",
        "device",
        "use_amp",
        "use_peft",
        "push_to_hub",
        "repo_id",
        "private",
        "tags",
        "license",
        "pretrained_path",
        "pretrained_revision",
    ]
)
"""Settings that every ``config.json`` has (LeRobot's ``PreTrainedConfig``) and no value depends on,
but ``type`` and ``n_obs_steps``, which are checked."""

Statistics = Mapping[str, Mapping[str, tuple[float, ...]]]
"""Feature → statistic (``mean``, ``q01``…) → numbers per dimension."""


class Feature(BaseModel):
    """One input or output: its kind and shape."""

    model_config = ConfigDict(frozen=True)
    type: str
    shape: tuple[int, ...]


class PolicyFeatures(BaseModel):
    """What every LeRobot ``config.json`` has, whatever its family."""

    model_config = ConfigDict(frozen=True)
    type: str
    n_obs_steps: Literal[1] = 1
    input_features: dict[str, Feature] = Field(default_factory=dict)
    output_features: dict[str, Feature] = Field(default_factory=dict)

    def width(self, key: str, where: str) -> int:
        """Dimensions of the state or of an action.

        Raises:
            PolicyError: the configuration does not have it.
        """
        feature = {**self.input_features, **self.output_features}.get(key)
        if feature is None or len(feature.shape) != 1 or feature.shape[0] < 1:
            raise PolicyError(f"{where} has no feature {key!r} with one dimension")
        return feature.shape[0]

    def cameras(self) -> list[str]:
        """Names of the image features in order; placeholders for absent cameras are left out."""
        return [key for key in self._images() if not key.startswith(_PLACEHOLDER)]

    def placeholders(self) -> list[str]:
        """Names of the image features that stand for absent cameras."""
        return [key for key in self._images() if key.startswith(_PLACEHOLDER)]

    def _images(self) -> list[str]:
        return [key for key, feature in self.input_features.items() if feature.type == "VISUAL"]


class StepSettings(BaseModel):
    """The settings of one step: those that are known, and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Batch(StepSettings):
    """The step that adds the dimension of a batch has no settings."""


class _Device(StepSettings):
    """The settings of the step that moves tensors: one that rounds them is another step."""

    device: str
    float_dtype: Literal["float32"] | None = None


class _Rename(StepSettings):
    """The settings of the step that renames observations: the robot's name → the policy's."""

    rename_map: dict[str, str] = Field(default_factory=dict)


_PLUMBING_SETTINGS = {"to_batch_processor": _Batch, "device_processor": _Device}


@dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: its registered name.
        config: its settings.
        statistics: what its safetensors file holds; empty without one.
        where: names it in errors.
    """

    name: str
    config: Mapping[str, Any]
    statistics: Statistics
    where: str

    @property
    def found(self) -> str:
        """The statistics that are there, for errors: those wanted may go by another name."""
        keys = [f"{feature} ({', '.join(kinds)})" for feature, kinds in self.statistics.items()]
        return f"it has statistics of {', '.join(keys)}" if keys else "it has no statistics"


def read_pipeline(directory: Path, name: str, known: Sequence[str]) -> dict[str, Step]:
    """The steps of a saved pipeline by name, plumbing left out.

    Args:
        directory: the policy directory.
        name: ``policy_preprocessor.json`` or ``policy_postprocessor.json``.
        known: names of the steps the caller understands, in the order it understands them in.

    Raises:
        PolicyError: the file or a statistics file is missing or invalid, a step is not known, or
            the steps stand in another order.
    """
    if not (directory / name).exists():
        raise PolicyError(
            f"{directory} has no {name}, so its statistics are unknown. Checkpoints from before "
            "LeRobot 0.4 are migrated with: python -m lerobot.processor."
            f"migrate_policy_normalization --pretrained-path {directory}"
        )
    where = str(directory / name)
    steps = read_json(directory, name).get("steps")
    if not isinstance(steps, list):
        raise PolicyError(f"{where} has no list of 'steps'")
    found: dict[str, Step] = {}
    for entry in steps:
        step = _step(directory, where, entry)
        if step.name in PLUMBING:
            parse_config(step.config, _PLUMBING_SETTINGS[step.name], step.where)
            continue
        if step.name not in known:
            raise PolicyError(
                f"{where} has the step {step.name!r}, which this version does not know and must "
                f"not leave out; it knows {', '.join((*known, *PLUMBING))}"
            )
        if step.name in found:
            raise PolicyError(f"{where} has the step {step.name!r} twice")
        found[step.name] = step
    expected = [step for step in known if step in found]
    if list(found) != expected:
        raise PolicyError(
            f"{where} has its steps in another order ({', '.join(found)}) than LeRobot's own "
            f"({', '.join(expected)}): it would compute something else"
        )
    return found


def require_known_settings(
    content: Mapping[str, Any], known: Collection[str], ignored: Collection[str], where: str
) -> None:
    """Refuse settings of a ``config.json`` that nobody here knows the meaning of.

    Args:
        content: of ``config.json``.
        known: names that are read, or known to change nothing at inference.
        ignored: names that the user knows to change nothing.
        where: names the file in errors.

    Raises:
        PolicyError: there are others; or one to be ignored is known or not there.
    """
    needless = [name for name in ignored if name not in content or name in known]
    if needless:
        raise PolicyError(
            f"{where}: --ignore-settings names {', '.join(needless)}, which is not an unknown "
            "setting of it"
        )
    unknown = [name for name in content if name not in known and name not in ignored]
    if unknown:
        shown = ", ".join(f"{name} = {content[name]!r:.80}" for name in unknown)
        raise PolicyError(
            f"{where} has settings that this version does not know and must not leave out, since "
            f"they may change what the network sees: {shown}. If you know that a setting does not, "
            f"go on with --ignore-settings {','.join(unknown)}, in Python "
            "CheckpointOptions(ignore_settings=...)"
        )


def require_step(steps: Mapping[str, Step], name: str, where: Path) -> Step:
    """A step that must be there.

    Raises:
        PolicyError: it is not.
    """
    if name not in steps:
        raise PolicyError(f"{where} has no step {name!r}")
    return steps[name]


def renamed_cameras(
    features: PolicyFeatures,
    steps: Mapping[str, Step],
    ordered: Callable[[list[str]], list[str]] = list,
) -> tuple[str, ...]:
    """The cameras under the names the robot gives them, in the order the network sees them.

    Args:
        features: the policy's inputs.
        steps: its preprocessor, which may rename them.
        ordered: how the policy orders its own names; as they are listed by default.

    Raises:
        PolicyError: the renaming step is invalid.
    """
    robot: Mapping[str, str] = {}
    if RENAME in steps:
        step = steps[RENAME]
        settings: _Rename = parse_config(step.config, _Rename, step.where)
        robot = {policy: source for source, policy in settings.rename_map.items()}
    return tuple(robot.get(key, key).removeprefix(IMAGES) for key in ordered(features.cameras()))


def without_prefix(stored: StoredTensors, prefix: str) -> StoredTensors:
    """The tensors under the original's names: LeRobot's prefix, where there is one, taken off.

    Raises:
        PolicyError: some tensors have the prefix and some have not.
    """
    bare = [name for name in stored.headers if not name.startswith(prefix)]
    if len(bare) == len(stored.headers):
        return stored
    if bare:
        raise PolicyError(
            f"{stored.where}: some tensors have LeRobot's prefix {prefix!r} and {bare[0]} does not"
        )
    return stored.renamed(lambda name: name.removeprefix(prefix))


def parse_config(content: Mapping[str, Any], model: type[Any], where: str) -> Any:
    """A LeRobot configuration as one of our models.

    Raises:
        PolicyError: a setting is missing or invalid.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise PolicyError(f"{where} is not a LeRobot configuration: {error}") from error


def _step(directory: Path, where: str, entry: Any) -> Step:
    if not isinstance(entry, dict):
        raise PolicyError(f"{where}: a step must be an object, found {entry!r}")
    name = entry.get("registry_name", entry.get("class"))
    config, file = entry.get("config", {}), entry.get("state_file")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise PolicyError(f"{where}: a step needs a name and a configuration, found {entry!r}")
    if file is None:
        return Step(name, config, {}, f"{where}, step {name}")
    if not isinstance(file, str):
        raise PolicyError(f"{where}: the file of step {name} is {file!r}")
    return Step(name, config, _statistics(contained_file(directory, file)), str(directory / file))


def _statistics(path: Path) -> Statistics:
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                feature, _, statistic = name.rpartition(".")
                values = file.get_tensor(name).reshape(-1)
                found.setdefault(feature, {})[statistic] = tuple(map(float, values))
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise PolicyError(f"cannot read the statistics {path}: {error}") from error
    return found
