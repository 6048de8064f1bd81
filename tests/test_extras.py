"""Optional packages: what is missing, what is broken, and what to type."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from omega_qvla.errors import MissingPackageError
from omega_qvla.extras import installation, needing, require

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent


def test_a_missing_package_is_named_with_a_command_that_installs_it() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"reading needs the package no_such_one, which"),
        needing("reading", "data"),
    ):
        import_module("no_such_one.inside")
    with pytest.raises(MissingPackageError, match=r"run: pip install .*'pyarrow>=\d+'.*'data'"):
        require("reading", "data", "json", "no_such_one")
    require("reading", "data", "json")


def test_a_package_that_is_there_and_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_numpy_user.py").write_text("raise ImportError('requires NumPy 2, found 1')")
    (tmp_path / "half_there.py").write_text("import half_there_helper_of_no_one")
    (tmp_path / "part_gone.py").write_text("import json.no_such_part")
    monkeypatch.syspath_prepend(tmp_path)
    for name, told in (
        ("old_numpy_user", r"installed but cannot be imported: requires NumPy 2, found 1"),
        ("half_there", r"needs the package half_there_helper_of_no_one, which is not installed"),
        ("part_gone", r"installed but cannot be imported: No module named 'json.no_such_part'"),
    ):
        with pytest.raises(MissingPackageError, match=told), needing("reading", "data"):
            import_module(name)


@pytest.mark.parametrize(
    "extra", ["sim", "report", "hub", "openpi", "data", "scale", "serve", "gpu"]
)
def test_the_command_names_exactly_what_the_extra_lists(extra: str) -> None:
    """Nothing is published under this project's name, so the packages are named themselves."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = text.partition(f"\n{extra} = [")[2].partition("]\n")[0]
    listed = [
        line.partition('"')[2].partition('"')[0] for line in block.splitlines() if '"' in line
    ]
    assert installation(extra) == f"pip install {' '.join(repr(one) for one in listed or [block])}"


BLOCKED = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
from pathlib import Path
import omega_qvla.errors as errors
try:
    {code}
except errors.MissingPackageError as error:
    print(error.exit_status, error)
"""


@pytest.mark.parametrize(
    ("package", "extra", "code"),
    [
        ("websockets", "serve", "import omega_qvla.serving.client"),
        ("msgpack", "serve", "import omega_qvla.serving.wire"),
        ("prometheus_client", "serve", "import omega_qvla.serving.server.metrics"),
        ("websockets", "serve", "import omega_qvla.serving.server.websocket_listener"),
        ("zmq", "serve", "import omega_qvla.serving.server.protocols.gr00t"),
        (
            "pyarrow",
            "data",
            "from omega_qvla.calibration.parquet import open_parquet as o; "
            "o(Path('x'), 'x').__enter__()",
        ),
        (
            "av",
            "data",
            "import omega_qvla.calibration.video as v; "
            "[c for c in vars(v).values() if isinstance(c, type) and c.__module__ == v.__name__"
            " and 'path' in c.__init__.__code__.co_varnames][0](Path('x'), 'x')",
        ),
        (
            "sentencepiece",
            "hub",
            "from omega_qvla.policies.processing.tokenizers import SentencePieceTokenizer as t;"
            " t(b'', 'x')",
        ),
        (
            "tokenizers",
            "hub",
            "from omega_qvla.policies.processing.tokenizers import QwenTokenizer as t; t({}, 'x')",
        ),
        ("matplotlib", "report", "from omega_qvla.report.style import new_figure as f; f(1.0)"),
        (
            "ray",
            "scale",
            "import omega_qvla.evaluation.execution.ray_cluster as r; r.RayExecutor('auto')",
        ),
        ("triton", "gpu", "from omega_qvla.runtime.kernels.triton_gpu import programs as p; p()"),
    ],
)
def test_each_optional_package_that_is_missing_is_named(
    package: str, extra: str, code: str
) -> None:
    program = BLOCKED.format(blocked={package}, code=code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ") and f"the package {package}," in done.stdout
    assert installation(extra) in done.stdout
