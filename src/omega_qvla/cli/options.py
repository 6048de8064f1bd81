"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import tyro

from omega_qvla.errors import ResourceError, UsageError, did_you_mean
from omega_qvla.files import write_json
from omega_qvla.recipe import Scope

if TYPE_CHECKING:
    from omega_qvla.checkpoints.options import CheckpointOptions
    from omega_qvla.evaluation.closed_loop import Resources

EVALUATION_SEED = 0
"""First seed of evaluation episodes; demonstrations use seeds far above."""

Positional = tyro.conf.Positional


def option(help: str, metavar: str | None = None) -> Any:
    """How ``--help`` shows an option; a default that says nothing is left out.

    Args:
        help: what it is for.
        metavar: what it accepts.
    """
    return tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint=_default)


def _default(text: str) -> str:
    return "" if text in ("None", "False", "") else f"(default: {text})"


_STANDARD_OUTPUT = Path("-")

PolicyName = Annotated[
    str,
    option(metavar="POLICY", help="builtin:NAME | random:NAME | DIR | HUB_ID@REVISION"),
]
RecipeName = Annotated[
    str, option(metavar="RECIPE", help="NAME of `omega-qvla recipes`, or FILE.yaml")
]
RecipeNames = Annotated[
    str,
    option(metavar="RECIPE,..", help="names or YAML files; or all: methods, ablations"),
]
ScopeName = Annotated[
    Scope,
    option(help="the recipe as written, or backbone and action head only"),
]
TaskNames = Annotated[
    str | None, option(metavar="TASK,..", help="those the policy was admitted to by default")
]


@dataclass(frozen=True)
class Range:
    """What a number on the command line may be, both ends included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:,g} to {self.high:,.15g}"


COUNT = Range(1, 1_000_000)
COUNT_OR_NONE = Range(0, 1_000_000)
PROCESSES = Range(1, 1024)
STEPS = Range(1, 1000)
SEED = Range(0, 2**31 - 1)
MAGNITUDE = Range(0, 1_000_000)
PORT = Range(0, 65_535)

Threads = Annotated[
    int | None,
    option(
        metavar="N",
        help="threads of a policy; by default every core, and one where its layers are small",
    ),
    PROCESSES,
]
Seed = Annotated[int, option(metavar="N", help="first episode seed"), SEED]


@dataclass(frozen=True)
class Common:
    """Of every command."""

    examples: ClassVar[tuple[str, ...]] = ()
    """What ``--help`` shows at its end."""
    json: Annotated[
        Path | None,
        option(metavar="FILE", help="write the result here, machine-readable; - prints it"),
    ] = None
    overwrite: Annotated[
        bool, option(help="replace outputs that are there, and discard interrupted work")
    ] = False
    debug: Annotated[bool, option(help="show a traceback on errors")] = False

    @property
    def files(self) -> list[Path]:
        """The single files it will write."""
        return [] if self.json is None or to_standard_output(self.json) else [self.json]

    def kept(self) -> str | None:
        """After an interruption: what is kept of the work, if it can be continued."""
        return None


@dataclass(frozen=True)
class Execution:
    """Where the episodes are computed."""

    threads: Threads = None
    processes: Annotated[
        int | None,
        option(
            metavar="N",
            help="worker processes, each with the policy and a simulator; by default as many as "
            "cores and memory allow, if there are enough episodes",
        ),
        PROCESSES,
    ] = None
    ray: Annotated[
        str | None,
        option(
            metavar="ADDRESS",
            help="run on a Ray cluster: local, auto, or HOST:PORT of its head node",
        ),
    ] = None

    @property
    def resources(self) -> Resources:
        """Where policies compute."""
        from omega_qvla.evaluation.closed_loop import Resources

        return Resources(self.threads, self.processes, self.ray)


@dataclass(frozen=True)
class Simulation(Execution):
    """Of the commands that run the simulator."""

    workers: Annotated[
        int | None,
        option(
            metavar="N",
            help="simulators of a policy; 8 of Meta-World, whose episodes advance together and "
            "share its passes, else 2",
        ),
        PROCESSES,
    ] = None
    seed: Seed = EVALUATION_SEED

    @property
    def resources(self) -> Resources:
        """Where policies compute, and how many simulators each has."""
        return replace(super().resources, workers=self.workers)


@dataclass(frozen=True)
class Calibrated:
    """Of the commands that take observations."""

    calibration: Annotated[
        str | None,
        option(
            metavar="DATASET",
            help="LeRobot dataset, npz file or a folder of them, builtin:NAME or, to quantize, "
            "random:COUNT; the policy's own by default",
        ),
    ] = None
    cameras: Annotated[
        str | None,
        option(
            metavar="POLICYNAME=FEATURE,..",
            help="of a LeRobot dataset, where its names are not the policy's; POLICYNAME=none "
            "leaves a camera out",
        ),
    ] = None
    state: Annotated[
        str | None,
        option(
            metavar="NAME,..", help="of a LeRobot dataset: features or named parts of the state"
        ),
    ] = None
    instruction: Annotated[
        str | None,
        option(
            metavar="TEXT", help="for every frame of a LeRobot dataset whose tasks have no words"
        ),
    ] = None
    allow_mismatch: Annotated[
        bool,
        option(help="go on with observations mostly unlike what the policy was trained on"),
    ] = False


@dataclass(frozen=True)
class Checkpoint:
    """Of the commands that take a policy in full precision."""

    training_config: Annotated[
        str | None,
        option(
            metavar="NAME|FILE", help="of an openpi checkpoint, such as pi05_libero, or a JSON file"
        ),
    ] = None
    data_config: Annotated[
        str | None,
        option(metavar="NAME|FILE", help="of a GR00T checkpoint, such as libero, or a JSON file"),
    ] = None
    embodiment: Annotated[
        str | None,
        option(metavar="TAG", help="GR00T: the robot's; of random:gr00t-n1.5 its number, else all"),
    ] = None
    tokenizer: Annotated[
        Path | None,
        option(
            metavar="PATH", help="PaliGemma's tokenizer.model, or the folder of Qwen's vocabulary"
        ),
    ] = None
    written_by: Annotated[
        Literal["lerobot-0.4", "lerobot-0.5"] | None,
        option(help="release of LeRobot that wrote a pi05 checkpoint, where it cannot tell"),
    ] = None
    ignore_settings: Annotated[
        str | None,
        option(
            metavar="NAME,..", help="unknown settings of a LeRobot config.json to go on without"
        ),
    ] = None
    base: Annotated[
        str | None,
        option(metavar="DIR|HUB_ID@REVISION", help="of a LoRA adapter: what it was trained on"),
    ] = None
    tied: Annotated[
        Literal["embedding", "head"] | None,
        option(help="which to read where token embedding and head of a file differ"),
    ] = None

    @property
    def choices(self) -> CheckpointOptions:
        """What the checkpoint leaves open, as it was answered."""
        from omega_qvla.checkpoints.options import CheckpointOptions

        return CheckpointOptions(
            training_config=self.training_config,
            tokenizer=self.tokenizer,
            embodiment=self.embodiment,
            data_config=self.data_config,
            written_by=self.written_by,
            ignore_settings=tuple(names_of(self.ignore_settings) or ()),
            base=self.base,
            tied=self.tied,
        )


def require_in_range(command: Common) -> None:
    """Refuse numbers that make no sense before anything is read.

    Raises:
        UsageError: names the option, what it is, and what it may be.
    """
    for name, hint in get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        for allowed in getattr(hint, "__metadata__", ()):
            if isinstance(allowed, Range) and value is not None:
                require_number(f"--{name.replace('_', '-')}", value, allowed)


def require_number(option: str, value: float, allowed: Range) -> None:
    """Refuse a number outside a range, and NaN.

    Raises:
        UsageError: names the option and the range.
    """
    if not allowed.low <= value <= allowed.high:
        raise UsageError(f"{option} {value}: give a number from {allowed}")


def names_of(text: str | None) -> list[str] | None:
    """The parts of ``a, b,c``; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def chosen_tasks(text: str | None) -> list[str] | None:
    """The tasks of Meta-World that were named; None leaves the choice to the policy.

    Raises:
        UsageError: one is unknown, or none is named.
    """
    from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS

    names = names_of(text)
    unknown = [name for name in names or () if name not in TASKS]
    if unknown or names == []:
        hint = did_you_mean(unknown[0], TASKS) if unknown else ""
        raise UsageError(f"--tasks {text!r}: the tasks are {', '.join(TASKS)}{hint}")
    return names


def magnitudes(text: str) -> list[float]:
    """Plain and the stress conditions of ``--stress 10,30``."""
    try:
        given = [float(part) for part in names_of(text) or ()]
    except ValueError:
        raise UsageError(f"--stress {text!r}: give magnitudes such as 30 or 10,30,100") from None
    for magnitude in given:
        require_number("--stress", magnitude, MAGNITUDE)
    return list(dict.fromkeys([0.0, *given]))


def require_cpu(device: str) -> None:
    """Refuse other devices, where a command has none of them.

    Raises:
        ResourceError: says what does run on a GPU.
    """
    if device != "cpu":
        raise ResourceError(
            f"device {device!r} is not supported by this command; use cpu. On a GPU an artifact "
            "is run from Python, load(DIR, device='cuda'), and measured by `make bench-gpu`"
        )


def to_standard_output(path: Path | None) -> bool:
    """Whether ``--json -`` was given: then everything else goes to standard error."""
    return path == _STANDARD_OUTPUT


def save(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write or print what ``--json`` asked for, if it did."""
    if to_standard_output(path):
        print(json.dumps(document, indent=2, allow_nan=False))
    elif path is not None:
        write_json(document, path)
