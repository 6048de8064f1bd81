"""LoRA adapters to a pi05 that LeRobot and peft write, apart and merged, beside LeRobot itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from lerobot_cases import CASES
from lerobot_parity import HEADER, compare, know_small_tower, read_record
from lerobot_records import write_records
from lora_cases import POLICY_ADAPTERS

pytestmark = pytest.mark.lerobot


@pytest.fixture(scope="module")
def records(lerobot_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the base's record and those of every adapter to it, written anew."""
    folder = tmp_path_factory.mktemp("adapters")
    write_records(lerobot_python, folder, [CASES[0].name])
    script = Path(__file__).with_name("record_adapters.py")
    job = json.dumps({"records": str(folder)})
    subprocess.run([lerobot_python, script], input=job, text=True, check=True)
    return folder


@pytest.mark.parametrize("kind", ["", "-merged"])
@pytest.mark.parametrize("name", POLICY_ADAPTERS)
def test_an_adapter_computes_what_lerobot_computes(
    name: str, kind: str, records: Path, table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    know_small_tower(monkeypatch)
    folder = records / f"adapter-{name}{kind}"
    found = compare(folder / "checkpoint", read_record(folder / "record.safetensors"), CASES[0])
    table.extend([found.row(folder.name)] if table else [HEADER, found.row(folder.name)])
    assert found.within_bounds(), found
