"""What a family of policies tells the rest of the project about itself.

Every folder of a family has a ``family.py`` with one ``FAMILY``; ``families.py`` lists the folders.
Nothing else in the project names a family: whoever needs to know something of one asks for it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.native import NativePolicy

Content = Mapping[str, Any]
"""``config.json`` of a policy directory."""


class CheckpointLayout(NamedTuple):
    """A form in which a family's full-precision policies are saved.

    Attributes:
        title: what a user knows it as.
        recognizes: whether a directory with this ``config.json`` (None: without one) has it.
            LeRobot's directories are told by ``lerobot_type`` instead.
        read: the directory, and what it leaves open → its policy, the weights left in the files.
        options: the fields of ``CheckpointOptions`` that ``read`` has a use for.
        lerobot_type: ``type`` of a LeRobot ``config.json``; None for the layouts of others.
        reads: whether a ``config.json`` of that type is of this family: LeRobot may have given one
            name to two of them.
    """

    title: str
    read: Callable[[Path, CheckpointOptions], NativePolicy]
    options: frozenset[str]
    recognizes: Callable[[Path, Content | None], bool] = lambda directory, content: False
    lerobot_type: str | None = None
    reads: Callable[[Content], bool] = lambda content: True


@dataclass(frozen=True)
class LiberoConvention:
    """How a family's policies are evaluated in LIBERO.

    Attributes:
        execute: actions carried out of each chunk.
        max_steps: by suite, settling not included.
        gripper: ``signed`` is LIBERO's own action, ``opening`` 1 for open and 0 for closed.
        seed: of the simulator.
    """

    execute: int
    max_steps: Mapping[str, int]
    gripper: Literal["signed", "opening"]
    seed: int


@dataclass(frozen=True)
class Family:
    """A family of policies.

    Attributes:
        policy: its class; ``policy.family`` is its name in artifacts and in ``config.json``.
        title: what it is called in sentences.
        sizes: name behind ``random:`` → a policy of that size without weights.
        embedded: name behind ``builtin:`` → folder under ``assets``.
        layouts: what its checkpoints look like, the project's own layout left out.
        libero: how its authors evaluate it in LIBERO; None where nothing is published.
    """

    policy: type[NativePolicy]
    title: str
    sizes: Mapping[str, Callable[[], NativePolicy]]
    embedded: Mapping[str, str] = field(default_factory=dict)
    layouts: tuple[CheckpointLayout, ...] = ()
    libero: LiberoConvention | None = None

    @property
    def name(self) -> str:
        """Its name in artifacts and in ``config.json``."""
        return self.policy.family
