"""The command line as a user meets it: what is printed, what is written, the exit status."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.artifact import read_artifact, write_artifact
from omega_qvla.cli import main
from omega_qvla.cli.screen import Pace
from omega_qvla.errors import ArtifactError

pytestmark = pytest.mark.long

POLICY = "builtin:tiny-pi05"
no_ray = find_spec("ray") is None
DRY = ("quantize", "--out", "x", "--dry-run")


def run(*arguments: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    code = stop.value.code
    return code if isinstance(code, int) else 1


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded policy quantized with the quickest recipe, through the command line."""
    folder = tmp_path_factory.mktemp("cli") / "artifact"
    assert run("quantize", POLICY, "--out", str(folder), "--recipe", "rtn") == 0
    return folder


def test_quantize_leaves_an_artifact_and_no_journal(artifact: Path) -> None:
    assert (artifact / "omega_config.json").is_file()
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["artifact"]


def test_inspect_prints_the_table_and_writes_the_contract_keys(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "inspect.json"
    assert run("inspect", str(artifact), "--json", str(result)) == 0
    shown = capsys.readouterr().out
    assert "whole checkpoint" in shown and "paper's count" in shown
    report = json.loads(result.read_text())
    assert {"schema", "components", "total_bytes", "reference_bytes", "reduction"} <= set(report)
    assert {"paper_scope_reduction", "recipe", "kernel", "sites"} <= set(report)
    on_disk = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    assert report["total_bytes"] == on_disk
    assert sum(row["bytes"] for row in report["components"]) == on_disk


def test_dry_run_predicts_what_is_then_stored(artifact: Path, tmp_path: Path) -> None:
    predicted, real = tmp_path / "predicted.json", tmp_path / "real.json"
    arguments = ("quantize", POLICY, "--out", str(tmp_path / "never"), "--recipe", "rtn")
    assert run(*arguments, "--dry-run", "--json", str(predicted)) == 0
    assert run("inspect", str(artifact), "--json", str(real)) == 0
    assert not (tmp_path / "never").exists()
    before, after = (json.loads(path.read_text()) for path in (predicted, real))
    assert before["total_bytes"] == pytest.approx(after["total_bytes"], rel=0.01)
    assert [row["name"] for row in before["components"]] == [
        row["name"] for row in after["components"]
    ]
    for first, second in zip(before["components"], after["components"], strict=True):
        assert first["bytes"] == pytest.approx(second["bytes"], rel=0.01), first["name"]


@pytest.mark.parametrize(
    ("embodiment", "least", "most"), [((), 0.62, 0.66), (("--embodiment", "7"), 0.75, 0.78)]
)
def test_dry_run_says_what_one_embodiment_saves(
    embodiment: tuple[str, ...], least: float, most: float, tmp_path: Path
) -> None:
    result = tmp_path / "predicted.json"
    arguments = ("quantize", "random:gr00t-n1.5", "--out", "x", "--dry-run", "--json", str(result))
    assert run(*arguments, *embodiment) == 0
    assert least <= json.loads(result.read_text())["reduction"] <= most


def test_verify_passes_on_an_intact_artifact_and_names_a_flipped_bit(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", str(artifact)) == 0
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for source in artifact.rglob("*"):
        if source.is_file():
            target = damaged / source.relative_to(artifact)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(bytes(content))
    result = tmp_path / "verify.json"
    assert run("verify", str(damaged), "--json", str(result)) == 1
    report = json.loads(result.read_text())
    assert not report["ok"] and report["failures"][0]["file"] == shard.name
    with pytest.raises(ArtifactError, match=re.escape(shard.name)):
        oq.load(damaged)
    capsys.readouterr()
    assert run("inspect", str(damaged)) == 0
    assert "tensors  not read" in capsys.readouterr().out


def test_verify_and_load_refuse_an_artifact_of_fewer_sites_than_its_recipe_quantizes(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written consistently, hashes and all: only recipe and policy can tell."""
    whole = read_artifact(artifact)
    config, missing = dict(whole.config), whole.config["sites"][-1]
    config["sites"] = config["sites"][:-1]
    tensors = {
        name: tensor
        for name, tensor in whole.tensors.items()
        if not name.startswith(f"{missing['name']}.")
    }
    shape = (sum(missing["splits"]), missing["in_features"])
    tensors[f"{missing['linears'][0]}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    smaller, card = tmp_path / "smaller", (artifact / "README.md").read_text()
    write_artifact(smaller, config=config, tensors=tensors, processor=whole.processor, card=card)
    assert run("verify", str(artifact)) == 0
    assert run("verify", str(smaller)) == 1
    assert "in no site" in capsys.readouterr().out
    assert run("inspect", str(smaller)) == 1
    assert missing["linears"][0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("quantize", POLICY, "--out", "x", "--recipe", "nosuch"), 2, "omega-w4a4-static"),
        (("quantize", POLICY, "--out", "x", "--recipe", "omega-paper"), 2, "simulation"),
        (("quantize", POLICY, "--out", "x", "--device", "cuda"), 3, "without CUDA"),
        (("quantize", "nowhere", "--out", "x"), 2, "builtin:"),
        (("quantize", "builtin:nosuch", "--out", "x"), 2, "tiny-pi05"),
        (("quantize", "random:tiny-pi05", "--out", "x"), 2, "--calibration"),
        (("quantize", POLICY, "--out", "x", "--calibration", "no.npz"), 2, "no.npz"),
        (("inspect", "."), 2, "artifact"),
        (("verify", "nowhere"), 2, "nowhere"),
        (("eval", "random:tiny-pi05"), 2, "--tasks"),
        (("eval", "nowhere", "--tasks", "fly-v3"), 2, "drawer-open-v3"),
        (("compare", "nowhere", "--tasks", ","), 2, "drawer-open-v3"),
        (("diagnose", "nowhere", "--tasks", "door-open-v3,fly-v3"), 2, "drawer-open-v3"),
        (("compare", "nowhere", "--stress", "nan"), 2, "--stress nan: give a number"),
        (("eval", POLICY, "--env", "libero", "--suite", "90"), 2, "spatial"),
        (("eval", POLICY, "--env", "libero", "--tasks", "goal:10"), 2, "long:9"),
        (("eval", POLICY, "--env", "libero", "--episodes", "5"), 2, "--protocol"),
        (("eval", POLICY, "--env", "libero"), 2, "8 state numbers"),
        (("eval", POLICY, "--ray", "auto", "--processes", "2"), 3, "leave --processes out"),
        (("eval", POLICY, "--ray", "nowhere"), 3, "scale" if no_ray else "HOST:PORT"),
        ((*DRY, "random:tiny-pi05", "--embodiment", "1"), 2, "pi05 policy has no layers"),
        ((*DRY, "random:gr00t-n1.5", "--embodiment", "32"), 2, "no embodiment '32'; it has"),
    ],
)
def test_bad_input_is_one_clear_message_and_the_documented_status(
    arguments: tuple[str, ...],
    status: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == status
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1 and "Traceback" not in message
    assert not (tmp_path / "x").exists()


def test_a_failed_quantization_leaves_the_previous_output_as_it_was(
    artifact: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir() if p.is_file()}
    bad = tmp_path / "bad.npz"
    np.savez(bad, state=np.zeros((1, 4), np.float32), prompt=np.array(["open the drawer"]))
    again = ("quantize", POLICY, "--out", str(artifact), "--calibration", str(bad))
    assert run(*again, "--overwrite") == 2
    assert {p.name: p.read_bytes() for p in artifact.iterdir() if p.is_file()} == before


def test_a_directory_that_is_not_an_artifact_is_refused_before_the_work_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run("quantize", POLICY, "--out", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert "thesis.txt" in captured.err and "quantizing" not in captured.out
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_compare_without_episodes_writes_rows_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = ("--episodes", "0", "--held-out", "12", "--noises", "2")
    assert run("compare", POLICY, "--recipes", "rtn", *few, "--out", str(out)) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["fp32", "rtn"]
    assert rows[1]["action_error"] > 0 and rows[1]["noise_floor"] > rows[1]["action_error"]
    assert rows[1]["checkpoint_bytes"] < rows[0]["checkpoint_bytes"]
    assert 4 < rows[1]["bits_per_weight"] < 5 and rows[1]["weights_16bit"] == 0
    assert rows[1]["left_in_16_bits"] == [] and "bits_per_weight" not in rows[0]
    assert (out / "comparison.png").stat().st_size > 10_000
    assert "rtn" in capsys.readouterr().out


def test_bench_policy_measures_both_precisions(artifact: Path, tmp_path: Path) -> None:
    target, once = tmp_path / "bench.json", ("--rounds", "1", "--threads", "1")
    assert run("bench", "policy", "--artifact", str(artifact), *once, "--json", str(target)) == 0
    document = json.loads(target.read_text())
    assert [row["precision"] for row in document["rows"]] == ["fp32", "w4a4"]
    assert document["threads"] == 1 and document["machine"]


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [
        (("kernels", "--sites", "nowhere"), "sites: pi0.5 expert", 2),
        (("kernels", "--figure", "x.png"), "--json FILE", 2),
        (("policy", "--rounds", "0"), "--rounds 0: give", 2),
        (("policy", "--threads", "999"), "cores", 3),
        (("policy", "--device", "cuda"), "cpu", 3),
    ],
)
def test_bench_refuses_what_it_cannot_measure(
    arguments: tuple[str, ...], expected: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", *arguments) == status
    assert expected in capsys.readouterr().err


def test_random_observations_need_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = ("quantize", "random:tiny-pi05", "--out", str(tmp_path / "out"))
    assert run(*quantize, "--calibration", "random:many") == 2
    assert "random:8" in capsys.readouterr().err
    assert run(*quantize, "--calibration", "random:1", "--recipe", "rtn") == 0


def test_the_time_left_follows_the_work_and_forgets_what_was_found_done() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0], reports=3)
    for share in (0.0, 0.1, 0.2, 0.5):  # a resumed run passes these at once
        assert pace.text(share) == ""
    for _ in range(3):
        now[0] += 60.0
        text = pace.text(0.5 + now[0] / 6000.0)
    assert text == "3 min elapsed, about 47 min left"  # a hundredth a minute


def test_diagnose_and_report_go_hand_in_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, page = tmp_path / "diagnostics.json", tmp_path / "report.html"
    looking = ("diagnose", POLICY, "--recipe", "rtn", "--episodes", "0", "--observations", "1")
    assert run(*looking, "--out", str(found)) == 0
    assert "action error" in capsys.readouterr().out
    document = json.loads(found.read_text())
    assert (document["schema"], document["kind"], document["recipe"]) == (1, "diagnostics", "rtn")
    assert document["rollouts"] is None and document["memory"]["reduction"] > 0.5

    summary = tmp_path / "summary.json"
    assert run("report", str(found), "--out", str(page), "--json", str(summary)) == 0
    assert capsys.readouterr().out == f"report {page}\n"
    content = json.loads(summary.read_text())
    assert content["bytes"] == page.stat().st_size
    assert "Trajectories" in content["gaps"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("report",),
        ("report", "absent.json"),
        ("report", "pyproject.toml"),
        ("diagnose", POLICY, "--observations", "0"),
        ("diagnose", POLICY, "--recipe", "no-such-recipe"),
    ],
)
def test_reports_of_nothing_are_usage_errors(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("omega-qvla: ") and "Traceback" not in message
