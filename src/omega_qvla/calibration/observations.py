"""Observation sets: the data a policy is calibrated and compared on.

Stored as one ``.npz`` (numpy's zip, deflated, never pickled): per camera an array
``images/<camera>`` uint8 [N, H, W, 3], ``state`` float32 [N, n], ``prompt`` and optionally
``task`` and ``split`` as fixed-width text [N].
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch

from omega_qvla.errors import ObservationError
from omega_qvla.policies.base import Observation, Policy
from omega_qvla.policies.loading import BUILTIN, builtin_directory

FILE = "observations.npz"
_TEXT = ("prompt", "task", "split")


class Environment(Protocol):
    """What rollouts need of a simulator."""

    max_steps: int

    def reset(self, seed: int) -> Observation: ...

    def observe(self) -> Observation: ...

    def step(self, action: np.ndarray) -> bool: ...


class Observations(Sequence[Observation]):
    """An immutable sequence of observations, each a mapping as the policy takes it."""

    def __init__(self, items: Iterable[Observation]) -> None:
        self._items = tuple(items)
        if not self._items:
            raise ObservationError("there are no observations; calibration needs at least one")
        for i, item in enumerate(self._items):
            if not isinstance(item, Mapping):
                raise ObservationError(
                    f"observation {i} is {type(item).__name__}; observations are mappings"
                )

    @overload
    def __getitem__(self, index: int) -> Observation: ...

    @overload
    def __getitem__(self, index: slice) -> Observations: ...

    def __getitem__(self, index: int | slice) -> Observation | Observations:
        if isinstance(index, slice):
            return Observations(self._items[index])
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._items)

    def spread(self, count: int) -> Observations:
        """At most ``count`` observations, evenly spaced, so that every part is represented."""
        return Observations(self._items[i] for i in self.spread_indices(count))

    def spread_indices(self, count: int) -> list[int]:
        """Which ones ``spread`` picks."""
        if count >= len(self):
            return list(range(len(self)))
        return [int(i) for i in np.linspace(0, len(self) - 1, count).round()]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content; part of what a resumed quantization must agree on."""
        digest = hashlib.sha256()
        for item in self._items:
            _update(digest, item)
        return digest.hexdigest()

    @classmethod
    def load(cls, source: str | Path, split: str = "calibration") -> Observations:
        """From ``builtin:<policy>`` or an npz file.

        Args:
            split: for files that hold several: ``calibration`` or ``heldout``.
        """
        scheme, _, name = str(source).partition(":")
        if scheme == "builtin" and name in BUILTIN:
            return cls.from_npz(builtin_directory(name) / FILE, split=split)
        if scheme == "builtin":
            raise ObservationError(
                f"unknown builtin observations {name!r}; known: {', '.join(BUILTIN)}"
            )
        return cls.from_npz(source, split=split)

    @classmethod
    def from_npz(cls, path: str | Path, split: str | None = None) -> Observations:
        """From one npz file in the layout of this module.

        Raises:
            ObservationError: unreadable, missing arrays, unequal lengths or an empty split.
        """
        try:
            arrays = _read_npz(Path(path))
        except _UNREADABLE as error:
            raise ObservationError(f"cannot read observations from {path}: {error}") from error
        return cls(_unstack(arrays, split, str(path)))

    @classmethod
    def random(
        cls,
        cameras: Sequence[str],
        state_dim: int,
        *,
        count: int = 8,
        size: int = 224,
        seed: int = 0,
    ) -> Observations:
        """Noise in the form of observations: it exercises a policy, it calibrates nothing real."""
        generator = np.random.default_rng(seed)
        return cls(
            {
                "images": {
                    name: generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    for name in cameras
                },
                "state": generator.uniform(-1.0, 1.0, state_dim).astype(np.float32),
                "prompt": "open the door",  # words that every tokenizer here knows
            }
            for _ in range(count)
        )

    def save_npz(self, path: str | Path) -> None:
        """Write in the layout ``from_npz`` reads; same content, same bytes."""
        arrays: dict[str, np.ndarray] = {}
        cameras = self[0]["images"].keys()
        for camera in cameras:
            arrays[f"images/{camera}"] = np.stack([item["images"][camera] for item in self])
        arrays["state"] = np.stack([np.asarray(item["state"], np.float32) for item in self])
        for key in _TEXT:
            if key in self[0]:
                arrays[key] = np.array([str(item[key]) for item in self])
        _write_npz(Path(path), arrays)

    @classmethod
    def from_rollouts(
        cls,
        policy: Policy,
        env: Environment,
        *,
        episodes: int = 8,
        every: int = 2,
        execute: int = 5,
        seed: int = 0,
    ) -> Observations:
        """Run the policy in a simulator and keep every ``every``-th observation it acted on."""
        kept: list[Observation] = []
        for episode in range(episodes):
            observation = env.reset(seed + episode)
            generator = torch.Generator().manual_seed(seed + episode)
            taken, done, chunk_number = 0, False, 0
            while taken < env.max_steps and not done:
                if chunk_number % every == 0:
                    kept.append(observation)
                chunk_number += 1
                chunk = policy.sample_actions(observation, generator=generator)
                for action in chunk[:execute]:
                    done = bool(env.step(action))
                    taken += 1
                    if done or taken >= env.max_steps:
                        break
                observation = env.observe()
        return cls(kept)


def as_observations(source: Iterable[Observation] | Observations) -> Observations:
    """Any iterable of mappings as ``Observations``.

    Raises:
        ObservationError: empty, or an element is not a mapping.
    """
    if isinstance(source, Observations):
        return source
    if not isinstance(source, Iterable):
        raise ObservationError(
            f"observations must be an iterable of mappings, got {type(source).__name__}"
        )
    return Observations(source)


def _unstack(
    arrays: Mapping[str, np.ndarray], split: str | None, where: str
) -> Iterator[Observation]:
    cameras = {k.removeprefix("images/"): v for k, v in arrays.items() if k.startswith("images/")}
    missing = [name for name in ("state", "prompt") if name not in arrays]
    if missing or not cameras:
        raise ObservationError(
            f"{where} needs arrays images/<camera>, state and prompt; it has {sorted(arrays)}"
        )
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim > 0}
    if len(set(lengths.values())) != 1 or len(lengths) != len(arrays):
        raise ObservationError(f"{where}: arrays differ in length: {lengths}")
    rows = range(len(arrays["prompt"]))
    if split is not None and "split" in arrays:
        rows = [i for i in rows if str(arrays["split"][i]) == split]
        if not rows:
            known = sorted({str(value) for value in arrays["split"]})
            raise ObservationError(f"{where} has no split {split!r}; it has {known}")
    for i in rows:
        yield {
            "images": {name: images[i] for name, images in cameras.items()},
            "state": arrays["state"][i],
            **{key: str(arrays[key][i]) for key in _TEXT if key in arrays},
        }


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,  # encrypted entries, unknown compression
    zipfile.BadZipFile,
    zlib.error,
)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array, not an npz archive")
    with file:
        arrays = {name: file[name] for name in file.files}
    foreign = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if foreign:
        raise ValueError(f"{foreign} are not arrays")
    return arrays


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Deflated npz with fixed timestamps, written beside and renamed."""
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())
    partial.replace(path)


def _update(digest: Any, value: Any) -> None:
    """Feed nested observations into a hash, unambiguously."""
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}}}".encode())
        for key in sorted(value, key=str):
            digest.update(f"[{key!r}]".encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)})".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        _update(digest, value.tolist())  # its bytes would be addresses
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
