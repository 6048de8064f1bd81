"""A short run of the request fuzzer; ``make fuzz`` runs the full counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

KIT = Path(__file__).parents[2] / "benchmarks" / "fuzz_wire.py"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    for package in ("websockets", "zmq"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    spec = importlib.util.spec_from_file_location("fuzz_wire", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_wire"] = module
    spec.loader.exec_module(module)
    return module


def test_malformed_requests_end_in_our_errors(kit: ModuleType) -> None:
    """Decoder and specification: no other exception, nothing slow, both outcomes occur."""
    result = kit.run_parser(3000, seed=11)
    assert result.problems == []
    assert result.rounds == 3000 and result.accepted > 100
    assert result.codes["malformed"] > 500 and result.codes["bad_request"] > 100


def test_a_server_answers_every_malformed_request(kit: ModuleType) -> None:
    """A real server: each is answered, and good requests in between get their actions."""
    result = kit.run_live(300, seed=11)
    assert result.problems == []
    assert result.rounds == 300 and result.codes["malformed"] > 100
