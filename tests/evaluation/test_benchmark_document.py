"""What a run of the benchmark says of itself, and what of it is missing."""

from __future__ import annotations

import itertools
import json

import pytest

from omega_qvla.cli import main
from omega_qvla.evaluation.benchmark import (
    BENCHMARK,
    METHODS,
    benchmark_document,
    missing_cells,
)
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Comparison, Row

pytestmark = pytest.mark.long

CONDITIONS = ("plain", "stress:10", "stress:30", "stress:100")


def row(policy: str, condition: str, recipe: str, episodes: int = 400) -> Row:
    """An invented row; only its cell and its size count here."""
    unmeasured = {name: None for name, field in Row.model_fields.items() if field.is_required()}
    return Row.model_validate(
        {
            **unmeasured,
            "policy": f"builtin:{policy}",
            "condition": condition,
            "recipe": recipe,
            "realizable": True,
            "success": {"open": [0, episodes]},
            "seeds": [],
            "episodes": episodes,
            "noises": 8,
            "smoke": False,
        }
    )


def all_rows() -> list[Row]:
    return [row(*cell) for cell in itertools.product(BENCHMARK.policies, CONDITIONS, METHODS)]


def test_a_whole_run_misses_nothing_and_names_its_definition() -> None:
    rows = all_rows()
    halves = [Comparison(policy="p", rows=part) for part in (rows[:40], rows[40:])]
    document = benchmark_document(BENCHMARK, halves, machine="m", library="l", command="c")
    assert document.rows == rows
    assert document.to_json()["benchmark"] == {
        "version": "v1",
        "definition": BENCHMARK.fingerprint,
        "machine": "m",
        "library": "l",
        "command": "c",
        "missing": [],
    }


def test_what_is_missing_is_named() -> None:
    rows = [r for r in all_rows() if r.condition != "stress:10" or "pi05" not in r.policy]
    rows.remove(row("tiny-gr00t", "plain", "gptq"))
    rows[rows.index(row("tiny-gr00t", "plain", "rtn"))] = row("tiny-gr00t", "plain", "rtn", 399)
    hurried = row("tiny-gr00t", "stress:100", "quarot")
    rows[rows.index(hurried)] = hurried.model_copy(update={"noises": 2})
    assert missing_cells(BENCHMARK, rows) == [
        "builtin:tiny-pi05, stress:10",
        "builtin:tiny-gr00t, plain, rtn",
        "builtin:tiny-gr00t, plain, gptq",
        "builtin:tiny-gr00t, stress:100, quarot",
    ]


def test_a_policy_that_is_not_the_benchmarks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--policies", "tiny-pi05,huge"])
    assert exit_info.value.code == 2
    assert "tiny-pi05, tiny-gr00t" in capsys.readouterr().err


def test_a_quick_run_of_one_method(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policies", "tiny-gr00t", "--recipes", "rtn", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--quick", *arguments])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "benchmark-v1-quick.json").read_text())
    head = document["benchmark"]
    assert head["command"] == "omega-qvla benchmark --quick --policies tiny-gr00t --recipes rtn"
    assert head["definition"] != BENCHMARK.fingerprint
    results = load_comparison(tmp_path / "benchmark-v1-quick.json").rows
    assert [(r.recipe, r.condition, r.episodes) for r in results] == [
        ("fp32", "plain", 8),
        ("rtn", "plain", 8),
        ("rtn", "stress:30", 8),
    ]
    assert "not measured: builtin:tiny-pi05, plain" in printed
    assert "not measured: builtin:tiny-gr00t, stress:30, quarot" in printed
    assert "rtn" not in " ".join(head["missing"])
