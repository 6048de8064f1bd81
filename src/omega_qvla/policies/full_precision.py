"""``load_policy``: a full-precision policy from a name or a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import UNSAFE_SUFFIXES, unsafe_message
from omega_qvla.checkpoints.hub import fetch, looks_unpinned, parse_hub_id
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.weight_store import SeededWeights, materialize
from omega_qvla.errors import PolicyError, ResourceError, did_you_mean
from omega_qvla.policies.families import families, family_of
from omega_qvla.policies.layouts import layout_of, require_asked
from omega_qvla.policies.native import NativePolicy, of_embodiment


def embedded() -> dict[str, str]:
    """Names behind ``builtin:`` and their folders under ``assets``, of all families."""
    return {name: at for each in families().values() for name, at in each.embedded.items()}


def sizes() -> dict[str, Callable[[], NativePolicy]]:
    """Names behind ``random:`` and what makes their structures, of all families."""
    return {name: make for each in families().values() for name, make in each.sizes.items()}


def load_policy(source: str | Path, options: CheckpointOptions | None = None) -> NativePolicy:
    """Load a full-precision policy.

    Args:
        source: ``builtin:`` and one of ``embedded()``; ``random:`` and one of ``sizes()`` (true
            shapes, seeded random weights); a directory in the layout of openpi, LeRobot or GR00T;
            or such a directory on the hub, ``owner/name@revision`` (docs/checkpoints.md).
        options: answers to what the checkpoint does not say.

    Raises:
        PolicyError: unknown name, not a policy directory, weights that do not fit, or something
            the checkpoint does not say.
        ResourceError: not enough memory for a random policy of that size; a library is missing;
            the hub cannot be reached.
    """
    policy = stream_policy(source, options)
    if str(source).startswith("random:"):
        _require_memory(4 * sum(p.numel() for p in policy.module.parameters()), str(source))
    assert policy.store is not None
    materialize(policy.module, policy.store)
    policy.store = None
    return policy


def stream_policy(source: str | Path, options: CheckpointOptions | None = None) -> NativePolicy:
    """The policy ``load_policy`` loads, its weights read layer by layer while it is quantized.

    Raises:
        PolicyError, ResourceError: as ``load_policy``.
    """
    options = options or CheckpointOptions()
    scheme, _, name = str(source).partition(":")
    if scheme == "random":
        return of_embodiment(stream_random(name), options.embodiment)
    directory = policy_directory(source)
    layout = layout_of(directory)
    require_asked(layout, options, str(directory))
    return layout.read(directory, options)


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
        f"no policy at {text!r}: give a directory, builtin:{'|'.join(embedded())}, "
        f"random:{'|'.join(sizes())}, or owner/name@revision on the hub{hint}"
    )


def policy_skeleton(
    family: str, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> NativePolicy:
    """The structure of a policy, without tensors, from what its ``describe`` returned.

    Raises:
        PolicyError: the family is unknown to this version, or its description is invalid.
    """
    return family_of(family).policy.skeleton(config, files)


def builtin_directory(name: str) -> Path:
    """Folder of an embedded policy.

    Raises:
        PolicyError: unknown name.
    """
    if name not in embedded():
        raise PolicyError(
            f"unknown builtin policy {name!r}; known: {', '.join(embedded())}"
            f"{did_you_mean(name, embedded())}"
        )
    return Path(str(files("omega_qvla") / "assets" / embedded()[name]))


def stream_random(name: str, *, seed: int = 0) -> NativePolicy:
    """A policy of true shapes with seeded random weights, drawn when they are read.

    It measures, it does not act.  Weights are rounded to bfloat16, as the published checkpoints are
    stored.

    Raises:
        PolicyError: unknown name.
    """
    if name not in sizes():
        raise PolicyError(
            f"unknown random policy {name!r}; known: {', '.join(sizes())}"
            f"{did_you_mean(name, sizes())}"
        )
    policy = sizes()[name]()
    shapes = {key: parameter.shape for key, parameter in policy.module.named_parameters()}
    policy.store = SeededWeights(shapes, seed)
    return policy


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
