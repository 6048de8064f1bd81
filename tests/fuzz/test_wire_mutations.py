"""A short run of the request fuzzer; ``make fuzz`` runs the full counts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.long

KIT = Path(__file__).parents[2] / "benchmarks" / "fuzz_wire.py"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    for package in ("websockets", "zmq", "msgpack"):
        pytest.importorskip(package, reason="the extras serve and dev are not both installed")
    sys.path.append(str(KIT.parent))  # for what the measurements share
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


@pytest.mark.parametrize("protocol", ["websocket", "gr00t"])
def test_a_server_answers_every_malformed_request(kit: ModuleType, protocol: str) -> None:
    """A real server: each is answered, good requests in between get their actions, and one message
    beyond the limit of 16 MB ends its own connection only."""
    result = kit.PARTS[protocol](300, seed=11)
    assert result.problems == []
    assert result.rounds == 300 and result.codes["malformed"] > 80 and result.oversize == 1


def test_a_run_that_was_ended_early_continues_where_it_was(
    kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "BLOCKS", {"parser": 200, "websocket": 20, "gr00t": 20})
    out = tmp_path / "fuzz.json"
    command = ["fuzz_wire.py", "--count", "500", "--live", "30", "--jobs", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    with pytest.raises(SystemExit) as early:
        kit.main()
    assert early.value.code == 1
    monkeypatch.setattr(sys, "argv", command)
    kit.main()
    parts = json.loads(out.read_text())["parts"]
    assert parts["parser"]["refused"] >= 500 and parts["parser"]["blocks"] >= 3
    assert parts["parser"]["rounds"] == 200 * parts["parser"]["blocks"]
    before = out.read_text()
    kit.main()
    assert json.loads(out.read_text())["parts"] == json.loads(before)["parts"]
