"""One file per policy: what LeRobot wrote and computed of every case, but the weights.

Weights are drawn again (``lerobot_cases.weight``).  Everything else is kept as LeRobot made it: the
files of the checkpoint as bytes, the record as tensors.  What several cases have in common is there
once, under the digest of its content; the metadata say which case has what under which name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from lerobot_cases import Case, Policy, golden_cases, weight
from lerobot_parity import Record, read_record
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

FOLDER = Path(__file__).parents[1] / "parity" / "golden"
WEIGHTS = "model.safetensors"
ROUNDING = 2e-6


class Golden:
    """The file, read whole.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="np") as file:
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.cases: dict[str, dict[str, dict[str, str]]] = json.loads(file.metadata()["cases"])

    def record(self, case: Case) -> Record:
        """What LeRobot computed of a case."""
        return {key: self._tensors[d] for key, d in self.cases[case.name]["record"].items()}

    def files(self, case: Case) -> dict[str, bytes]:
        """What LeRobot wrote beside the weights."""
        files = self.cases[case.name]["files"].items()
        return {name: self._tensors[digest].tobytes() for name, digest in files}


def golden_file(policy: Policy) -> Path:
    """The file of a policy's cases."""
    return FOLDER / f"lerobot_{policy}.safetensors"


def make_golden(out: Path, policy: Policy) -> None:
    """Write the file of a policy from a folder of records."""
    tensors: dict[str, np.ndarray] = {}
    index: dict[str, dict[str, dict[str, str]]] = {}

    def keep(array: np.ndarray) -> str:
        form = f"{array.dtype} {array.shape} ".encode()
        digest = hashlib.sha256(form + array.tobytes()).hexdigest()[:16]
        tensors[digest] = array
        return digest

    for case in golden_cases(policy):
        record = read_record(out / case.name / "record.safetensors")
        files = written(out / case.name / "checkpoint")
        index[case.name] = {
            "record": {key: keep(array) for key, array in record.items()},
            "files": {key: keep(np.frombuffer(data, np.uint8)) for key, data in files.items()},
        }
    save_file(tensors, golden_file(policy), metadata={"cases": json.dumps(index)})


def same_golden(out: Path, policy: Policy) -> None:
    """Fail where the file of a policy differs from a folder of records."""
    golden, cases = Golden(golden_file(policy)), golden_cases(policy)
    assert list(golden.cases) == [case.name for case in cases]
    for case in cases:
        assert golden.files(case) == written(out / case.name / "checkpoint"), case.name
        record, kept = read_record(out / case.name / "record.safetensors"), golden.record(case)
        assert set(record) == set(kept), case.name
        for key, array in record.items():
            close = np.allclose(array, kept[key], rtol=ROUNDING, atol=ROUNDING)
            assert close, f"{case.name}: {key}"


def written(checkpoint: Path) -> dict[str, bytes]:
    """The files beside the weights, by name."""
    paths = sorted(path for path in checkpoint.iterdir() if path.name != WEIGHTS)
    return {path.name: path.read_bytes() for path in paths}


def draw_weights(module: nn.Module, path: Path) -> None:
    """The weights of every case as LeRobot saves them, the dead ones left out."""
    drawn = {
        f"model.{name}": weight(name, tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    }
    save_file(drawn, path)
