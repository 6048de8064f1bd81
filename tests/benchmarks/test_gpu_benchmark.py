"""``make bench-gpu`` without a GPU: what it says, and that no part can take the others with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_parts
import pytest
import torch
from gpu_checks import MismatchError
from gpu_quantizing import compare_quantizing, measure_quantizing
from gpu_speed import (
    compare_actions,
    measure_chunks,
    time_chunk,
    with_and_without_graph,
)
from graph_recorder import Recorder

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.speed.policy_speed import PARTS
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy, Pass
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.runtime.bfloat16 import bfloat16_pass, in_bfloat16
from omega_qvla.runtime.graph import GraphWarning
from omega_qvla.runtime.kernels import triton_gpu as gpu
from omega_qvla.runtime.load import load
from omega_qvla.runtime.prediction import predict

pytestmark = pytest.mark.emulated

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu as loaded  # pyright: ignore[reportMissingImports]

    yield loaded
    for name in ("gpu", "random_artifact"):
        sys.modules.pop(name, None)


def test_without_a_gpu_it_says_so_and_writes_nothing(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def none(device: str) -> gpu.Gpu:
        raise ResourceError(f"device {device!r}: PyTorch sees 0 GPUs")

    monkeypatch.setattr(gpu, "find", none)
    assert script.main(tmp_path / "results") == 3
    assert "no GPU to measure" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_all_parts_together_take_at_most_ten_minutes(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that hangs is ended when the time of all is over, and what is left is not begun."""
    assert script.TOTAL_SECONDS == 600
    parts = [
        script.Part(name, getattr(bench_parts, kind), 60)
        for name, kind in (("first", "hangs"), ("second", "finishes"))
    ]
    document: dict[str, Any] = {"unfinished": {}}
    script.run_parts(parts, tmp_path, document, 7)
    assert document["unfinished"] == {
        "first": "not finished after 7 s",
        "second": "not begun: the 7 s of all were over",
    }
    assert capsys.readouterr().out == "first: at most 7 s\n"
    document = {"unfinished": {}}
    script.run_parts(parts[1:], tmp_path, document, 600)
    assert document["rows"] == [1, 2] and not document["unfinished"]


def test_quantizing_is_compared_by_how_wrong_the_actions_become() -> None:
    """The processor with itself: the same words; and a bound that bites."""
    found = compare_quantizing("builtin:tiny-pi05", "cpu", "rtn")
    assert found["words_equal"] == 1.0
    assert found["action_error_cpu"] == found["action_error_gpu"] > 0.0
    with pytest.raises(MismatchError, match="with rtn: quantized on cpu"):
        compare_quantizing("builtin:tiny-pi05", "cpu", "rtn", most=0.5)


def test_quantizing_says_how_far_it_is_before_every_site(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    measure_quantizing("random:tiny-pi05", "cpu", tmp_path / "journal", rows.append)
    count = rows[0]["sites"]
    assert [row["sites_done"] for row in rows] == [*range(count), count]
    assert [row["finished"] for row in rows] == [False] * count + [True]
    assert rows[0]["share_of_work"] == 0.0 and rows[-1]["share_of_work"] == 1.0
    assert rows[0]["seconds_until_first_site"] == pytest.approx(60 * rows[0]["minutes"])
    assert rows[0]["minutes"] < rows[-1]["minutes"]
    assert rows[-1]["gpu_bytes_asked"] > 1 << 30 and rows[-1]["gpu_bytes_peak"] is None


def test_a_part_that_fails_hangs_or_dies_keeps_what_it_found_and_says_why(
    script: ModuleType, tmp_path: Path
) -> None:
    document: dict[str, Any] = {"unfinished": {}}
    for name in ("finishes", "refuses", "breaks", "dies"):
        part = script.Part(name, getattr(bench_parts, name), 60)
        script.run_part(part, tmp_path, document)
    script.run_part(script.Part("hangs", bench_parts.hangs, 5), tmp_path, document)
    assert document["rows"][:3] == [1, 2, 3]
    assert document["checks"] == {"a": 1} and document["memory_gbytes"] == 3.0
    assert document["unfinished"] == {
        "refuses": "not enough of anything",
        "breaks": "ZeroDivisionError: by nothing",
        "dies": "its process ended without a word; most likely out of memory",
        "hangs": "not finished after 5 s",
    }


@pytest.mark.parametrize("policy", ["random:tiny-pi05", "random:tiny-gr00t"])
def test_actions_are_compared_on_the_same_observation_and_noise(
    policy: str, script: ModuleType, tmp_path: Path
) -> None:
    """The processor with itself: the same integers, so the same actions; and a bound that bites."""
    source = script.random_artifact(policy).save_pretrained(tmp_path / "tiny")
    assert compare_actions(source, "cpu") == {"action_error_against_cpu": 0.0}
    with pytest.raises(MismatchError, match="differ by"):
        compare_actions(source, "cpu", most=-1.0)


@pytest.mark.parametrize("recipe", [DEFAULT_RECIPE, "omega-w4a4-static"])
def test_random_integers_take_the_bytes_of_quantized_ones(
    recipe: str, script: ModuleType, tmp_path: Path
) -> None:
    policy = "random:tiny-gr00t"
    source = script.random_artifact(policy, recipe).save_pretrained(tmp_path / "random")
    predicted = predict(load_policy(policy), Recipe.load(recipe))
    assert load(source).memory_report() == predicted


def test_integers_that_cannot_be_drawn_are_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="recipe 'svdquant': cannot draw what it stores of"):
        script.random_artifact("random:tiny-pi05", "svdquant")


def test_the_parts_of_a_chunk_add_up(small_policy: NativePolicy, few: Any) -> None:
    times = time_chunk(small_policy, few[0])
    assert set(times) == set(PARTS)
    parts = sum(times[part] for part in PARTS if part != "total_ms")
    assert times["total_ms"] == pytest.approx(parts)
    assert not torch.cuda.is_initialized()


def test_chunks_with_and_without_a_graph_take_turns(small_policy: NativePolicy, few: Any) -> None:
    """Every subject runs twice untimed, then once per round; graphs are captured untimed."""
    order: list[str] = []

    def called(name: str, run: Pass) -> Pass:
        def note(*arguments: Any) -> torch.Tensor:
            order.append(name)
            return run(*arguments)

        return note

    recorder = Recorder()
    full = in_bfloat16(small_policy, "cpu")
    with pytest.warns(GraphWarning):
        pair = with_and_without_graph("bf16", full, bfloat16_pass(full), recorder)
        subjects = {k: replace(v, run=called(k, v.run)) for k, v in pair.items()}
        rows = measure_chunks("small", subjects, few[0], rounds=3)
    eager, graph = "bf16 eager", "bf16 graph"
    assert order == [eager, eager, graph, graph, *[eager, graph] * 3]
    assert recorder.captured == 1 and recorder.replayed == 5
    assert [row["subject"] for row in rows] == [eager, graph]
    parameters = sum(p.numel() for p in full.module.parameters())
    assert all(row["weight_bytes"] == 2 * parameters and row["chunk_ms"] > 0 for row in rows)
