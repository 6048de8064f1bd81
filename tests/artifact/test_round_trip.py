"""What is saved is what is loaded, and the same content is always the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from omega_qvla.artifact import read_artifact, verify_artifact, write_artifact
from omega_qvla.errors import ArtifactError, NonFiniteError

pytestmark = pytest.mark.long

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20)
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        _tensor,
        st.sampled_from(INTEGERS + FLOATS),
        st.lists(st.integers(0, 5), max_size=4),
        st.integers(0, 99),
    ),
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tensors=TENSORS, value=JSON, data=st.binary(max_size=50), limit=st.integers(1, 500))
def test_any_content_returns(
    tmp_path: Path, tensors: dict[str, torch.Tensor], value: Any, data: bytes, limit: int
) -> None:
    content_hash = write_artifact(
        tmp_path / "out",
        config={"value": value},
        tensors=tensors,
        processor={"blob": data},
        card="card",
        max_shard_bytes=limit,
    )
    for verify in (True, False):
        artifact = read_artifact(tmp_path / "out", verify=verify)
        assert artifact.config == {"value": value, "format_version": 1}
        assert artifact.processor == {"blob": data} and artifact.content_hash == content_hash
        assert artifact.tensors.keys() == tensors.keys()
        assert all(_same(artifact.tensors[name], tensors[name]) for name in tensors)
    assert verify_artifact(tmp_path / "out").ok


def test_same_content_gives_the_same_bytes_whatever_the_order(
    tmp_path: Path, example: dict[str, Any], kit: ModuleType
) -> None:
    first = write_artifact(tmp_path / "a", **example)
    reordered = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in example.items()
    }
    second = write_artifact(tmp_path / "b", **reordered)
    assert first == second
    assert kit.snapshot(tmp_path / "a") == kit.snapshot(tmp_path / "b")


def test_any_change_of_content_changes_the_hash(tmp_path: Path, example: dict[str, Any]) -> None:
    hashes = [write_artifact(tmp_path / "a", **example)]
    changes: list[dict[str, Any]] = [
        {"card": "other"},
        {"config": {**example["config"], "x": 1}},
        {"processor": {}},
        {"tensors": {**example["tensors"], "half": example["tensors"]["half"] * 2}},
    ]
    hashes += [write_artifact(tmp_path / "a", **{**example, **change}) for change in changes]
    assert len(set(hashes)) == len(hashes)


def test_the_safetensors_library_reads_the_tensor_files(saved: Path) -> None:
    shards = sorted(saved.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)
    ]
    library = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    ours = read_artifact(saved).tensors
    assert library.keys() == ours.keys()
    assert all(_same(library[name], ours[name]) for name in ours)


def test_views_transposes_and_parameters_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "v": base[:, 1], "e": base[:1].expand(5, 4), "o": base[1:2, 1],
               "p": torch.nn.Parameter(base)}  # fmt: skip
    write_artifact(tmp_path / "a", config={}, tensors=tensors, processor={}, card="")
    found = read_artifact(tmp_path / "a").tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_writing_into_a_loaded_tensor_never_reaches_the_file(saved: Path) -> None:
    read_artifact(saved).tensors["layer.weight_scale"].zero_()
    assert verify_artifact(saved).ok


def test_tensors_outlive_the_directory(tmp_path: Path, example: dict[str, Any]) -> None:
    write_artifact(tmp_path / "a", **example)
    artifact = read_artifact(tmp_path / "a")
    write_artifact(tmp_path / "a", **{**example, "tensors": {}})
    for name, tensor in artifact.tensors.items():
        assert _same(tensor, example["tensors"][name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_never_saved(
    tmp_path: Path, example: dict[str, Any], value: float, dtype: torch.dtype
) -> None:
    write_artifact(tmp_path / "a", **example)
    bad = torch.ones(2, 3, dtype=dtype)
    bad[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"'bad.scale' holds .* at flat index 4"):
        write_artifact(tmp_path / "a", **{**example, "tensors": {"bad.scale": bad}})
    assert os.listdir(tmp_path) == ["a"] and verify_artifact(tmp_path / "a").ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"c": torch.zeros(1, dtype=torch.complex64)}}, "torch.complex64"),
        ({"tensors": {"s": torch.eye(2).to_sparse()}}, "sparse"),
        ({"tensors": {"m": torch.zeros(1, device="meta")}}, "meta"),
        ({"tensors": {"r": torch.zeros([1] * 9)}}, "at most 8 extents"),
        ({"tensors": {"z": torch.zeros(0, 2**41)}}, "at most 8 extents"),
        ({"tensors": {"": torch.zeros(1)}}, "tensor name"),
        ({"tensors": {"__metadata__": torch.zeros(1)}}, "tensor name"),
        ({"tensors": {"a\n": torch.zeros(1)}}, "tensor name"),
        ({"config": {"x": float("nan")}}, "config"),
        ({"config": {"x": np.float32(1)}}, "config"),
        ({"config": {"x": "\ud800"}}, "config"),
        ({"config": {"format_version": 2}}, "format_version"),
        ({"processor": {"../x": b""}}, "processor file name"),
        ({"processor": {"a/b": b""}}, "processor file name"),
        ({"card": "x" * (1 << 20 | 1)}, "README.md"),
    ],
)
def test_what_an_artifact_cannot_hold_is_refused_before_writing(
    tmp_path: Path, example: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        write_artifact(tmp_path / "a", **{**example, **change})
    assert os.listdir(tmp_path) == []


MEASURE = """
import resource, sys
from omega_qvla.artifact import read_artifact, verify_artifact
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
artifact = read_artifact(sys.argv[1])
assert verify_artifact(sys.argv[1]).ok
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_takes_little_memory_beyond_the_mapping(tmp_path: Path) -> None:
    """48 MB of tensors: checks stream, so the peak grows by far less than the file."""
    tensors = {f"w{i}": torch.zeros(1 << 22, dtype=torch.int32) for i in range(3)}
    write_artifact(tmp_path / "a", config={}, tensors=tensors, processor={}, card="")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(output.stdout) < 24 << 20
