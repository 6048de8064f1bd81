"""What the server's measurements share: bars, and one JSON that anybody can read."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KIT = Path(__file__).parents[2] / "benchmarks" / "serving_kit.py"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_kit_tested", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def strictly(path: Path) -> dict[str, Any]:
    """A document, by a reader that knows no NaN."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_passes_no_bar_and_is_null(kit: ModuleType, missing: Any) -> None:
    for bar in (kit.at_most, kit.at_least):
        for measured, limit in ((missing, 1.0), (1.0, missing), (missing, missing)):
            found = bar("it", measured, limit)
            assert not found["passed"]
            given = (found["measured"], found.get("at_most", found.get("at_least")))
            assert given == (
                None if measured is missing else 1.0,
                None if limit is missing else 1.0,
            )
    assert kit.at_most("it", 1, 1)["passed"] and kit.at_least("it", 1, 1)["passed"]
    assert not kit.at_most("it", 2, 1)["passed"] and not kit.at_least("it", 0, 1)["passed"]


def test_a_run_without_answers_is_written_read_again_and_fails(
    kit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    document = kit.resumed(out, {"clients": 1})
    assert strictly(out)["parts"] == {}, "a path that cannot be written to is found out at once"
    ran: list[str] = []

    def nobody_answered() -> Any:
        ran.append("once")
        return {"latency": kit.quantiles([]), "drain": [math.inf]}

    expected = {
        "latency": {"count": 0, "p50_ms": None, "p99_ms": None, "max_ms": None},
        "drain": [None],
    }
    for _ in range(2):  # measured, then continued
        parts = kit.measure_missing(out, document, {"alone": nobody_answered})
        assert parts["alone"] == expected == strictly(out)["parts"]["alone"]
        document = kit.resumed(out, {"clients": 1})
    assert ran == ["once"]
    document["bars"] = [kit.at_most("p99 ms", parts["alone"]["latency"]["p99_ms"], 2.0)]
    with pytest.raises(SystemExit) as failed:
        kit.finish(out, document)
    assert failed.value.code == 1 and "FAIL  p99 ms: nan ≤ 2" in capsys.readouterr().out
    assert strictly(out)["bars"][0]["measured"] is None
    with pytest.raises(SystemExit, match="other settings"):
        kit.resumed(out, {"clients": 2})
