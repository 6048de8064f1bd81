"""The house itself: importing is cheap, nothing can run code, the documents keep their promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from omega_qvla.recipe import Recipe, recipe_names

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "omega_qvla"


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_starts_no_cuda() -> None:
    code = "import omega_qvla, torch; print(torch.cuda.is_initialized())"
    assert run_python(code).strip() == "False"


def test_importing_the_package_imports_no_optional_dependency() -> None:
    code = (
        "import omega_qvla, sys;"
        "print([name for name in ('mujoco', 'metaworld', 'gymnasium', 'matplotlib', 'jinja2',"
        " 'pyarrow', 'av', 'PIL', 'ray', 'libero', 'websockets', 'zmq', 'msgpack', 'triton',"
        " 'tensorstore')"
        " if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_importing_the_package_leaves_the_global_random_state_alone() -> None:
    code = (
        "import torch, numpy; a = torch.get_rng_state(); b = numpy.random.get_state()[1].copy();"
        "import omega_qvla;"
        "print(torch.equal(a, torch.get_rng_state()), (b == numpy.random.get_state()[1]).all())"
    )
    assert run_python(code).split() == ["True", "True"]


def gate(*directories: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "forbidden_calls.py"), *map(str, directories)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_source_has_no_loader_that_can_run_code() -> None:
    done = gate(ROOT / "src")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "torch.load(path)",
        "state = torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(path, allow_pickle = True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "value = eval(text)",
        "exec(text)",
        "from joblib import load",
    ],
)
def test_gate_finds_loaders_that_can_run_code(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"first = 1\n{line}\n", encoding="utf-8")
    done = gate(tmp_path)
    assert done.returncode == 1
    assert "module.py:2: " in done.stdout


@pytest.mark.parametrize(
    "line",
    ["module.eval()", "yaml.safe_load(text)", "np.load(path, allow_pickle=False)", "evaluate(x)"],
)
def test_gate_lets_harmless_lines_pass(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"{line}\n", encoding="utf-8")
    assert gate(tmp_path).returncode == 0


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_makefile_has_every_target_the_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named: set[str] = set()
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (ROOT / name).read_text("utf-8")
        named |= set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, flags=re.MULTILINE))
    assert named <= targets
    assert {"setup", "demo", "test", "lint", "train", "clean"} <= targets


def test_every_builtin_recipe_loads_under_its_own_name() -> None:
    assert {"omega-paper", "omega-w4a4-static", "rtn"} <= set(recipe_names())
    for name in recipe_names():
        assert Recipe.load(name).name == name


def test_every_folder_with_code_is_a_package() -> None:
    """Folders without ``__init__.py`` work from a checkout and vanish from the wheel."""
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def wheel_of(folder: Path, **environment: str) -> set[str]:
    """Names inside the wheel that a copy of the project is built into."""
    project = folder / "project"
    project.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "csrc", project / "csrc")
    shutil.copytree(
        SOURCE,
        project / "src" / "omega_qvla",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(project)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("omega_qvla/")}


EXTENSION = "omega_qvla/runtime/kernels/_cpu.abi3.so"


def package_files() -> set[str]:
    return {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_wheel_holds_every_file_of_the_package_and_the_kernels(tmp_path: Path) -> None:
    """Recipes and embedded policies must reach a user who installs without a checkout."""
    assert wheel_of(tmp_path) == package_files() | {EXTENSION}


def test_without_a_compiler_the_package_is_built_without_the_kernels(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        found = shutil.which(name, path=str(Path(sys.executable).parent))
        assert found, f"{name} belongs to the dev extra"
        (tools / name).symlink_to(found)
    built = wheel_of(tmp_path / "build", PATH=str(tools), CXX=str(tmp_path / "no-compiler"))
    assert built == package_files()
