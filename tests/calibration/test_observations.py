"""Observation sets: files, fingerprints and refusals."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.calibration.observations import Observations, as_observations
from omega_qvla.calibration.streamed import Streamed
from omega_qvla.errors import ObservationError


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return bool(np.array_equal(left, right))


@pytest.fixture
def saved(observations: Observations, tmp_path: Path) -> Path:
    observations.save_npz(tmp_path / "o.npz")
    return tmp_path / "o.npz"


def test_a_saved_set_comes_back_the_same(observations: Observations, saved: Path) -> None:
    loaded = Observations.from_npz(saved)
    assert len(loaded) == len(observations)
    assert all(same(dict(a), dict(b)) for a, b in zip(loaded, observations, strict=True))
    assert loaded.fingerprint == observations.fingerprint


def test_a_reader_that_fails_is_an_error_and_not_the_end_of_the_observations() -> None:
    items = [{"state": np.full(2, i, np.float32)} for i in range(4)]
    broken: set[int] = set()

    def read(number: int) -> dict[str, Any]:
        if number in broken:
            raise IndexError("from inside")
        return items[number]

    digests = [content_digest(item) for item in items]
    assert len(list(Observations(Streamed(read, digests)))) == 4
    broken.add(2)
    with pytest.raises(IndexError, match="from inside"):
        list(Observations(Streamed(read, digests)))


def test_writing_again_gives_the_same_bytes(
    observations: Observations, saved: Path, tmp_path: Path
) -> None:
    observations.save_npz(tmp_path / "again.npz")
    Observations.from_npz(saved).save_npz(tmp_path / "loaded.npz")
    expected = saved.read_bytes()
    assert (tmp_path / "again.npz").read_bytes() == expected
    assert (tmp_path / "loaded.npz").read_bytes() == expected
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz"] * 3


def test_splits_are_told_apart(observations: Observations, tmp_path: Path) -> None:
    names = ["calibration", "heldout", "calibration"]
    marked = [{**o, "split": s} for o, s in zip(observations, names, strict=True)]
    Observations(marked).save_npz(tmp_path / "o.npz")
    assert len(Observations.load(tmp_path / "o.npz")) == 2
    (held,) = Observations.load(tmp_path / "o.npz", split="heldout")
    assert np.array_equal(held["state"], observations[1]["state"])
    with pytest.raises(ObservationError, match=r"no split 'test'.*calibration.*heldout"):
        Observations.load(tmp_path / "o.npz", split="test")


def test_spread_is_even_and_keeps_both_ends() -> None:
    everything = Observations({"i": i} for i in range(11))
    assert [item["i"] for item in everything.spread(3)] == [0, 5, 10]
    assert everything.spread_indices(99) == list(range(11))
    assert len(everything[2:5]) == 3


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": np.zeros(2)}, {"a": np.zeros((2, 1))}),
        ({"a": np.zeros(2, np.float32)}, {"a": np.zeros(2, np.float64)}),
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a": torch.tensor(2**24)}, {"a": torch.tensor(2**24 + 1)}),
        ({"a": torch.zeros(2).bfloat16()}, {"a": torch.zeros(2).half()}),
        ({"a": [1, [2]]}, {"a": [1, 2]}),
    ],
)
def test_different_contents_have_different_fingerprints(left: Any, right: Any) -> None:
    assert Observations([left]).fingerprint != Observations([right]).fingerprint


def test_equal_contents_have_equal_fingerprints_wherever_they_lie() -> None:
    words = [np.array(["ab", "c" * n], dtype=object) for n in (3, 3)]
    first, second = ({"b": torch.ones(2), "a": w} for w in words)
    assert Observations([first]).fingerprint == Observations([second]).fingerprint
    swapped = dict(reversed(list(first.items())))
    assert Observations([swapped]).fingerprint == Observations([first]).fingerprint


def test_empty_sets_and_other_things_are_refused() -> None:
    with pytest.raises(ObservationError, match="at least one"):
        Observations([])
    with pytest.raises(ObservationError, match="observation 1 is int"):
        Observations([{}, 3])  # type: ignore[list-item]
    with pytest.raises(ObservationError, match="iterable"):
        as_observations(None)  # type: ignore[arg-type]
    with pytest.raises(ObservationError, match="tiny-pi05"):
        Observations.load("builtin:nothing")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(data: Any) -> None:
    content = bytearray(_EXAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = _FOLDER / "damaged.npz"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        Observations.from_npz(path)
    except ObservationError as error:
        assert "damaged.npz" in str(error)


@pytest.fixture(scope="module", autouse=True)
def _example(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _EXAMPLE, _FOLDER  # noqa: PLW0603 - hypothesis tests cannot take fixtures per example
    _FOLDER = tmp_path_factory.mktemp("damaged")
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    item = {"images": {"base": image}, "state": np.zeros(2), "prompt": "go"}
    Observations([item]).save_npz(_FOLDER / "whole.npz")
    _EXAMPLE = (_FOLDER / "whole.npz").read_bytes()


_EXAMPLE, _FOLDER = b"", Path()


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return path


IMAGES, STATE, PROMPT = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 3)), np.array(["a", "b"])


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"state": STATE, "prompt": PROMPT}, "images/<camera>"),
        ({"images__base": IMAGES, "prompt": PROMPT}, "state"),
        ({"images__base": IMAGES, "state": STATE[:1], "prompt": PROMPT}, "differ in length"),
        ({"images__base": IMAGES, "state": np.zeros(()), "prompt": PROMPT}, "differ in length"),
        ({"images__base": IMAGES[:0], "state": STATE[:0], "prompt": PROMPT[:0]}, "at least one"),
        ({"images__base": np.array([{}, {}]), "state": STATE, "prompt": PROMPT}, "allow_pickle"),
    ],
)
def test_a_file_with_wrong_arrays_is_refused(
    arrays: dict[str, np.ndarray], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ObservationError, match=expected):
        Observations.from_npz(write_arrays(tmp_path / "o.npz", **arrays))


def test_files_that_are_no_archive_of_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "single.npy", IMAGES)
    (tmp_path / "text.npz").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("images/base", b"not an array")
    for name in ("single.npy", "text.npz", "zip.npz", "missing.npz", "."):
        with pytest.raises(ObservationError, match="cannot read observations"):
            Observations.from_npz(tmp_path / name)


class Line:
    """A robot on a line: every action moves it, an episode ends after six."""

    action_space = SimpleNamespace(low=np.float32([-1]), high=np.float32([1]))

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert seed is not None
        self.seeds.append(seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self) -> dict[str, Any]:
        return {"images": {}, "state": np.zeros(1), "prompt": "go", "steps": self.steps}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observe(), 0.0, False, self.steps == 6, {"is_success": False}

    def close(self) -> None:
        pass


class Still:
    def sample_actions(self, *_arguments: Any, **_options: Any) -> np.ndarray:
        return np.zeros((4, 1), np.float32)


def test_rollouts_keep_every_nth_observation_that_was_acted_on() -> None:
    line = Line()
    kept = Observations.from_rollouts(
        Still(),  # type: ignore[arg-type]
        line,
        episodes=2,
        every=2,
        execute=2,
        seed=5,
    )
    assert [item["steps"] for item in kept] == [0, 4, 0, 4]
    assert line.seeds == [5, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of three and two observations."""
    source = np.random.default_rng(0)
    for name, count in (("b", 2), ("a", 3)):
        Observations(
            {
                "images": {"base": source.integers(0, 256, (4, 4, 3), dtype=np.uint8)},
                "state": source.uniform(-1, 1, 3).astype(np.float32),
                "prompt": f"{name}{i}",
            }
            for i in range(count)
        ).save_npz(tmp_path / f"{name}.npz")
    return tmp_path


def test_a_folder_of_files_is_their_observations_in_the_order_of_names(folder: Path) -> None:
    together = Observations.load(folder)
    assert [o["prompt"] for o in together] == ["a0", "a1", "a2", "b0", "b1"]
    apart = [*Observations.load(folder / "a.npz"), *Observations.load(folder / "b.npz")]
    assert together.fingerprint == Observations(apart).fingerprint
    assert [o["prompt"] for o in together.spread(3)] == ["a0", "a2", "b1"]


def test_a_folder_keeps_one_file_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Observations.load(folder)
    opened: list[str] = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **kw: opened.append(path.name) or load(path, **kw))
    assert len(list(together)) == 5
    assert opened == ["a.npz", "b.npz"]


def test_files_of_a_folder_that_do_not_fit_together_are_refused(folder: Path) -> None:
    write_arrays(folder / "c.npz", images__base=IMAGES, state=np.zeros((2, 7)), prompt=PROMPT)
    with pytest.raises(ObservationError, match=r"a\.npz and .*c\.npz do not fit together"):
        Observations.load(folder)
    (folder / "c.npz").write_text("hello")
    with pytest.raises(ObservationError, match=r"cannot read observations from .*c\.npz"):
        Observations.load(folder)


def test_splits_may_lie_in_different_files_of_a_folder(folder: Path) -> None:
    for name in ("calibration", "heldout"):
        marked = [{**o, "split": name} for o in Observations.from_npz(folder / "a.npz")]
        Observations(marked).save_npz(folder / f"{name}.npz")
    for name in ("a", "b"):
        (folder / f"{name}.npz").unlink()
    assert len(Observations.load(folder)) == len(Observations.load(folder, split="heldout")) == 3
    with pytest.raises(ObservationError, match=r"no split 'test'.*calibration.*heldout"):
        Observations.load(folder, split="test")
