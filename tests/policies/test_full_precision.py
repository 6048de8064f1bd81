"""Policies from names and directories: strict, and clear about what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import NonFiniteError, PolicyError, ResourceError
from omega_qvla.policies import full_precision
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.pi05.checkpoints.openpi import write_openpi
from omega_qvla.policies.pi05.policy import Pi05Policy

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
NORM = "paligemma_with_expert.paligemma.model.language_model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def small_policy(make_small: Callable[..., Pi05Policy]) -> Pi05Policy:
    """Weights that bfloat16 holds exactly, whichever of the types a checkpoint is written in."""
    policy = make_small()
    for parameter in policy.module.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return policy


@pytest.fixture
def written(small_policy: Pi05Policy, tmp_path: Path) -> Path:
    write_openpi(small_policy, tmp_path / "policy")
    return tmp_path / "policy"


def change(directory: Path, **tensors: Any) -> None:
    """Replace tensors; None deletes one."""
    path = directory / "model.safetensors"
    content = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path)


def test_the_openpi_layout_round_trips_bit_for_bit(
    written: Path, small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    loaded = oq.load_policy(written)
    expected = small_policy.sample_actions(few[0], noise)
    assert np.array_equal(loaded.sample_actions(few[0], noise), expected)
    assert loaded.config == small_policy.config and loaded.dropped_parameters == 0
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    files = sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file())
    stats = "assets/metaworld/norm_stats.json"
    assert files == [stats, "config.json", "model.safetensors", "tokenizer.json"]


def test_the_embedding_may_be_stored_as_the_tied_head_alone(
    written: Path, small_policy: Pi05Policy
) -> None:
    change(written, **{HEAD: load_file(written / "model.safetensors")[EMBEDDING], EMBEDDING: None})
    loaded = oq.load_policy(written)
    assert torch.equal(loaded.module.embed_tokens.weight, small_policy.module.embed_tokens.weight)
    assert loaded.dropped_parameters == 0


def test_dead_weights_are_accepted_counted_and_left_out(
    written: Path, small_policy: Pi05Policy
) -> None:
    shapes = dropped_shapes(small_policy.config)
    dead = {name: torch.zeros(shapes[name]) for name in sorted({*shapes} - {HEAD})[:2]}
    change(written, **dead)
    loaded = oq.load_policy(written)
    assert loaded.dropped_parameters == sum(tensor.numel() for tensor in dead.values())
    assert not set(dead) & set(loaded.module.state_dict())


def test_a_dead_weight_of_another_shape_is_refused(written: Path) -> None:
    change(written, **{HEAD: torch.zeros(3, 5)})
    with pytest.raises(PolicyError, match=rf"{HEAD}, to which it is tied, \[3, 5\]"):
        oq.load_policy(written)


def test_two_kinds_of_half_precision_in_one_checkpoint_are_refused(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    change(written, **{NORM: tensors[NORM].half(), EMBEDDING: tensors[EMBEDDING].bfloat16()})
    with pytest.raises(PolicyError, match=rf"mixed types.*bfloat16.*float16 \({NORM}\)"):
        oq.load_policy(written)


def test_single_beside_half_precision_is_how_originals_are_stored(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    change(written, **{NORM: tensors[NORM].float()})
    assert torch.equal(oq.load_policy(written).module.get_parameter(NORM), tensors[NORM].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_become_float32(dtype: torch.dtype, written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    change(written, **{name: tensor.to(dtype) for name, tensor in tensors.items()})
    weight = oq.load_policy(written).module.get_parameter(NORM)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors[NORM].to(dtype).float())


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        (NORM, None, rf"missing {NORM} \[64\]"),
        (EMBEDDING, None, rf"missing {EMBEDDING}"),
        ("stranger", torch.zeros(2), r"unexpected stranger \[2\]"),
        (NORM, torch.zeros(63), rf"{NORM} has shape \[63\], expected \[64\]"),
        (NORM, torch.zeros(64, dtype=torch.int32), rf"{NORM} has dtype torch.int32"),
        (NORM, torch.full((64,), torch.nan), rf"{NORM} .*has NaN or Inf"),
        (NORM, torch.full((64,), -torch.inf), rf"{NORM} .*has NaN or Inf"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    name: str, tensor: torch.Tensor | None, expected: str, written: Path
) -> None:
    change(written, **{name: tensor})
    with pytest.raises((PolicyError, NonFiniteError), match=expected):
        oq.load_policy(written)


def test_a_value_that_is_not_finite_is_found_when_it_is_read(written: Path) -> None:
    change(written, **{NORM: torch.full((64,), torch.nan)})
    policy = full_precision.stream_policy(written)
    assert policy.store is not None
    with pytest.raises(NonFiniteError, match=rf"{NORM} .*has NaN or Inf"):
        policy.store.read(NORM)


def test_many_problems_are_listed_up_to_a_limit(written: Path) -> None:
    save_file({}, written / "model.safetensors")
    with pytest.raises(PolicyError, match=r"missing .*; and \d+ more"):
        oq.load_policy(written)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("config.json", b"{}"),
        ("config.json", b"\xff"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{"),
        ("assets/metaworld/norm_stats.json", b"{}"),
        ("config.json", None),
        ("model.safetensors", None),
        ("tokenizer.json", None),
        ("assets/metaworld/norm_stats.json", None),
    ],
)
def test_a_missing_or_damaged_file_is_refused_by_name(
    file: str, content: bytes | None, written: Path
) -> None:
    (written / file).unlink()
    if content is not None:
        (written / file).write_bytes(content)
    with pytest.raises(PolicyError, match=Path(file).name):
        oq.load_policy(written)


def test_truncated_weights_are_refused(written: Path) -> None:
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PolicyError, match=r"model\.safetensors"):
        oq.load_policy(written)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("builtin:other", "known: tiny-pi05"),
        ("random:other", "known: pi05, pi05-libero, tiny-pi05"),
        ("nowhere", r"no policy at 'nowhere'.*builtin:tiny-pi05"),
        ("", "config.json"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(source: str, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        oq.load_policy(source)


def test_a_file_is_not_a_policy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PolicyError, match="no policy at"):
        oq.load_policy(tmp_path / "file")


def test_an_artifact_given_as_policy_is_refused_with_the_remedy(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    oq.quantize(small_policy, few, "rtn").save_pretrained(tmp_path / "out")
    with pytest.raises(PolicyError, match=r"quantized artifact; load it with omega_qvla\.load"):
        oq.load_policy(tmp_path / "out")


def test_a_random_policy_is_the_same_for_the_same_name() -> None:
    first, second = (oq.load_policy("random:tiny-pi05") for _ in range(2))
    states = first.module.state_dict(), second.module.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.dropped_parameters > 0
    image = np.zeros((84, 84, 3), np.uint8)
    observation = {"images": {"base": image, "wrist": image}, "state": np.zeros(4), "prompt": "go"}
    assert np.isfinite(first.sample_actions(observation)).all()


def test_a_policy_that_does_not_fit_in_memory_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(full_precision, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"random:tiny-pi05 needs .* GB"):
        oq.load_policy("random:tiny-pi05")
