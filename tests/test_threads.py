"""How many threads compute: by the work, at most as asked, and afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla import threads
from omega_qvla.calibration.observations import Observations
from omega_qvla.cli import main
from omega_qvla.errors import ResourceError, ResumeError
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.threads import (
    WORTH_SHARING,
    available_cores,
    check_threads,
    fitting_threads,
    torch_threads,
    usable_threads,
    widest_linear,
)

USERS = 3
"""What the user's own code had asked PyTorch for."""


@pytest.fixture(autouse=True)
def users_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores, whatever this one has, and a user who asked for three threads."""
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    with torch_threads(USERS):
        yield
        assert torch.get_num_threads() == USERS


@pytest.fixture
def all_is_worth_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks count as large ones."""
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)


def test_more_threads_than_cores_are_refused() -> None:
    assert check_threads(4) == 4
    for refused in (0, -1, 5):
        with pytest.raises(ResourceError, match="1 to 4 cores"):
            check_threads(refused)


def test_there_is_at_least_one_core() -> None:
    assert available_cores() >= 1


def test_small_networks_take_one_thread_and_large_ones_what_is_given() -> None:
    assert fitting_threads(WORTH_SHARING - 1) == 1
    assert fitting_threads(WORTH_SHARING - 1, 4) == 1
    assert fitting_threads(WORTH_SHARING) == USERS
    assert fitting_threads(WORTH_SHARING, 2) == 2


def test_torchs_own_number_counts_up_to_the_cores_there_are() -> None:
    with torch_threads(64):
        assert usable_threads(None) == 4
        assert fitting_threads(WORTH_SHARING) == 4


def test_the_widest_linear_is_found_before_and_after_quantizing(
    small_policy: Pi05Policy, few: Observations
) -> None:
    assert widest_linear(nn.ReLU()) == 0
    assert widest_linear(small_policy.module) == 64 * 192  # of the adaptive norms
    quantized = oq.quantize(small_policy, few, recipe="rtn")
    assert isinstance(quantized, oq.QuantizedPolicy)
    # Those became a table; the widest now are gate and up, which became one.
    assert widest_linear(quantized.policy.module) == 64 * 2 * 128


def test_the_users_number_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), torch_threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == USERS


def watch(policy: Pi05Policy) -> list[int]:
    """Numbers of threads with which chunks of a policy are computed from now on."""
    seen: list[int] = []

    def computed(inputs: Sequence[Tensor], noise: Tensor, *more: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return policy.compute(inputs, noise, *more)

    policy.use_pass(computed)
    return seen


def sample_every_way(policy: Pi05Policy, observations: Observations, noise: np.ndarray) -> None:
    policy.sample_actions(observations[0], noise)
    policy.sample_normalized(observations[0], noise)
    policy.sample_noises(observations[0], [noise])
    policy.sample_batch([policy.encode(observations[0])], [noise])


def test_chunks_of_a_small_policy_are_computed_by_one_thread(
    policy: Pi05Policy, observations: Observations, noise: np.ndarray
) -> None:
    seen = watch(policy)
    sample_every_way(policy, observations, noise)
    assert seen == [1, 1, 1, 1]


@pytest.mark.usefixtures("all_is_worth_sharing")
def test_chunks_of_a_large_policy_are_computed_by_the_users_number(
    policy: Pi05Policy, observations: Observations, noise: np.ndarray
) -> None:
    seen = watch(policy)
    sample_every_way(policy, observations, noise)
    assert seen == [USERS] * 4


def threads_of_quantizing(policy: Pi05Policy, observations: Observations, **options: Any) -> int:
    seen: set[int] = set()

    def progress(_done: int, _total: int, _what: str) -> None:
        seen.add(torch.get_num_threads())

    oq.quantize(policy, observations, "rtn", progress=progress, **options)
    (only,) = seen
    return only


def test_a_small_policy_is_quantized_by_one_thread(
    small_policy: Pi05Policy, few: Observations
) -> None:
    assert threads_of_quantizing(small_policy, few) == 1
    assert threads_of_quantizing(small_policy, few, threads=2) == 1


@pytest.mark.usefixtures("all_is_worth_sharing")
def test_a_large_policy_is_quantized_by_as_many_as_asked(
    small_policy: Pi05Policy, few: Observations
) -> None:
    assert threads_of_quantizing(small_policy, few) == USERS
    assert threads_of_quantizing(small_policy, few, threads=2) == 2


@pytest.mark.usefixtures("all_is_worth_sharing")
def test_a_journal_is_not_continued_with_another_number(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    """Its bytes would be neither those of the one nor those of the other."""
    oq.quantize(small_policy, few, "rtn", work_directory=tmp_path, threads=2)
    with pytest.raises(ResumeError, match="threads: was '2', now '1'"):
        oq.quantize(small_policy, few, "rtn", work_directory=tmp_path, threads=1, resume=True)
    oq.quantize(small_policy, few, "rtn", work_directory=tmp_path, threads=2, resume=True)


def test_too_many_threads_are_refused_before_any_work(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="threads=9"):
        oq.quantize(small_policy, few, threads=9, work_directory=tmp_path / "journal")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "status", "words"), [("0", 2, "--threads"), ("1000", 3, "threads=1000")]
)
def test_the_command_refuses_them_too(
    given: str, status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "builtin:tiny-pi05", "--out", out, "--threads", given])
    assert ended.value.code == status
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["rtn", "omega-w4a4-no-prior", "svdquant"])
@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_the_content_hash_does_not_depend_on_the_number_of_threads(
    family: str, recipe: str, few: Observations, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    policy = request.getfixturevalue(family)
    assert len({content_hash(policy, few, recipe, tmp_path, n) for n in (1, 2, 3)}) == 1


@pytest.mark.parametrize("recipe", ["gptq", "omega-w4a4-no-prior", "svdquant"])
def test_nor_does_it_where_factorizations_would_have_other_bits_on_more_threads(
    recipe: str, tmp_path: Path
) -> None:
    """512 inputs: here they do, were they not made on one."""
    generator = torch.Generator().manual_seed(5)
    module = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.03, generator=generator)
    policy = oq.TorchPolicy(module, sample=one_step, action_head=r"0|2")
    seen = [{"x": torch.randn((300, 512), generator=generator)} for _ in range(3)]
    assert len({content_hash(policy, seen, recipe, tmp_path, n) for n in (1, 2, 3)}) == 1


def one_step(module: nn.Module, observation: Any, _noise: Any, clock: oq.FlowClock) -> Tensor:
    with clock.step(0, 1.0):
        return module(observation["x"])


def content_hash(
    policy: Any, observations: Any, recipe: str, folder: Path, count: int
) -> str | None:
    quantized = oq.quantize(policy, observations, recipe, threads=count)
    saved = quantized.save_pretrained(folder / str(count))
    given = policy if policy.family == "torch" else None
    return oq.load(saved, policy=given).content_hash
