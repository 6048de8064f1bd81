"""The loop over a whole policy: what it covers, that it resumes, and what it refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.claims import Claim
from omega_qvla.errors import (
    NonFiniteError,
    ObservationError,
    OutputError,
    PolicyError,
    ResourceError,
    ResumeError,
)
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.full_precision import (
    load_policy,
    stream_policy,
)
from omega_qvla.policies.pi05.checkpoints.openpi import write_openpi
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization import pipeline
from omega_qvla.quantization.journal import HEADER, Journal, discard_journal
from omega_qvla.quantization.pipeline import quantize_policy, work_shares
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import build

pytestmark = pytest.mark.long

LAST = "paligemma_with_expert.gemma_expert.model.layers.1"
SITES = 18
MakePolicy = Callable[..., Pi05Policy]


class StopError(Exception):
    """Raised by the tests in the middle of the work."""


class Recorder:
    """Progress callback that remembers, and stops after a number of finished sites."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[tuple[int, int, str]] = []
        self.stop_after = stop_after

    def __call__(self, done: int, total: int, what: str) -> None:
        if done == self.stop_after:
            raise StopError
        self.calls.append((done, total, what))


def directory_bytes(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sites that are really quantized from now on, not read from a journal."""
    computed: list[str] = []
    original = pipeline.quantize_site

    def counting(site: Any, *arguments: Any) -> Any:
        computed.append(site.name)
        return original(site, *arguments)

    monkeypatch.setattr(pipeline, "quantize_site", counting)
    return computed


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, small_policy: Pi05Policy, few: Observations
) -> Path:
    """The artifact of an undisturbed run of the default recipe."""
    quantized = oq.quantize(small_policy, few)
    return quantized.save_pretrained(tmp_path_factory.mktemp("reference") / "artifact")


CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("conftest", sys.argv[1])
kit = importlib.util.module_from_spec(spec); spec.loader.exec_module(kit)
import omega_qvla as oq
work, out, kill_after = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
def progress(done, total, what):
    if done == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
quantized = oq.quantize(
    kit.build_policy(), kit.build_observations(),
    work_directory=work / "journal", resume=True, progress=progress,
)
quantized.save_pretrained(out)
"""


def run_in_process(work: Path, *, out: Path, kill_after: int = -1) -> subprocess.Popen[bytes]:
    kit = Path(__file__).parents[1] / "conftest.py"
    command = [sys.executable, "-c", CHILD, str(kit), str(work), str(out), str(kill_after)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=120) == 0


@pytest.mark.parametrize("name", ["rtn", "omega-w4a4-static", "omega-paper"])
def test_every_covered_site_is_quantized_exactly_once(
    name: str, policy: Pi05Policy, observations: Observations
) -> None:
    recipe, progress = Recipe.load(name), Recorder()
    result = quantize_policy(policy, observations, recipe, progress=progress)
    covered = [s.name for s in sites_of(policy) if recipe.scheme(s.component) is not None]
    assert [site.site.name for site in result.sites] == covered
    assert [call[2] for call in progress.calls] == covered
    assert [call[:2] for call in progress.calls] == [(i, len(covered)) for i in range(len(covered))]
    assert max(Counter(covered).values()) == 1


def test_paper_scope_covers_backbone_and_action_head_only(
    policy: Pi05Policy, observations: Observations, omega_recipe: Recipe
) -> None:
    result = quantize_policy(policy, observations, omega_recipe.scoped("paper"))
    assert {site.site.component for site in result.sites} == {"backbone", "action_head"}
    assert result.embedding is None and result.step_table is None


def test_the_given_policy_is_not_modified(
    policy: Pi05Policy, observations: Observations, noise: np.ndarray
) -> None:
    before = policy.sample_actions(observations[0], noise)
    fingerprint = pipeline.weights_fingerprint(policy)
    oq.quantize(policy, observations)
    assert pipeline.weights_fingerprint(policy) == fingerprint
    assert np.array_equal(policy.sample_actions(observations[0], noise), before)
    assert len(sites_of(policy)) == SITES


def test_cascade_changes_later_sites_but_not_the_first(
    policy: Pi05Policy, observations: Observations, omega_recipe: Recipe
) -> None:
    cascade = omega_recipe.model_copy(update={"cascade": True})
    alone = omega_recipe.model_copy(update={"cascade": False})
    first = quantize_policy(policy, observations, cascade).sites
    second = quantize_policy(policy, observations, alone).sites
    assert torch.equal(first[0].weight.integers, second[0].weight.integers)
    assert not torch.equal(first[-1].weight.integers, second[-1].weight.integers)


def test_a_width_that_is_no_multiple_of_the_block_is_padded_and_matches(
    policy: Pi05Policy, observations: Observations, noise: np.ndarray, omega_recipe: Recipe
) -> None:
    """fc2 reads 72 channels: stored as 128, and the integers give what the simulation gives."""
    result = quantize_policy(policy, observations, omega_recipe)
    (fc2,) = [site for site in result.sites if site.site.name.endswith("mlp.fc2")]
    assert fc2.in_features == 72 and fc2.weight.integers.shape == (64, 128)
    quantized = oq.quantize(policy, observations, omega_recipe)
    integers = quantized.sample_actions(observations[0], noise)
    simulated = pipeline.simulate(policy, result).sample_actions(observations[0], noise)
    exact = policy.sample_actions(observations[0], noise)
    # The two differ by float32 rounding, but a rounding that falls on the other side of a tie
    # moves one activation by a whole step; ten times less than the quantization error is allowed.
    assert np.abs(integers - simulated).max() < 0.1 * np.abs(simulated - exact).max() + 1e-4


def test_two_runs_give_the_same_bytes(
    policy: Pi05Policy, observations: Observations, uninterrupted: Path, tmp_path: Path
) -> None:
    oq.quantize(policy, observations).save_pretrained(tmp_path / "again")
    assert directory_bytes(tmp_path / "again") == directory_bytes(uninterrupted)


@pytest.mark.parametrize("finished", [0, 1, 7, SITES - 1])
def test_interrupted_work_resumes_to_the_same_bytes_without_repeating_a_site(
    finished: int,
    policy: Pi05Policy,
    observations: Observations,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "journal"
    with pytest.raises(StopError):
        oq.quantize(policy, observations, work_directory=work, progress=Recorder(finished))
    computed = count_computed(monkeypatch)
    quantized = oq.quantize(policy, observations, work_directory=work, resume=True)
    assert len(computed) == SITES - finished
    quantized.save_pretrained(tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(uninterrupted)


def test_a_recipe_without_cascade_resumes_to_the_same_sites(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    whole = oq.quantize(policy, observations, "omega-paper")
    with pytest.raises(StopError):
        oq.quantize(
            policy, observations, "omega-paper", work_directory=tmp_path, progress=Recorder(5)
        )
    resumed = oq.quantize(policy, observations, "omega-paper", work_directory=tmp_path, resume=True)
    noise = np.ones((4, 4), np.float32)
    expected = whole.sample_actions(observations[0], noise)
    assert np.array_equal(resumed.sample_actions(observations[0], noise), expected)


def test_killed_work_resumes_to_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL between sites; then a file as a kill in the middle of writing leaves it."""
    killed = run_in_process(tmp_path, out=tmp_path / "out", kill_after=6)
    assert killed.wait(timeout=120) == -signal.SIGKILL
    stored = sorted((tmp_path / "journal").glob("site-*.safetensors"))
    assert len(stored) == 6 and not (tmp_path / "out").exists()
    half = stored[-1].read_bytes()[:1000]
    (tmp_path / "journal" / "site-00006.safetensors.partial").write_bytes(half)
    finish(run_in_process(tmp_path, out=tmp_path / "out"))
    assert directory_bytes(tmp_path / "out") == directory_bytes(uninterrupted)


def test_finished_sites_are_never_discarded_unasked(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    interrupted(policy, observations, tmp_path)
    before = directory_bytes(tmp_path)
    with pytest.raises(ResumeError, match=r"3 finished site\(s\).*resume"):
        oq.quantize(policy, observations, "rtn", work_directory=tmp_path)
    assert directory_bytes(tmp_path) == before


def interrupted(policy: Pi05Policy, observations: Observations, work: Path) -> None:
    with pytest.raises(StopError):
        oq.quantize(policy, observations, "rtn", work_directory=work, progress=Recorder(3))


def test_a_changed_recipe_is_not_resumed(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    interrupted(policy, observations, tmp_path)
    with pytest.raises(ResumeError, match=r"recipe: was '.*', now '") as caught:
        oq.quantize(policy, observations, "omega-w4a4-static", work_directory=tmp_path, resume=True)
    assert "weights" not in str(caught.value)


def test_changed_weights_and_calibration_are_both_listed(
    policy: Pi05Policy, observations: Observations, tmp_path: Path, make_small: MakePolicy
) -> None:
    interrupted(policy, observations, tmp_path)
    with pytest.raises(ResumeError, match=r"calibration: was .*weights: was "):
        oq.quantize(make_small(1), observations[1:], "rtn", work_directory=tmp_path, resume=True)


def test_another_number_of_steps_is_not_resumed(
    policy: Pi05Policy, observations: Observations, tmp_path: Path, make_small: MakePolicy
) -> None:
    interrupted(policy, observations, tmp_path)
    with pytest.raises(ResumeError, match="policy: was"):
        oq.quantize(make_small(steps=5), observations, "rtn", work_directory=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "exchanged"])
def test_a_damaged_journal_file_is_refused_by_name(
    damage: str, policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    interrupted(policy, observations, tmp_path)
    path = tmp_path / "site-00001.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            content = content[: len(content) // 2]
        case "flipped":
            content[-5] ^= 4
        case "empty":
            content = bytearray()
        case _:
            content = bytearray((tmp_path / "site-00002.safetensors").read_bytes())
    path.write_bytes(content)
    with pytest.raises(ResumeError, match=r"site-00001.*damaged"):
        oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=True)


def streamed_policy(policy: Pi05Policy, directory: Path) -> Any:
    """The policy read from a checkpoint piece by piece; its finished sites stay in the journal."""
    write_openpi(policy, directory)
    return stream_policy(str(directory))


def test_a_removed_journal_file_is_an_error_and_computed_again_when_resumed(
    policy: Pi05Policy, observations: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, work = streamed_policy(policy, tmp_path / "checkpoint"), tmp_path / "journal"
    removed = work / "site-00004.safetensors"

    def remove(done: int, _total: int, _what: str) -> None:
        if done == 9:
            removed.unlink()

    with pytest.raises(ResumeError, match=r"site-00004.*removed.*resume"):
        oq.quantize(streamed, observations, "rtn", work_directory=work, progress=remove)
    computed = count_computed(monkeypatch)
    made = oq.quantize(streamed, observations, "rtn", work_directory=work, resume=True)
    assert len(computed) == 1
    whole = oq.quantize(load_policy(str(tmp_path / "checkpoint")), observations, "rtn")
    whole.save_pretrained(tmp_path / "whole")
    made.save_pretrained(tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


def test_a_stored_sequence_ends_at_its_length_and_not_before(
    policy: Pi05Policy, observations: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = streamed_policy(policy, tmp_path / "checkpoint")
    recipe = Recipe.load("rtn")
    with Journal(tmp_path / "journal", {}, recipe, resume=False) as journal:
        sites = quantize_policy(streamed, observations, recipe, journal=lambda _: journal).sites
        names = [site.site.name for site in sites]
        assert len(names) == SITES and sites[-1].site.name == names[-1]
        assert [site.site.name for site in sites[2:5]] == names[2:5]
        with pytest.raises(IndexError):
            sites[SITES]
        load = journal.load

        def broken(index: int, site: Any) -> Any:
            if index == 3:
                raise IndexError("from inside")
            return load(index, site)

        monkeypatch.setattr(journal, "load", broken)
        with pytest.raises(IndexError, match="from inside"):
            list(sites)


def test_two_quantizations_of_one_journal_are_never_mixed(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    """The second is refused before it computes anything; a reader of what is finished is not."""

    def second(done: int, _total: int, _what: str) -> None:
        if done == 5:
            for resume in (False, True):
                with pytest.raises(OutputError, match=f"process {os.getpid()} "):
                    oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=resume)

    whole = oq.quantize(policy, observations, "rtn", work_directory=tmp_path, progress=second)
    with Claim(tmp_path):
        read = oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=True)
    assert all(torch.equal(value, read.tensors()[name]) for name, value in whole.tensors().items())


def test_fewer_sites_than_the_recipe_quantizes_are_no_policy(
    policy: Pi05Policy, observations: Observations
) -> None:
    whole = quantize_policy(policy, observations, Recipe.load("rtn"))
    some = replace(whole, sites=list(whole.sites)[3:])
    twice = replace(whole, sites=[*whole.sites, whole.sites[0]])
    with pytest.raises(PolicyError, match=r"linears that the recipe quantizes are in no site"):
        build(policy, some)
    with pytest.raises(PolicyError, match=r"linears are in two sites"):
        build(policy, twice)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_damaged_journal_header_is_refused(
    content: bytes, policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    interrupted(policy, observations, tmp_path)
    (tmp_path / HEADER).write_bytes(content)
    with pytest.raises(ResumeError, match=HEADER):
        oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=True)


def test_sites_without_a_header_are_not_trusted(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    interrupted(policy, observations, tmp_path)
    (tmp_path / HEADER).unlink()
    with pytest.raises(ResumeError, match=f"no {HEADER}"):
        oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_with_other_things_in_it_is_neither_used_nor_emptied(
    resume: bool, policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match=r"thesis\.tex"):
        oq.quantize(policy, observations, "rtn", work_directory=tmp_path, resume=resume)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_discarded_journal_leaves_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "work", {"recipe": "x"}, Recipe.load("rtn"), resume=False):
        pass
    discard_journal(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files_before", [0, 1, 4])
def test_a_full_disk_is_a_resource_error_and_resumable(
    files_before: int,
    policy: Pi05Policy,
    observations: Observations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def full(descriptor: int) -> None:
        if len(written) == files_before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left"):
            oq.quantize(policy, observations, "rtn", work_directory=tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.partial"))
    computed = count_computed(monkeypatch)
    oq.quantize(policy, observations, "rtn", work_directory=tmp_path / "work", resume=True)
    assert len(computed) == SITES - max(0, files_before - 1)


@pytest.mark.parametrize("name", ["rtn", "omega-w4a4-static", "omega-paper"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named(
    name: str, bad: float, policy: Pi05Policy, observations: Observations
) -> None:
    """Even deep in the action head, whose outputs come back as inputs of its first layer."""
    policy.module.get_submodule(f"{LAST}.mlp.up_proj").weight[3, 5] = bad
    with pytest.raises(NonFiniteError, match=rf"weight of '{LAST}\.mlp\.up_proj'"):
        quantize_policy(policy, observations, Recipe.load(name))


@pytest.mark.parametrize(("step", "observation"), [(0, 0), (2, 1), (3, 4)])
@pytest.mark.parametrize("cascade", [True, False])
def test_a_non_finite_activation_is_named_with_site_step_and_observation(
    step: int,
    observation: int,
    cascade: bool,
    policy: Pi05Policy,
    omega_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Observation numbers are the user's, although only some are used."""
    source = np.random.default_rng(0)
    given = [
        {
            "images": {n: np.zeros((28, 28, 3), np.uint8) for n in ("base", "wrist")},
            "state": source.uniform(-1, 1, 4),
            "prompt": "press the button",
        }
        for _ in range(5)
    ]
    recipe = omega_recipe.model_copy(update={"observations": 3, "cascade": cascade})
    used = [0, 2, 4]
    label = used[min(observation, 2)]
    clone = policy.clone

    def sick() -> Pi05Policy:
        twin = clone()
        runs = {"done": 0}

        def poison(_module: Any, inputs: tuple[torch.Tensor]) -> Any:
            if twin.clock.index is None:
                return None
            if twin.clock.index == 0:
                runs["done"] += 1
            here = (runs["done"] - 1) % 3 == used.index(label) and twin.clock.index == step
            return (inputs[0] * float("nan"),) if here else None

        twin.module.get_submodule(f"{LAST}.self_attn.o_proj").register_forward_pre_hook(poison)
        return twin

    monkeypatch.setattr(policy, "clone", sick)
    expected = rf"{LAST}\.self_attn\.o_proj.*observation {label}, denoising step {step}"
    with pytest.raises(NonFiniteError, match=expected):
        quantize_policy(policy, given, recipe)


def test_no_observations_are_refused(policy: Pi05Policy, omega_recipe: Recipe) -> None:
    with pytest.raises(ObservationError, match="no observations"):
        quantize_policy(policy, [], omega_recipe)


@pytest.mark.parametrize("given", [5, [1], {"state": 1}])
def test_things_that_are_not_observations_are_refused(given: Any, policy: Pi05Policy) -> None:
    with pytest.raises(ObservationError, match="mappings"):
        oq.quantize(policy, given)


def test_a_recipe_that_covers_nothing_is_refused(
    policy: Pi05Policy, observations: Observations
) -> None:
    with pytest.raises(PolicyError, match=r"covers no part.*action_head.*vision"):
        quantize_policy(policy, observations, Recipe(name="empty", description=""))


def test_more_observations_than_the_recipe_wants_are_thinned_evenly(
    policy: Pi05Policy, observations: Observations
) -> None:
    recipe = Recipe.load("rtn").model_copy(update={"observations": 2})
    result = quantize_policy(policy, observations, recipe)
    assert result.observations == 2
    assert result.calibration == Observations([observations[0], observations[2]]).fingerprint


def test_a_streamed_policy_gives_the_bytes_of_one_in_memory(tmp_path: Path) -> None:
    """Layer by layer from the checkpoint file, sites read back from the journal."""
    source, written = load_policy("random:tiny-pi05"), tmp_path / "checkpoint"
    write_openpi(source, written)
    config = source.config
    observations = Observations.random(config.cameras, config.state_dim, count=2, size=84)
    recipe = Recipe.load("omega-w4a4-static")

    def manifest(name: str, policy: Pi05Policy) -> bytes:
        work = tmp_path / f"{name}.journal"
        quantized = oq.quantize(policy, observations, recipe, work_directory=work)
        assert policy.store is None or all(p.is_meta for p in policy.module.parameters())
        quantized.save_pretrained(tmp_path / name)
        return (tmp_path / name / "manifest.json").read_bytes()

    assert manifest("mapped", stream_policy(written)) == manifest("read", load_policy(written))
    assert manifest("seeded", stream_policy("random:tiny-pi05")) == manifest("drawn", source)


def test_a_streamed_policy_refuses_recipes_that_need_all_of_it(tmp_path: Path) -> None:
    policy = stream_policy("random:tiny-pi05")
    config = policy.config
    observations = Observations.random(config.cameras, config.state_dim, count=1, size=84)
    cascading = Recipe.load("omega-w4a4-static").model_copy(update={"cascade": True})
    with pytest.raises(PolicyError, match=r"cascade.*load_policy"):
        quantize_policy(policy, observations, cascading)
    with pytest.raises(PolicyError, match="simulation"):
        quantize_policy(policy, observations, Recipe.load("omega-paper"))


def test_observations_that_do_not_fit_leave_no_journal_behind(
    policy: Pi05Policy, observations: Observations, tmp_path: Path
) -> None:
    wide = [{**item, "state": np.zeros(9, np.float32)} for item in observations]
    with pytest.raises(ObservationError, match=r"shape \[4\], got \[9\]"):
        oq.quantize(policy, wide, work_directory=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_work_is_shared_out_by_cost() -> None:
    recipe = Recipe.load("omega-w4a4-static")
    policy = stream_policy("random:pi05-libero")
    covered = [site.name for site in sites_of(policy) if recipe.scheme_of(site) is not None]
    shares = work_shares(policy, recipe)
    assert (shares[0], shares[-1], len(shares)) == (0.0, 1.0, len(covered) + 1)
    cost = {name: shares[i + 1] - shares[i] for i, name in enumerate(covered)}
    assert min(cost.values()) > 0.0
    # 17 of the 250 sites, those of 16 384 inputs, take most of the hour.
    wide = [value for name, value in cost.items() if "language_model" in name and "down" in name]
    assert len(wide) == 17 and sum(wide) > 0.8
