"""LeRobot's own pre- and postprocessor of a policy, kept as files that need no hub.

A pipeline is a JSON file that names steps, and a file of tensors for each step with statistics.
Some steps name a tokenizer on a hub; its files are kept too (``hub-N-…``), so that the pipelines
are built again where there is no network.  The files are the only form: what quantizing calibrates
with is built of the same bytes as what runs later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load as load_tensors

from omega_qvla.checkpoints.files import parse_json, read_bytes
from omega_qvla.checkpoints.lerobot_pipelines import POSTPROCESSOR, PREPROCESSOR
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.lerobot_bridge.library import lerobot

HUB = "hub.json"
"""Names on a hub → the number in the names of their files."""

_HUB_KEYS = ("tokenizer_name", "model_name")
"""What steps call the name of a tokenizer or processor on a hub."""


@dataclass(frozen=True)
class Pipelines:
    """The processors of a policy.

    Attributes:
        preprocessor: a batch as a robot or an environment gives it → the network's inputs.
        postprocessor: normalized actions [..., A] → actions in the robot's units.
        files: what both can be built of again, by name.
    """

    preprocessor: Any
    postprocessor: Any
    files: Mapping[str, bytes]


def read_pipelines(directory: Path, kind: str) -> Pipelines:
    """The processors that a policy directory of LeRobot has.

    Raises:
        PolicyError: a file is missing or damaged, a step is not LeRobot's own, or a tokenizer
            cannot be kept.
        ResourceError: a tokenizer is neither here nor can be fetched by LeRobot.
    """
    files: dict[str, bytes] = {}
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (directory / name).exists():
            raise PolicyError(
                f"{directory} has no {name}: it was written by a LeRobot before 0.4; let LeRobot "
                "migrate it (python -m lerobot.processor.migrate_policy_normalization)"
            )
        files[name] = read_bytes(directory, name)
        steps = _steps(files[name], str(directory / name))
        _require_own(steps, kind, str(directory / name))
        files |= {
            str(step["state_file"]): read_bytes(directory, str(step["state_file"]))
            for step in steps
            if step.get("state_file")
        }
    numbers: dict[str, int] = {}
    for step in _all_steps(files):
        for source in _hub_names(step):
            if source not in numbers:
                numbers[source] = len(numbers)
                files |= _kept(step, source, numbers[source])
    files[HUB] = json.dumps(numbers, sort_keys=True).encode()
    return build_pipelines(files, kind)


def build_pipelines(files: Mapping[str, bytes], kind: str) -> Pipelines:
    """The processors again, from their files alone.

    Raises:
        PolicyError: a file is missing or damaged, or a step is not LeRobot's own.
    """
    processor = lerobot("processor")
    numbers = parse_json(_file(files, HUB), HUB)
    with TemporaryDirectory(prefix="omega-qvla-") as place:
        for number in numbers.values():
            _write_folder(Path(place) / str(number), files, f"hub-{number}-")
        made = [
            _pipeline(files, name, kind, {k: f"{place}/{v}" for k, v in numbers.items()}, *convert)
            for name, convert in (
                (PREPROCESSOR, (processor.batch_to_transition, processor.transition_to_batch)),
                (
                    POSTPROCESSOR,
                    (processor.policy_action_to_transition, processor.transition_to_policy_action),
                ),
            )
        ]
    _connect(made[0], made[1], kind)
    return Pipelines(made[0], made[1], files)


def _pipeline(
    files: Mapping[str, bytes],
    name: str,
    kind: str,
    folders: Mapping[str, str],
    to_transition: Any,
    to_output: Any,
) -> Any:
    content = parse_json(_file(files, name), name)
    _require_own(_steps(_file(files, name), name), kind, name)
    state: dict[str, Any] = {}
    for step in content["steps"]:
        settings = step.setdefault("config", {})
        for key in _HUB_KEYS:
            if settings.get(key) in folders:
                settings[key] = folders[settings[key]]
        if "device" in settings:
            settings["device"] = "cpu"  # where the network is
        if step.get("state_file"):
            held = str(step["state_file"])
            state[held.removesuffix(".safetensors")] = load_tensors(_file(files, held))
    try:
        made = lerobot("processor").PolicyProcessorPipeline.from_config(
            content, state_dict=state, to_transition=to_transition, to_output=to_output
        )
        for step in made.steps:
            _tokenizer_of(step)  # one that LeRobot reads late is read while its files are there
    except (ImportError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise PolicyError(f"LeRobot cannot build the pipeline of {name}: {error}") from error
    return made


def _connect(before: Any, after: Any, kind: str) -> None:
    """Let the steps that undo something know those that did it, as LeRobot does after loading."""
    if kind == "groot":
        code = lerobot("policies.groot.processor_groot")
        code._reconnect_groot_relative_absolute_steps(before, after)
        code._reconnect_groot_n1_7_pack_decode_steps(before, after)
        return
    lerobot("policies.factory")._reconnect_relative_absolute_steps(before, after)


def _steps(content: bytes, where: str) -> Sequence[Mapping[str, Any]]:
    steps = parse_json(content, where).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise PolicyError(f"{where} is not a pipeline of LeRobot: it has no list of steps")
    return steps


def _all_steps(files: Mapping[str, bytes]) -> Iterator[Mapping[str, Any]]:
    for name in (PREPROCESSOR, POSTPROCESSOR):
        yield from _steps(files[name], name)


def _require_own(steps: Sequence[Mapping[str, Any]], kind: str, where: str) -> None:
    """Refuse steps that LeRobot does not bring: their code would come from somewhere else."""
    lerobot(f"policies.{kind}.processor_{kind}")  # registers the steps of this type
    registry = lerobot("processor").ProcessorStepRegistry
    for step in steps:
        name = step.get("registry_name")
        try:
            owner = registry.get(name).__module__ if name else str(step.get("class", ""))
        except KeyError:
            owner = ""
        if not owner.startswith("lerobot."):
            raise PolicyError(
                f"{where} has the step {name or step.get('class')!r}, which is not LeRobot's own "
                "but another plug-in's: its code is not run here. Save the policy with a pipeline "
                "of LeRobot's steps"
            )


def _hub_names(step: Mapping[str, Any]) -> Iterator[str]:
    settings = step.get("config") or {}
    yield from (str(settings[key]) for key in _HUB_KEYS if isinstance(settings.get(key), str))


def _kept(step: Mapping[str, Any], source: str, number: int) -> dict[str, bytes]:
    """The files of a tokenizer that a step names."""
    registry = lerobot("processor").ProcessorStepRegistry
    try:
        made = registry.get(step["registry_name"])(**step["config"])
        tokenizer = _tokenizer_of(made)
        with TemporaryDirectory(prefix="omega-qvla-") as place:
            for part in _parts(tokenizer):
                part.save_pretrained(place)
            return {
                f"hub-{number}-{path.name}": path.read_bytes()
                for path in sorted(Path(place).iterdir())
                if path.is_file()
            }
    except (OSError, ImportError) as error:
        raise ResourceError(
            f"the tokenizer {source!r} of the policy's processor cannot be read "
            f"({str(error).strip().splitlines()[0]}): fetch it once where there is a network "
            f"(hf download {source}), or name a folder in {PREPROCESSOR}"
        ) from error


def _tokenizer_of(step: Any) -> Any:
    """What a built step has read from a hub; None where it reads nothing."""
    return getattr(step, "input_tokenizer", None) or getattr(step, "proc", None)


def _parts(tokenizer: Any) -> Iterator[Any]:
    """A tokenizer alone, or a processor's parts, each of which LeRobot reads by itself."""
    if not hasattr(tokenizer, "image_processor"):
        yield tokenizer
        return
    for name in ("tokenizer", "image_processor", "video_processor"):
        yield getattr(tokenizer, name)


def _write_folder(folder: Path, files: Mapping[str, bytes], prefix: str) -> None:
    folder.mkdir()
    for name, content in files.items():
        if name.startswith(prefix):
            (folder / name.removeprefix(prefix)).write_bytes(content)


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise PolicyError(f"the processor of the policy lacks the file {name}")
    return files[name]
