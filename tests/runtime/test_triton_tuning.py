"""Tilings: candidates fit every shape; choices are measured once, kept, and checked when read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.errors import ResourceError
from omega_qvla.runtime.kernels.triton_tuning import (
    SPLIT_ROWS,
    Tiling,
    Tuner,
    candidates,
    first_guess,
    rounded_rows,
)

IDENTITY = {"gpu": "NVIDIA H200 141GB", "triton": "3.7.1", "programs": "abc"}
SHAPE = (10, 4096, 1024)


class Stopwatch:
    """Says how long each tiling takes, and counts how often it was asked."""

    def __init__(self, cost: Callable[[Tiling], float]) -> None:
        self.cost, self.asked = cost, 0
        self.last: Tiling | None = None

    def run(self, tiling: Tiling) -> None:
        self.last = tiling

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        self.asked += 1
        assert self.last is not None
        return self.cost(self.last)


def tuner(folder: Path, watch: Stopwatch, **changes: str) -> Tuner:
    return Tuner(folder, IDENTITY | changes, 132, watch.seconds)


shapes = st.tuples(st.integers(1, 4096), st.integers(1, 40000), st.integers(1, 20000))


@given(shape=shapes, processors=st.integers(1, 200))
def test_candidates_cover_every_byte_of_a_row_and_split_only_few_rows(
    shape: tuple[int, int, int], processors: int
) -> None:
    width = -(-shape[2] // 128) * 128
    found = candidates(shape, processors)
    assert found[0] == first_guess(shape, processors)
    assert len(set(found)) == len(found) <= 16
    for tiling in found:
        assert Tiling.parse(vars(tiling)) == tiling
        share = tiling.share(width)
        assert share * tiling.parts >= width // 2 and share % tiling.bytes == 0
        assert tiling.parts == 1 or shape[0] <= SPLIT_ROWS


def test_few_rows_are_cut_along_k_until_the_gpu_is_busy() -> None:
    tiling = first_guess(SHAPE, 132)
    assert tiling.parts == 2 and -(-4096 // tiling.outputs) * tiling.parts <= 132
    assert first_guess((10, 1024, 4096), 132).parts == 8
    assert first_guess((968, 1024, 4096), 132).parts == 1


@given(count=st.integers(1, 5000))
def test_rows_are_counted_in_powers_of_two(count: int) -> None:
    rounded = rounded_rows(count)
    assert rounded >= max(16, count) and rounded & (rounded - 1) == 0
    assert rounded == 16 or rounded < 2 * count


def test_the_fastest_is_chosen_measured_once_and_read_by_the_next_process(tmp_path: Path) -> None:
    watch = Stopwatch(lambda tiling: 1.0 if tiling.outputs == 128 else 2.0)
    first = tuner(tmp_path / "new" / "folder", watch)
    chosen = first.choose(SHAPE, watch.run)
    assert chosen.outputs == 128
    asked = watch.asked
    assert first.choose((12, *SHAPE[1:]), watch.run) == chosen  # the same power of two
    assert tuner(tmp_path / "new" / "folder", watch).choose(SHAPE, watch.run) == chosen
    assert watch.asked == asked > 1


def test_products_that_end_in_a_gate_have_tilings_of_their_own(tmp_path: Path) -> None:
    watch = Stopwatch(lambda tiling: float(tiling.outputs))
    chosen = tuner(tmp_path, watch)
    assert chosen.choose(SHAPE, watch.run).outputs == 64
    asked, watch.cost = watch.asked, lambda tiling: -float(tiling.outputs)
    assert chosen.choose(SHAPE, watch.run, gated=True).outputs == 128
    assert watch.asked == 2 * asked
    assert chosen.choose(SHAPE, watch.run).outputs == 64
    assert tuner(tmp_path, watch).choose(SHAPE, watch.run, gated=True).outputs == 128


@pytest.mark.parametrize("change", [{"triton": "3.8.0"}, {"programs": "def"}])
def test_choices_measured_with_something_else_are_measured_again(
    tmp_path: Path, change: dict[str, str]
) -> None:
    watch = Stopwatch(lambda tiling: tiling.outputs)
    tuner(tmp_path, watch).choose(SHAPE, watch.run)
    asked = watch.asked
    tuner(tmp_path, watch, **change).choose(SHAPE, watch.run)
    assert watch.asked == 2 * asked


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        "not json",
        '{"schema": 1, "identity": IDENTITY, "tilings": {"a": 3}}',
        '{"schema": 1, "identity": IDENTITY, "tilings": {"a": {"rows": 17}}}',
        '{"schema": 1, "identity": IDENTITY, "tilings": {"a": {"rows": 16, "outputs": 64, '
        '"bytes": 64, "parts": 10000, "warps": 4, "stages": 3}}}',
    ],
)
def test_a_damaged_file_is_said_aloud_and_replaced(tmp_path: Path, damage: str) -> None:
    watch = Stopwatch(lambda tiling: tiling.outputs)
    path = tuner(tmp_path, watch).path
    path.write_text(damage.replace("IDENTITY", json.dumps(IDENTITY)), encoding="utf-8")
    with pytest.warns(UserWarning, match="measured again"):
        again = tuner(tmp_path, watch)
    again.choose(SHAPE, watch.run)
    assert json.loads(path.read_text("utf-8"))["identity"] == IDENTITY


def test_a_tiling_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    def run(tiling: Tiling) -> None:
        if tiling.outputs == 64:
            raise RuntimeError("out of resource: shared memory")
        watch.run(tiling)

    watch = Stopwatch(lambda _: 1.0)
    assert tuner(tmp_path, watch).choose(SHAPE, run).outputs == 128


def test_when_none_runs_the_reason_is_given(tmp_path: Path) -> None:
    def run(_: Tiling) -> None:
        raise RuntimeError("no kernel image")

    watch = Stopwatch(lambda _: 1.0)
    with pytest.raises(ResourceError, match="no kernel image"):
        tuner(tmp_path, watch).choose(SHAPE, run)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ResourceError, match="cannot keep tilings"):
        tuner(tmp_path / "file" / "below", Stopwatch(lambda _: 1.0))
