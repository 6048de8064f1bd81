"""``doctor``: what is missing is no fault, what is there and does not work is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omega_qvla.cli import main
from omega_qvla.evaluation import machine

pytestmark = pytest.mark.long


def doctor(*more: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *more])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two extras, of which one cannot be installed; no simulator is started."""
    known = {"report": ["jinja2>=3.1"], "scale": ["no-such-package-of-anyone>=1"]}
    monkeypatch.setattr(machine, "extras", lambda: known)
    return monkeypatch


def test_a_machine_without_extras_is_well(
    bare: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "doctor.json"
    assert doctor("--json", str(target), "--disk", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "everything that is installed works" in shown and "pip install" in shown
    found = json.loads(target.read_text())
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert found["ok"] and states["extra report"] == "ok" and states["extra scale"] == "absent"
    assert {"versions", "kernels", "threads", "memory", "disk", "GPU"} <= set(states)


def test_a_package_that_cannot_be_imported_is_broken(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"{name} wants another version of markupsafe")

    bare.setattr(machine, "import_module", refuse)
    assert doctor() == 1
    shown = capsys.readouterr().out
    assert "1 broken" in shown and "wants another version of markupsafe" in shown


def test_a_kernel_with_other_results_is_broken(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.setattr(machine, "_agrees", lambda kernel: kernel == "generic")
    if machine.cpu.instruction_sets() in ([], ["generic"]):
        pytest.skip("this machine has no other kernel")
    assert doctor() == 1
    assert "other results than the reference kernel" in capsys.readouterr().out


def test_a_disk_that_is_not_there_is_named(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--disk", "no/such/folder") == 1
    assert "no/such/folder" in capsys.readouterr().out
