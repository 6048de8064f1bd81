"""Work is never lost, mixed or replaced unasked, and no option's value gives a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from omega_qvla.claims import Claim
from omega_qvla.cli import commands, main
from omega_qvla.cli.commands import command_class
from omega_qvla.cli.options import Range
from omega_qvla.evaluation.comparison_folder import (
    Planned,
    require_free_comparison,
    sign,
)
from omega_qvla.results.rows import Comparison, Row

pytestmark = pytest.mark.long

POLICY = "builtin:tiny-pi05"
COMMANDS: dict[str, Any] = {name: command_class(name) for name in commands.COMMANDS}
NEEDED: dict[str, tuple[str, ...]] = {
    "quantize": ("nowhere", "--out", "x"),
    "inspect": ("nowhere",),
    "verify": ("nowhere",),
    "eval": ("nowhere",),
    "compare": ("nowhere",),
    "bench": ("kernels",),
    "diagnose": ("nowhere",),
    "report": ("nowhere.json",),
    "serve": ("nowhere",),
}
"""What each command cannot do without; nothing of it exists, so whatever reads it says so."""


def run(*arguments: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    code = stop.value.code
    return code if isinstance(code, int) else 1


def numbers() -> list[tuple[str, str, Any, Range | None]]:
    """(command, option, type, range) of every option that takes a number."""
    found = []
    for name, command in COMMANDS.items():
        hints = get_type_hints(command, include_extras=True)
        plain = get_type_hints(command)
        for one in fields(command):
            kinds = {int, float} & {plain[one.name], *get_args(plain[one.name])}
            if kinds:
                ranges = [
                    item
                    for item in getattr(hints[one.name], "__metadata__", ())
                    if isinstance(item, Range)
                ]
                option = f"--{one.name.replace('_', '-')}"
                found.append((name, option, kinds.pop(), ranges[0] if ranges else None))
    return found


def test_every_number_on_the_command_line_has_a_range() -> None:
    assert len(numbers()) > 30
    assert [(name, option) for name, option, _, allowed in numbers() if allowed is None] == []


@pytest.mark.parametrize(
    ("command", "option", "kind", "allowed"),
    [pytest.param(*n, id=" ".join(n[:2])) for n in numbers()],
)
def test_a_number_that_makes_no_sense_is_refused_by_name_before_anything_is_read(
    command: str,
    option: str,
    kind: type,
    allowed: Range,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = ["-2", "9" * 30, *(["0"] if allowed.low > 0 else [])]
    bad += ["nan", "-inf"] if kind is float else []
    for value in bad:
        assert run(command, *NEEDED.get(command, ()), f"{option}={value}") == 2
        message = capsys.readouterr().err
        assert message.startswith(f"omega-qvla: {option} ") and str(allowed) in message
        assert message.count("\n") == 1
    for value in ("many", "", "1,5", *(["1.5"] if kind is int else [])):
        assert run(command, *NEEDED.get(command, ()), f"{option}={value}") == 2
        message = "".join(capsys.readouterr())
        assert option in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


WRITING: list[tuple[tuple[str, ...], str]] = [
    (("quantize", "nowhere", "--out", "x", "--json", "f"), "f"),
    (("inspect", "nowhere", "--json", "f"), "f"),
    (("verify", "nowhere", "--json", "f"), "f"),
    (("recipes", "--json", "f"), "f"),
    (("doctor", "--json", "f"), "f"),
    (("eval", "nowhere", "--json", "f"), "f"),
    (("compare", "nowhere", "--json", "f"), "f"),
    (("compare", "nowhere", "--out", "d"), "d"),
    (("demo", "--json", "f"), "f"),
    (("demo", "--out", "d"), "d"),
    (("benchmark", "--json", "f"), "f"),
    (("bench", "kernels", "--json", "f"), "f"),
    (("bench", "kernels", "--json", "g", "--figure", "f"), "f"),
    (("diagnose", "nowhere", "--out", "f"), "f"),
    (("diagnose", "nowhere", "--out", "g", "--json", "f"), "f"),
    (("report", "nowhere.json", "--out", "f"), "f"),
    (("report", "nowhere.json", "--out", "g.html", "--json", "f"), "f"),
    (("serve", "nowhere", "--json", "f"), "f"),
    (("train", "tiny-pi05", "--json", "f"), "f"),
]


@pytest.mark.parametrize(("arguments", "output"), WRITING, ids=lambda one: " ".join(one))
def test_an_output_that_is_there_is_refused_before_the_work_with_the_option_that_replaces_it(
    arguments: tuple[str, ...],
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("years of work")
    Path("d").mkdir()
    Path("d/thesis.txt").write_text("years of work")
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert output in message and "--overwrite" in message and message.count("\n") == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == [
        str(tmp_path / name) for name in ("d", "d/thesis.txt", "f")
    ]
    assert Path("f").read_text() == "years of work"


def test_outputs_that_no_option_makes_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("verify", "nowhere", "--json", os.devnull, "--overwrite") == 2
    assert "not a regular file" in capsys.readouterr().err
    assert run("diagnose", POLICY, "--out", "same.json", "--json", "./same.json") == 2
    assert "two outputs" in capsys.readouterr().err
    Path("run.json").write_text("{}")
    assert run("report", "run.json", "--json", "run.json", "--overwrite") == 2
    assert "overwritten" in capsys.readouterr().err and Path("run.json").read_text() == "{}"
    Path("mine").mkdir()
    Path("mine/notes").touch()
    assert run("train", "--out", "mine") == 2
    assert "did not write" in capsys.readouterr().err
    with Claim("busy.json"):
        assert run("verify", "nowhere", "--json", "busy.json", "--overwrite") == 2
    assert f"process {os.getpid()} " in capsys.readouterr().err


def quantizing(out: Path, *more: str) -> tuple[str, ...]:
    """The quickest recipe: 54 sites in seconds."""
    given = ("quantize", POLICY, "--out", str(out), "--calibration", "random:1")
    return (*given, "--recipe", "rtn", *more)


def command_line(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "omega_qvla.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def interrupt(out: Path, number: int) -> tuple[int, str]:
    """Status and last words of a quantization that got a signal after its first sites."""
    # Whoever runs the tests may ignore Ctrl-C, as a shell does in the background.
    process = command_line(
        *quantizing(out), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    journal = out.with_name(f".{out.name}.journal")
    deadline = time.monotonic() + 240
    while not (journal / "site-00003.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    words = process.communicate(timeout=120)[1]
    return process.returncode, words


def test_an_interrupted_run_says_how_to_go_on_and_is_neither_discarded_nor_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, journal = tmp_path / "out", tmp_path / ".out.journal"
    assert run(*quantizing(tmp_path / "whole")) == 0
    status, words = interrupt(out, signal.SIGTERM)
    assert status == 143 and words.count("\n") == 1
    assert str(journal) in words and f"--out {out}" in words and words.endswith("--resume\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.journal", "whole"]
    kept = {path.name: path.read_bytes() for path in journal.iterdir()}
    capsys.readouterr()
    assert run(*quantizing(out)) == 2
    message = capsys.readouterr().err
    assert "--resume" in message and "--overwrite" in message and str(journal) in message
    assert {path.name: path.read_bytes() for path in journal.iterdir()} == kept
    assert run(*quantizing(out), "--resume") == 0
    assert f"continuing: {len(kept) - 1} finished site(s)" in capsys.readouterr().out
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()

    assert run(*quantizing(out), "--calibration", "random:2") == 2
    message = capsys.readouterr().err
    assert "recipe rtn" in message and "--overwrite" in message
    assert run(*quantizing(out), "--calibration", "random:2", "--overwrite") == 0
    config = json.loads((out / "omega_config.json").read_text())
    assert config["calibration"]["observations"] == 2


def test_ctrl_c_ends_with_its_own_status_and_one_line(tmp_path: Path) -> None:
    status, words = interrupt(tmp_path / "out", signal.SIGINT)
    assert status == 130 and words.count("\n") == 1 and "continue with: omega-qvla" in words


def test_of_two_processes_with_one_output_one_works_and_the_other_is_refused(
    tmp_path: Path,
) -> None:
    first, second = (command_line(*quantizing(tmp_path / "out")) for _ in range(2))
    words = [process.communicate(timeout=300)[1] for process in (first, second)]
    assert sorted([first.returncode, second.returncode]) == [0, 2]
    refused = words[0] or words[1]
    assert "process " in refused and "quantize builtin:tiny-pi05" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run("verify", str(tmp_path / "out")) == 0


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help")])
def test_a_reader_that_leaves_is_no_traceback(arguments: tuple[str, ...]) -> None:
    process = command_line(*arguments)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before anything was written
    words = process.stderr.read()
    assert process.wait(timeout=120) == 141 and words == ""


def saved_row(recipe: str, episodes: int = 0, noises: int = 1, observations: int = 2) -> Row:
    """A row of that size; its figures are invented."""
    unmeasured = {name: None for name, field in Row.model_fields.items() if field.is_required()}
    size = {"success": {"open": [0, episodes]} if episodes else {}, "episodes": episodes}
    size |= {"noises": noises, "action_errors": [0.1] * observations}
    cell = {"policy": POLICY, "recipe": recipe, "condition": "plain", "scope": "all"}
    labels = {"realizable": True, "seeds": [], "smoke": True}
    return Row.model_validate({**unmeasured, **size, **cell, **labels})


def compare_saved(folder: Path, *recipes: str, **changes: int) -> None:
    """A folder as a comparison leaves it."""
    folder.mkdir(parents=True)
    rows = [saved_row(recipe, **changes) for recipe in ("fp32", *recipes)]
    document = Comparison(policy=POLICY, rows=rows)
    (folder / "results.json").write_text(json.dumps(document.to_json()))


def test_a_comparison_keeps_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compare_saved(Path("out/compare"), "rtn", "gptq")
    before = Path("out/compare/results.json").read_bytes()
    few = ("--episodes", "0", "--held-out", "2", "--noises", "1")
    compare = ("compare", POLICY, "--recipes", "rtn", *few)
    assert run(*compare) == 2
    message = capsys.readouterr().err
    assert f"3 row(s) of {POLICY}: fp32 (plain), rtn (plain), gptq (plain)" in message
    assert "--resume" in message and "--overwrite" in message
    assert run(*compare, "--resume") == 2
    assert "1 row(s)" in (message := capsys.readouterr().err) and "gptq (plain)" in message
    assert Path("out/compare/results.json").read_bytes() == before
    assert run(*compare, "--overwrite") == 0
    rows = json.loads(Path("out/compare/results.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["fp32", "rtn"]
    assert json.loads(Path("out/compare/made-by.json").read_text())["command"] == "compare"
    assert run("demo", "--out", "out/compare") == 2  # a comparison is no demonstration


def test_a_demonstration_may_replace_a_demonstration(tmp_path: Path) -> None:
    compare_saved(tmp_path / "demo", "rtn")
    sign(tmp_path / "demo", "demo")
    nothing = Planned([], episodes=0, noises=1)
    require_free_comparison(tmp_path / "demo", nothing, "demo", resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"episodes": 80}, "80 episodes, where this command runs 0"),
        ({"noises": 8}, "8 noises, where this command draws 1"),
        ({"observations": 96}, "96 held-out observations, where this command takes 2"),
    ],
)
def test_what_is_resumed_with_less_does_not_replace_what_has_more(
    there: dict[str, int],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    compare_saved(Path("out/compare"), "rtn", **there)
    before = Path("out/compare/results.json").read_bytes()
    less = ("--episodes", "0", "--held-out", "2", "--noises", "1", "--resume")
    assert run("compare", POLICY, "--recipes", "rtn", *less) == 2
    message = capsys.readouterr().err
    assert "2 row(s)" in message and told in message and "--overwrite" in message
    assert Path("out/compare/results.json").read_bytes() == before


def test_results_that_cannot_be_read_are_not_replaced_by_a_comparison_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/compare").mkdir(parents=True)
    Path("out/compare/results.json").write_text('{"schema": 1, "policy": "p", "rows": [{')
    assert run("compare", POLICY, "--recipes", "rtn", "--episodes", "0", "--resume") == 2
    message = capsys.readouterr().err
    assert "not JSON" in message and "--overwrite" in message


class _Without:
    """An import system that lacks a package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (("compare", "nowhere"), "matplotlib"),
        (("demo",), "matplotlib"),
        (("report", "nowhere.json"), "matplotlib"),
        (("report", "nowhere.json"), "jinja2"),
        (("bench", "kernels", "--json", "g", "--figure", "h"), "matplotlib"),
        (("eval", "nowhere"), "metaworld"),
        (("train",), "metaworld"),
        (("eval", "nowhere", "--ray", "auto"), "ray"),
        (("compare", "nowhere", "--ray", "auto"), "ray"),
        (("benchmark", "--ray", "auto"), "ray"),
        (("serve", "nowhere"), "websockets"),
        (("serve", "nowhere", "--protocol", "gr00t"), "zmq"),
    ],
    ids=lambda one: one if isinstance(one, str) else " ".join(one),
)
def test_a_missing_package_is_said_before_the_work(
    arguments: tuple[str, ...],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])
    assert run(*arguments) == 3
    message = capsys.readouterr().err
    assert f"the package {package}" in message and "pip install" in message
    assert message.count("\n") == 1 and list(tmp_path.iterdir()) == []
