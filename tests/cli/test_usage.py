"""What a user types and gets wrong: help is quick, and a slip gets one line with what was meant."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from omega_qvla.cli import main
from omega_qvla.cli.commands import COMMANDS, command_class, overview
from omega_qvla.cli.entry import in_options
from omega_qvla.evaluation.benchmark import BENCHMARK
from omega_qvla.evaluation.comparison import RECIPES
from omega_qvla.evaluation.openloop import NOISES
from omega_qvla.evaluation.unseen import Unseen
from omega_qvla.recipe import DEFAULT_RECIPE, ablation_names, recipe_names


def run(*arguments: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    code = stop.value.code
    return code if isinstance(code, int) else 1


def test_help_imports_neither_pytorch_nor_what_it_computes_with() -> None:
    code = (
        "import sys; from omega_qvla.cli import main\n"
        "try: main({words})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    )
    for words in (["--help"], ["--version"], ["quantise"]):
        program = code.format(words=words)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        program = code.format(words=[name, "--help"])
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
        )
        assert "torch" not in done.stdout.splitlines()[-1], name


def test_the_overview_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert max(len(line) for line in overview().splitlines()) <= 80
    assert run() == 2  # nothing was asked for
    assert capsys.readouterr().out == shown
    folder = Path(inspect.getfile(command_class("demo"))).parent
    files = {path.stem for path in folder.glob("*.py") if "\n@dataclass" in path.read_text()}
    assert files - {"options", "screen"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = command_class(name)
    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    assert kind.examples and " STR" not in shown and "(default: None)" not in shown
    for example in kind.examples:
        assert f"  {example}\n" in shown
        program, command, *words = shlex.split(example.partition(" | ")[0])
        assert (program, command) == ("omega-qvla", name)
        tyro.cli(kind, args=words, config=(tyro.conf.FlagCreatePairsOff,))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("quantise",), "did you mean 'quantize'?"),
        (("reports",), "did you mean 'report'?"),
        (("xyz",), "no command 'xyz' (omega-qvla --help"),
        (("--overwrite", "demo"), "options come after the command"),
        (("quantize", "p", "--output", "x"), "did you mean '--out'?"),
        (("quantize", "p", "--reciep=rtn"), "did you mean '--recipe'?"),
        (("eval", "p", "--episode", "3"), "did you mean '--episodes'?"),
        (("eval", "p", "--zzz"), "eval has no option --zzz; omega-qvla eval --help"),
        (("quantize", "p", "--out", "x", "--recipe", "omga-w4a4"), "did you mean 'omega-w4a4'?"),
        (("eval", "p", "--tasks", "drawer-open"), "did you mean 'drawer-open-v3'?"),
        (("quantize", "builtin:tiny-pi5", "--out", "x"), "did you mean 'tiny-pi05'?"),
        (("quantize", "random:pi5", "--out", "x"), "did you mean 'pi05'?"),
        (("eval", "p", "--env", "metawrld"), "did you mean 'metaworld'?"),
        (("eval", "p", "--env", "libero", "--suite", "gaol"), "did you mean 'goal'?"),
        (("report", "f.json", "--out", "report.pdf"), "--out NAME.html"),
        (("--print-completion", "fish"), "bash, zsh"),
    ],
    ids=" ".join,
)
def test_a_slip_is_one_line_with_what_was_meant(
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert message.startswith("omega-qvla: ") and told in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--suite", "goal"), "--suite is for libero as --env, not for metaworld"),
        (("--protocol", "paper"), "--protocol is for libero"),
        (("--simulator-python", "python"), "--simulator-python is for libero or your own"),
        (("--out", "x"), "--out is for libero or your own"),
        (("--execute", "4"), "--execute is for your own"),
        (("--resume",), "give --out as well"),
        (("--env", "a:b", "--tasks", "t", "--suite", "goal"), "not for a:b"),
        (("--env", "libero", "--suite", "goal", "--tasks", "goal:1"), "give one of them"),
        (("--env", "libero", "--seed", "3"), "--seed is for metaworld or your own"),
        (("--env", "libero", "--episodes", "3"), "--protocol (paper or full)"),
        (("--env", "a:b"), "needs --tasks"),
    ],
    ids=" ".join,
)
def test_an_option_that_would_do_nothing_is_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "builtin:tiny-pi05", *words) == 2
    message = capsys.readouterr().err
    assert told in message and "`" not in message and message.count("\n") == 1


def test_help_has_a_command_s_own_options_first_and_those_of_all_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("quantize", "--help") == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(f" --{name} ") for name in ("out", "recipe", "calibration", "base", "json")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("kernels", "--artifact", "x"), "--artifact would do nothing for `bench kernels`"),
        (("kernels", "--roofline", "orin"), "--roofline would do nothing for `bench kernels`"),
        (("policy", "--llama-cpp", "x"), "--llama-cpp would do nothing for `bench policy`"),
        (("policy", "--sites", "expert"), "--sites would do nothing for `bench policy`"),
        (("policy", "--figure", "x.png"), "--figure would do nothing for `bench policy`"),
    ],
    ids=" ".join,
)
def test_an_option_of_the_other_benchmark_is_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", *words) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1


def test_the_library_names_parameters_and_the_command_line_its_options() -> None:
    command = tyro.cli(command_class("eval"), args=["p"])
    told = "give `simulator_python`, `protocol='full'`, `overwrite=True` or `omega-qvla demo`"
    assert in_options(told, command) == (
        "give --simulator-python, --protocol full, --overwrite or `omega-qvla demo`"
    )
    assert in_options("`noise_shape` of `env=a:b`", command) == "`noise_shape` of --env a:b"


def test_json_to_standard_output_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--json", "-") == 0
    captured = capsys.readouterr()
    names = [one["name"] for one in json.loads(captured.out)["recipes"]]
    assert names == recipe_names() and DEFAULT_RECIPE in captured.err
    assert not Path("-").exists()


def test_recipes_say_bits_papers_and_what_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recipes.json"
    assert run("recipes", "--ablations", "--json", str(target)) == 0
    shown = capsys.readouterr().out
    found = {one["name"]: one for one in json.loads(target.read_text())["recipes"]}
    assert list(found) == [*recipe_names(), *ablation_names()]
    assert [name for name, one in found.items() if one["default"]] == [DEFAULT_RECIPE]
    assert found["gptq"]["paper"] == "2210.17323" and found["gptq"]["bits"] == "W4A4"
    assert [name for name in recipe_names() if not found[name]["realizable"]] == ["omega-paper"]
    assert f"{DEFAULT_RECIPE} (default)" in shown and "2210.17323" in shown


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    import omega_qvla

    assert run("--version") == 0
    assert capsys.readouterr().out == f"omega-qvla {omega_qvla.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands_and_their_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--print-completion", shell) == 0
    shown = capsys.readouterr().out
    assert "quantize" in shown and "allow-mismatch" in shown


def test_defaults_of_the_command_line_are_those_of_the_library() -> None:
    compare, unseen, benchmark = (
        command_class(name) for name in ("compare", "unseen", "benchmark")
    )
    assert compare.recipes == ",".join(RECIPES) and compare.noises == NOISES
    assert unseen.held_out == Unseen.heldout
    assert benchmark.policies == ",".join(BENCHMARK.policies)
