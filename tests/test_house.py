"""The whole: importing is cheap, nothing can run code, the documents keep their promises."""

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
    code = "from omega_qvla import *; import torch; print(torch.cuda.is_initialized())"
    assert run_python(code).strip() == "False"


def test_importing_the_package_imports_no_optional_dependency() -> None:
    code = (
        "from omega_qvla import *; import sys;"
        "print([name for name in ('mujoco', 'metaworld', 'gymnasium', 'matplotlib', 'jinja2',"
        " 'pyarrow', 'av', 'PIL', 'ray', 'libero', 'websockets', 'zmq', 'msgpack', 'triton',"
        " 'tensorstore')"
        " if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_importing_the_package_leaves_the_global_random_state_alone() -> None:
    code = (
        "import torch, numpy; a = torch.get_rng_state(); b = numpy.random.get_state()[1].copy();"
        "from omega_qvla import *;"
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


DOCUMENTS = sorted((ROOT / "docs").glob("**/*.md"))
REFERENCE = {"api.md", "artifact.md", "cli.md", "json.md", "results.md"}
"""Pages to look things up in, which may be long."""


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_documents_at_the_root_lead_somewhere(name: str) -> None:
    """Those of docs/ are checked where the site is built (make docs)."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_documents_that_code_names_exist() -> None:
    """Docstrings and messages say the page of docs/ to read."""
    named: dict[str, str] = {}
    for folder in ("src", "tests", "tools", "benchmarks", "examples", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".yaml", ".sh"}:
                found = re.findall(r"docs/[\w./-]+\.md", path.read_text("utf-8"))
                named |= dict.fromkeys(found, path.name)
    assert {name: file for name, file in named.items() if not (ROOT / name).exists()} == {}


def test_pages_are_short_but_for_those_to_look_things_up_in() -> None:
    words = {
        path.name: sum(any(map(str.isalnum, word)) for word in path.read_text("utf-8").split())
        for path in DOCUMENTS
    }
    assert {n: count for n, count in words.items() if n not in REFERENCE and count > 1500} == {}
    assert sum(count for name, count in words.items() if name != "results.md") < 34_000


def test_makefile_has_every_target_the_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named: set[str] = set()
    for path in (*ROOT.glob("*.md"), *DOCUMENTS):
        text = path.read_text("utf-8")
        named |= set(re.findall(r"(?:^    |`)make ([a-z-]+)\b", text, flags=re.MULTILINE))
    assert named <= targets
    assert {"setup", "demo", "test", "lint", "train", "clean"} <= targets


def release_notes(version: str, changelog: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The tool, in a copy of the project that has another changelog."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "release_notes.py", folder / "tools")
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    command = [sys.executable, str(folder / "tools" / "release_notes.py"), version]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


CHANGES = "# Log\n\n## [Unreleased]\n\n## [0.2.0] - 2027-01-02\n\n- two\n\n## [0.1.0]\n\n- one\n"


@pytest.mark.parametrize(("version", "notes"), [("0.2.0", "- two\n"), ("0.1.0", "- one\n")])
def test_release_notes_are_the_section_of_the_version(
    version: str, notes: str, tmp_path: Path
) -> None:
    assert release_notes(version, CHANGES, tmp_path).stdout == notes


@pytest.mark.parametrize("version", ["0.3.0", "Unreleased", "0.2"])
def test_a_release_without_notes_is_refused(version: str, tmp_path: Path) -> None:
    done = release_notes(version, CHANGES, tmp_path)
    assert done.returncode == 1 and f"'## [{version}]'" in done.stderr


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r'^version = "(.*)"$', project, flags=re.MULTILINE)
    assert f"\nversion: {version}\n" in citation


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
