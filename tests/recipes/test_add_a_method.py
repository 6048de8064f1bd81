"""docs/add-a-method.md, done: one file and one line make a method that compares and saves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omega_qvla.evaluation.benchmark import METHODS, expand_recipes
from omega_qvla.recipe import ablation_names, recipe_names

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "omega_qvla"

CHILD = """
import importlib.util, sys
package, kit, out = sys.argv[1:]
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, package)
import omega_qvla as oq
assert oq.__file__.startswith(package), oq.__file__
spec = importlib.util.spec_from_file_location("conftest", kit)
kit = importlib.util.module_from_spec(spec); spec.loader.exec_module(kit)
from pathlib import Path
from omega_qvla.evaluation.benchmark import METHODS
from omega_qvla.evaluation.comparison import Compared, comparison_rows
from omega_qvla.evaluation.openloop import offers_normalized
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.quantization.pipeline import weights_fingerprint
name = METHODS[-1]
policy, observations = kit.build_policy(), kit.build_observations()
comparison = Compared(
    label="small",
    policy=policy,
    choices=CheckpointOptions(),
    weights=weights_fingerprint(policy),
    checkpoint_bytes=None,
    calibration=observations,
    recipes=["methods"],
    magnitudes=[0.0],
    scope="all",
    artifacts=Path(out),
)
rows = comparison_rows(comparison)
assert [row.recipe for row in rows] == ["fp32", *METHODS]
made = rows[-1].build(lambda label, done, total: None).policy
assert made.config["recipe"]["name"] == name and rows[-1].realizable
assert (Path(out) / f"{name}-plain" / "manifest.json").exists()
print(name, offers_normalized(made), oq.Recipe.load(name).content_hash)
"""


def blocks(language: str) -> list[str]:
    """The code blocks of the document in one language."""
    text = (ROOT / "docs" / "add-a-method.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_one_file_and_one_line_add_a_method(tmp_path: Path) -> None:
    package = tmp_path / "omega_qvla"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (recipe,) = blocks("yaml")
    (line,) = blocks("python")
    name = re.findall(r"^name: (\S+)$", recipe, flags=re.MULTILINE)[0]
    assert line.strip() == f'"{name}",' and line.count("\n") == 1
    (package / "recipes" / f"{name}.yaml").write_text(recipe)
    benchmark = package / "evaluation" / "benchmark.py"
    text = benchmark.read_text("utf-8")
    end = text.index(")\n", text.index("METHODS = ("))
    benchmark.write_text(text[:end] + line + text[end:])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path),
            str(ROOT / "tests/conftest.py"),
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [name, "True"]


def test_every_method_has_its_place_in_the_benchmark() -> None:
    assert sorted(METHODS) == recipe_names()


def test_groups_of_recipes_are_expanded_once_in_their_order() -> None:
    assert expand_recipes(["methods"]) == list(METHODS)
    assert expand_recipes(["ablations"]) == ablation_names()
    assert expand_recipes(["omega-w4a4-static", "methods", "x.yaml"])[0] == "omega-w4a4-static"
    assert (
        expand_recipes(["omega-w4a4-static", "methods", "x.yaml"]).count("omega-w4a4-static") == 1
    )
