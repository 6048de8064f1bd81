"""Observation sets: the data a policy is calibrated and compared on.

Stored as one ``.npz`` (numpy's zip, deflated, never pickled): per camera an array
``images/<camera>`` uint8 [N, H, W, 3], ``state`` float32 [N, n], ``prompt`` and optionally
``task`` and ``split`` as fixed-width text [N].  A folder of such files is one set, in the order of
their names.  LeRobot datasets are read by ``lerobot.py``; like folders they stay on disk, and an
observation is read when it is asked for (``streamed.py``).
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, overload

import numpy as np
import torch

from omega_qvla.calibration.fingerprint import content_digest, fingerprint_of
from omega_qvla.calibration.lerobot import Cameras, stream_lerobot
from omega_qvla.calibration.lerobot_metadata import is_dataset
from omega_qvla.calibration.streamed import SourceReport, Streamed
from omega_qvla.environments import Environment, action_limits, begin, carry_out
from omega_qvla.errors import ObservationError
from omega_qvla.files import new_file
from omega_qvla.policies.base import Observation, Policy
from omega_qvla.policies.full_precision import builtin_directory, embedded
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import dimension_names

FILE = "observations.npz"
_TEXT = ("prompt", "task", "split")


class Observations(Sequence[Observation]):
    """An immutable sequence of observations, each a mapping as the policy takes it.

    Attributes:
        report: what was taken from the source and what was left out; None where nothing was.
    """

    def __init__(
        self, items: Iterable[Observation] | Streamed, report: SourceReport | None = None
    ) -> None:
        self._items = items if isinstance(items, Streamed) else tuple(items)
        self.report = report
        if not self._items:
            raise ObservationError("there are no observations; calibration needs at least one")
        if isinstance(self._items, Streamed):
            return
        for i, item in enumerate(self._items):
            if not isinstance(item, Mapping):
                raise ObservationError(
                    f"observation {i} is {type(item).__name__}; observations are mappings"
                )

    def __repr__(self) -> str:
        first = self._items[0]
        cameras = ", ".join(first.get("images", {}))
        return f"<Observations: {len(self)}, cameras {cameras or 'none'}>"

    @overload
    def __getitem__(self, index: int) -> Observation: ...

    @overload
    def __getitem__(self, index: slice) -> Observations: ...

    def __getitem__(self, index: int | slice) -> Observation | Observations:
        return Observations(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._items)

    def spread(self, count: int) -> Observations:
        """At most ``count`` observations, evenly spaced, so that every part is represented."""
        places = self.spread_indices(count)
        if isinstance(self._items, Streamed):
            return Observations(self._items.select(places))
        return Observations(self._items[i] for i in places)

    def spread_indices(self, count: int) -> list[int]:
        """Which ones ``spread`` picks."""
        if count >= len(self):
            return list(range(len(self)))
        return [int(i) for i in np.linspace(0, len(self) - 1, count).round()]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content; part of what a resumed quantization must agree on."""
        if isinstance(self._items, Streamed):
            return fingerprint_of(self._items.digests)
        return fingerprint_of(map(content_digest, self._items))

    @classmethod
    def load(cls, source: str | Path, split: str = "calibration") -> Observations:
        """From ``builtin:<policy>``, an npz file, a folder of them, or a LeRobot dataset.

        Args:
            split: for sources that hold several: ``calibration`` or ``heldout``.

        Raises:
            ObservationError: see ``from_npz`` and ``from_lerobot``.
        """
        scheme, _, name = str(source).partition(":")
        if scheme == "builtin" and name in embedded():
            return cls.from_npz(builtin_directory(name) / FILE, split=split)
        if scheme == "builtin":
            raise ObservationError(
                f"unknown builtin observations {name!r}; known: {', '.join(embedded())}"
            )
        if is_dataset(Path(source)):
            return cls.from_lerobot(source, split=split)
        return cls.from_npz(source, split=split)

    @classmethod
    def from_npz(cls, path: str | Path, split: str | None = None) -> Observations:
        """From an npz file in the layout of this module, or from a folder of them.

        Raises:
            ObservationError: unreadable, missing arrays, unequal lengths, an empty split, or files
                of a folder that do not fit together.
        """
        path = Path(path)
        if not path.is_dir():
            arrays = _load_npz(path)
            items = _unstack(arrays, split, path)
            if not items:
                _refuse_empty(split, _splits(arrays), path)
            return cls(items)
        streamed = stream_npz_folder(path, split)
        return cls(streamed, SourceReport(f"{len(streamed)} observations from the files of {path}"))

    @classmethod
    def from_lerobot(
        cls,
        path: str | Path,
        *,
        policy: NativePolicy | None = None,
        cameras: Cameras = None,
        state: Sequence[str] | None = None,
        instruction: str | None = None,
        split: str = "calibration",
        limit: int = 64,
        seed: int = 0,
    ) -> Observations:
        """From a LeRobot dataset, version 2.0, 2.1 or 3.0.

        Frames are chosen over all tasks and over whole episodes (``sampling.py``); images are
        decoded when an observation is asked for.

        Args:
            path: the directory that holds ``meta``.
            policy: whose cameras are taken by their names, and whose state, if it has names for its
                numbers and the dataset has the same, is put in that order.
            cameras: the policy's camera names, where the dataset calls them the same; or a mapping
                from them to the dataset's, with None for a camera to leave out.  By default the
                policy's, or without a policy the dataset's own.
            state: features, GR00T's names or names of single numbers that the state is put together
                from, in this order; by default the whole ``observation.state``.
            instruction: what every frame was told, for datasets whose tasks have no words.
            split: ``calibration``, or ``heldout`` for the frames between those.
            limit: how many observations at most.
            seed: of the choice; same seed, same frames.

        Returns:
            Images uint8 [H, W, 3] by camera, state float32 [n], prompt and task; what could not be
            read is in ``report``.

        Raises:
            ObservationError: the dataset is incomplete or invalid, a name is not in it, or fewer
                than half of the chosen frames can be read.
            ResourceError: the extra ``data`` is not installed.
        """
        if policy is not None and cameras is None:
            cameras = policy.config.cameras
        streamed, report = stream_lerobot(
            Path(path),
            cameras=cameras,
            state=state,
            wanted=() if policy is None else dimension_names(policy.processor.statistics.state),
            instruction=instruction,
            split=split,
            limit=limit,
            seed=seed,
        )
        return cls(streamed, report)

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
        report = SourceReport(f"{count} observations of noise", noise=True)
        return cls(
            (
                {
                    "images": {
                        name: generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                        for name in cameras
                    },
                    "state": generator.uniform(-1.0, 1.0, state_dim).astype(np.float32),
                    "prompt": "open the door",  # words that every tokenizer here knows
                }
                for _ in range(count)
            ),
            report,
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
        """Run the policy in a simulator and keep every ``every``-th observation it acted on.

        Args:
            env: a ``gymnasium.Env`` with the policy's observations (docs/evaluate-your-robot.md).
            episodes: how many.
            execute: actions carried out of each chunk.
            seed: of the first episode, and of its noise.
        """
        kept: list[Observation] = []
        limits = action_limits(env)
        for episode in range(episodes):
            observation: Observation | None = begin(env, seed + episode)
            generator = torch.Generator().manual_seed(seed + episode)
            number = 0
            while observation is not None:
                if number % every == 0:
                    kept.append(observation)
                number += 1
                chunk = policy.sample_actions(observation, generator=generator)
                observation = carry_out(env, np.clip(chunk[:execute], *limits)).observation
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


def stream_npz_folder(folder: Path, split: str | None) -> Streamed:
    """The observations of all npz files of a folder, one file in memory at a time.

    Raises:
        ObservationError: no npz file, an unreadable one, different cameras or state widths, or no
            observation of the split in any of them.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ObservationError(
            f"cannot read observations from {folder}: it has neither meta/info.json, as a LeRobot "
            "dataset has, nor any .npz file"
        )
    places: list[tuple[Path, int]] = []
    digests: list[bytes] = []
    forms: dict[tuple[object, ...], Path] = {}
    splits: set[str] = set()
    for path in paths:
        arrays = _load_npz(path)
        splits |= _splits(arrays)
        for i, item in enumerate(_unstack(arrays, split, path)):
            places.append((path, i))
            digests.append(content_digest(item))
            forms.setdefault((*sorted(item["images"]), np.shape(item["state"])), path)
    if len(forms) > 1:
        (one, first), (other, second), *_ = forms.items()
        raise ObservationError(
            f"{first} and {second} do not fit together: cameras and state are {one} and {other}"
        )
    if not digests:
        _refuse_empty(split, splits, folder)
    recent: dict[Path, list[Observation]] = {}

    def read(number: int) -> Observation:
        path, i = places[number]
        if path not in recent:
            recent.clear()
            recent[path] = _unstack(_load_npz(path), split, path)
        return recent[path][i]

    return Streamed(read, digests)


def _unstack(arrays: Mapping[str, np.ndarray], split: str | None, where: Path) -> list[Observation]:
    """The rows of a file that belong to a split; all of them if it does not tell splits apart."""
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
    return [
        {
            "images": {name: images[i] for name, images in cameras.items()},
            "state": arrays["state"][i],
            **{key: str(arrays[key][i]) for key in _TEXT if key in arrays},
        }
        for i in rows
    ]


def _splits(arrays: Mapping[str, np.ndarray]) -> set[str]:
    return {str(value) for value in arrays.get("split", ())}


def _refuse_empty(split: str | None, known: set[str], where: Path) -> NoReturn:
    if split is not None and known:
        raise ObservationError(f"{where} has no split {split!r}; it has {sorted(known)}")
    raise ObservationError(f"{where} has no observations; calibration needs at least one")


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


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        return _read_npz(path)
    except _UNREADABLE as error:
        raise ObservationError(f"cannot read observations from {path}: {error}") from error


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
    with (
        new_file(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())
