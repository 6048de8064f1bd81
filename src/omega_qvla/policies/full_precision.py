"""``load_policy``: a full-precision policy from a name or a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from omega_qvla.checkpoints.files import UNSAFE_SUFFIXES, unsafe_message
from omega_qvla.checkpoints.hub import fetch, looks_unpinned, parse_hub_id
from omega_qvla.checkpoints.options import Choices
from omega_qvla.checkpoints.weight_store import SeededWeights, materialize
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.gr00t_n15 import network as gr00t_n15
from omega_qvla.policies.gr00t_n15.network import EMBODIMENTS, Gr00tN15Config, Gr00tN15Module
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor, identity_statistics
from omega_qvla.policies.layouts import reader_for, require_asked
from omega_qvla.policies.native import HasEmbodiments, NativePolicy
from omega_qvla.policies.pi05 import network as pi05
from omega_qvla.policies.pi05.network import Pi05Config, Pi05Module
from omega_qvla.policies.pi05.policy import Pi05Policy, Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Quantiles
from omega_qvla.policies.processing.observations import ByteTokenizer

BUILTIN = {"tiny-pi05": "tiny_pi05", "tiny-gr00t": "tiny_gr00t"}
"""Embedded policies and their folder under ``assets``."""


def _pi05(config: Pi05Config) -> Pi05Policy:
    """The structure of a pi0.5 policy that reads bytes, tensors on the meta device."""
    config = config.model_copy(update={"prompt_length": 256})
    with torch.device("meta"):
        module = Pi05Module(config)
    statistics = NormalizationStatistics(
        state=_unit_quantiles(config.state_dim), actions=_unit_quantiles(config.robot_action_dim)
    )
    processor = Pi05Processor(config, statistics, ByteTokenizer())
    return Pi05Policy(module, processor, dropped_parameters=pi05.dropped_parameters(config))


def _gr00t(config: Gr00tN15Config, embodiments: int) -> Gr00tN15Policy:
    """The structure of a GR00T N1.5 policy that reads bytes, tensors on the meta device.

    Its parameters are those of a checkpoint with this many embodiments, of which some are kept.
    """
    config = config.model_copy(update={"prompt_length": 256})
    with torch.device("meta"):
        module = Gr00tN15Module(config)
    processor = Gr00tProcessor(config, identity_statistics(config), ByteTokenizer())
    dropped = gr00t_n15.dropped_parameters(config, embodiments)
    return Gr00tN15Policy(module, processor, dropped_parameters=dropped)


_FAMILIES: Mapping[str, type[NativePolicy]] = {
    policy.family: policy for policy in (Pi05Policy, Gr00tN15Policy)
}
"""Every native family; adding one is a line here and its shapes below."""

_SHAPES: Mapping[str, Callable[[], NativePolicy]] = {
    "pi05": lambda: _pi05(Pi05Config.full()),
    "pi05-libero": lambda: _pi05(Pi05Config.full(horizon=10, cameras=2)),
    "tiny-pi05": lambda: _pi05(Pi05Config.tiny(vocabulary=ByteTokenizer.size)),
    "gr00t-n1.5": lambda: _gr00t(Gr00tN15Config.full(), EMBODIMENTS),
    "gr00t-n1.5-libero": lambda: _gr00t(Gr00tN15Config.libero(), EMBODIMENTS),
    "tiny-gr00t": lambda: _gr00t(Gr00tN15Config.tiny(vocabulary=ByteTokenizer.size), 1),
}

RANDOM = tuple(_SHAPES)
"""Shapes that ``random:`` offers; ``-libero`` has 2 cameras, and for pi0.5 horizon 10, for GR00T
8 steps and one embodiment."""


def load_policy(source: str | Path, choices: Choices | None = None) -> NativePolicy:
    """Load a full-precision policy.

    Args:
        source: ``builtin:`` and one of ``BUILTIN``; ``random:`` and one of ``RANDOM`` (true shapes,
            seeded random weights); a directory in the layout of openpi, LeRobot or GR00T; or such
            a directory on the hub, ``owner/name@revision`` (docs/checkpoints.md).
        choices: answers to what the checkpoint does not say.

    Raises:
        PolicyError: unknown name, not a policy directory, weights that do not fit, or something
            the checkpoint does not say.
        ResourceError: not enough memory for a random policy of that size; a library is missing;
            the hub cannot be reached.
    """
    policy = stream_policy(source, choices)
    if str(source).startswith("random:"):
        _require_memory(4 * sum(p.numel() for p in policy.module.parameters()), str(source))
    return _in_memory(policy)


def stream_policy(source: str | Path, choices: Choices | None = None) -> NativePolicy:
    """The policy ``load_policy`` loads, its weights read layer by layer while it is quantized.

    Raises:
        PolicyError, ResourceError: as ``load_policy``.
    """
    choices = choices or Choices()
    scheme, _, name = str(source).partition(":")
    if scheme == "random":
        return _of_embodiment(stream_random(name), choices.embodiment)
    directory = policy_directory(source)
    reader = reader_for(directory)
    require_asked(reader, choices, str(directory))
    return reader(directory, choices)


def _of_embodiment(policy: NativePolicy, embodiment: str | None) -> NativePolicy:
    """A random policy with the layers of one robot, by its number, or as it is."""
    if embodiment is None:
        return policy
    stacked = _require_embodiments(policy)
    if not embodiment.isdecimal():
        raise PolicyError(f"a random policy has no tag {embodiment!r}; give the number of a robot")
    return stacked.keep_embodiments((int(embodiment),), int(embodiment))


def _require_embodiments(policy: NativePolicy) -> HasEmbodiments:
    if not isinstance(policy, HasEmbodiments):
        raise PolicyError(
            f"a {policy.family} policy has no layers per embodiment; leave --embodiment out"
        )
    return policy


def _in_memory(policy: NativePolicy) -> NativePolicy:
    """The policy with its tensors in memory rather than in a store."""
    assert policy.store is not None
    materialize(policy.module, policy.store)
    policy.store = None
    return policy


def policy_directory(source: str | Path) -> Path:
    """The folder a policy is in; one on the hub is fetched.

    Raises:
        PolicyError: there is no such folder.
        ResourceError: the hub cannot be reached.
    """
    text = str(source)
    scheme, _, name = text.partition(":")
    if scheme == "builtin":
        return builtin_directory(name)
    directory = Path(source)
    if directory.is_dir():
        return directory
    identity = parse_hub_id(text)
    if identity is not None:
        return fetch(identity)
    if directory.suffix in UNSAFE_SUFFIXES and directory.exists():
        raise PolicyError(unsafe_message([directory]))
    hint = "; on the hub, pin the revision: owner/name@<commit>" if looks_unpinned(text) else ""
    raise PolicyError(
        f"no policy at {text!r}: give a directory, builtin:{'|'.join(BUILTIN)}, "
        f"random:{'|'.join(RANDOM)}, or owner/name@revision on the hub{hint}"
    )


def policy_skeleton(
    family: str, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> NativePolicy:
    """The structure of a policy, without tensors, from what its ``describe`` returned.

    Raises:
        PolicyError: the family is unknown to this version, or its description is invalid.
    """
    if family not in _FAMILIES:
        raise PolicyError(
            f"this version cannot rebuild policies of family {family!r}, only of "
            f"{', '.join(_FAMILIES)}"
        )
    return _FAMILIES[family].skeleton(config, files)


def builtin_directory(name: str) -> Path:
    """Folder of an embedded policy.

    Raises:
        PolicyError: unknown name.
    """
    if name not in BUILTIN:
        raise PolicyError(f"unknown builtin policy {name!r}; known: {', '.join(BUILTIN)}")
    return Path(str(files("omega_qvla") / "assets" / BUILTIN[name]))


def policy_structure(source: str | Path, choices: Choices | None = None) -> NativePolicy:
    """A policy for looking at shapes: its tensors cost no memory.

    Raises:
        PolicyError, ResourceError: as ``load_policy``.
    """
    return stream_policy(source, choices)


def random_structure(name: str) -> NativePolicy:
    """The structure of a random policy, tensors on the meta device.

    Raises:
        PolicyError: unknown name.
    """
    if name not in _SHAPES:
        raise PolicyError(f"unknown random policy {name!r}; known: {', '.join(RANDOM)}")
    return _SHAPES[name]()


def random_policy(name: str, *, seed: int = 0) -> NativePolicy:
    """A policy of true shapes with seeded random weights; it measures, it does not act.

    Weights are rounded to bfloat16, as the published checkpoints are stored.

    Raises:
        PolicyError: unknown name.
        ResourceError: not enough memory.
    """
    policy = stream_random(name, seed=seed)
    _require_memory(4 * sum(p.numel() for p in policy.module.parameters()), f"random:{name}")
    return _in_memory(policy)


def stream_random(name: str, *, seed: int = 0) -> NativePolicy:
    """The policy ``random_policy`` makes, its tensors drawn when they are read.

    Raises:
        PolicyError: unknown name.
    """
    policy = random_structure(name)
    shapes = {key: parameter.shape for key, parameter in policy.module.named_parameters()}
    policy.store = SeededWeights(shapes, seed)
    return policy


def _unit_quantiles(width: int) -> Quantiles:
    return Quantiles(q01=(-1.0,) * width, q99=(1.0,) * width)


def _require_memory(needed: int, name: str) -> None:
    available = available_memory()
    if needed > available:
        raise ResourceError(
            f"{name} needs {needed / 1e9:.1f} GB of memory in float32, "
            f"{available / 1e9:.1f} GB is free"
        )


def available_memory() -> int:
    """Bytes that can be had without swapping; unlike free pages this counts the file cache."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
