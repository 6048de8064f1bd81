"""``quantize``, ``inspect`` and ``verify``: making artifacts and looking into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from omega_qvla.api import quantize
from omega_qvla.artifact import preflight, verify_artifact
from omega_qvla.artifact.claims import Claim
from omega_qvla.cli.options import (
    PROCESSES,
    STEPS,
    Calibrated,
    Checkpoint,
    Common,
    Positional,
    save,
)
from omega_qvla.cli.outputs import prepare_journal, require_free_artifact
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sources import admit, calibration_of, default_calibration
from omega_qvla.devices import find_gpu
from omega_qvla.errors import RecipeError
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal, finished_sites
from omega_qvla.quantization.pipeline import planned_sites, work_shares
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.inspection import inspect_artifact
from omega_qvla.runtime.linear import best_kernel
from omega_qvla.runtime.loading import coverage_failures
from omega_qvla.runtime.prediction import predict_directory
from omega_qvla.threads import check_threads, fitting_threads, widest_linear


@dataclass(frozen=True)
class Quantize(Calibrated, Checkpoint, Common):
    """Quantize a policy and save the artifact."""

    policy: Positional[str] = tyro.MISSING
    out: Annotated[Path, tyro.conf.arg(help="directory of the artifact")] = tyro.MISSING
    recipe: Annotated[str, tyro.conf.arg(help="name or YAML file")] = DEFAULT_RECIPE
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    steps: Annotated[
        int | None,
        tyro.conf.arg(help="denoising steps it will run with; the checkpoint's own"),
        STEPS,
    ] = None
    device: Annotated[
        str, tyro.conf.arg(help="computes: cpu, cuda or cuda:N; the artifact runs on either")
    ] = "cpu"
    threads: Annotated[
        int | None,
        tyro.conf.arg(help="at most; every core by default, and always one for small layers"),
        PROCESSES,
    ] = None
    resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="only predict the memory table")] = False

    def run(self, screen: Screen) -> int:
        if self.device != "cpu":
            find_gpu(self.device)  # refused before anything is read
        if self.threads is not None:
            check_threads(self.threads)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        if self.dry_run:
            policy = _with_steps(stream_policy(self.policy, self.choices), self.steps)
            screen.decisions(policy.decisions)
            sites = [{"name": site.name} for site in planned_sites(policy, recipe)]
            content = recipe.model_dump(mode="json")
            report = _inspection(predict_directory(policy, recipe), content, sites, best_kernel())
            screen.memory(report, f"{self.policy} with {recipe.name}, predicted")
            save(self.json, report)
            return 0
        if not recipe.realizable:
            raise RecipeError(
                f"recipe {recipe.name!r} is a simulation: its activation scales differ along the "
                "contraction, so there are no integers to save. See it in `omega-qvla compare`"
            )
        with Claim(self.out) as claim:
            require_free_artifact(self.out, self.overwrite)
            prepare_journal(screen, self.journal, resume=self.resume, overwrite=self.overwrite)
            return self._quantize(screen, recipe, claim)

    @property
    def journal(self) -> Path:
        """Where finished sites are kept until the artifact is complete."""
        out = self.out.resolve()
        return out.with_name(f".{out.name}.journal")

    def kept(self) -> str | None:
        finished = finished_sites(self.journal)
        return f"{finished} finished site(s) are kept in {self.journal}" if finished else None

    def _quantize(self, screen: Screen, recipe: Recipe, claim: Claim) -> int:
        # A recipe that cascades runs on its own results, which needs the whole policy in memory.
        read = load_policy if recipe.cascade else stream_policy
        policy = _with_steps(read(self.policy, self.choices), self.steps)
        screen.decisions(policy.decisions)
        source = self.calibration or default_calibration(self.policy)
        observations = calibration_of(source, policy, self, recipe.observations)
        screen.report(observations)
        admit(policy, observations, recipe.observations, self, screen)
        threads = fitting_threads(widest_linear(policy.module), self.threads)
        screen.say(f"computing with {threads} thread(s)")
        preflight(self.out, predict_directory(policy, recipe)["total_bytes"])
        shares = work_shares(policy, recipe)
        with screen.bar(f"quantizing with {recipe.name}", shares) as step:
            quantized = quantize(
                policy,
                observations,
                recipe,
                work_directory=self.journal,
                resume=self.resume,
                progress=lambda done, total, site: step(done, total, site),
                device=self.device,
                allow_mismatch=self.allow_mismatch,
                threads=threads,
            )
        assert isinstance(quantized, QuantizedPolicy)
        quantized.save_pretrained(self.out, claim=claim)
        discard_journal(self.journal)
        return Inspect(directory=self.out, json=self.json).run(screen)


@dataclass(frozen=True)
class Inspect(Common):
    """Show what an artifact holds: memory per component, recipe, sites, hash."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        looked = inspect_artifact(self.directory, directory_bytes=directory_bytes(self.directory))
        recipe = looked.config["recipe"]
        sites = looked.config["sites"]
        report = _inspection(looked.memory, recipe, sites, looked.kernel)
        report["content_hash"] = looked.content_hash
        decisions = looked.config["policy"].get("decisions", {})
        report["decisions"] = decisions
        screen.memory(report, str(self.directory))
        screen.decisions(decisions)
        screen.say(f"recipe   {recipe['name']} ({looked.config['recipe_hash'][:16]})")
        screen.say(f"content  {looked.content_hash}")
        screen.say(f"kernel   {looked.kernel}; {len(sites)} quantized sites")
        notes = [f"{site['name']}: {site['note']}" for site in sites if site["note"]]
        for note in notes:
            screen.say(f"note     {note}")
        save(self.json, report)
        return 0


@dataclass(frozen=True)
class Verify(Common):
    """Check every byte of an artifact against its SHA-256."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        report = verify_artifact(self.directory)
        if report.ok:
            report = replace(report, failures=coverage_failures(self.directory))
        for failure in report.failures:
            screen.say(f"FAILED {failure}")
        screen.say(f"{report.checked} checked, {len(report.failures)} failed")
        save(self.json, report.to_json())
        return 0 if report.ok else 1


def _with_steps(policy: NativePolicy, steps: int | None) -> NativePolicy:
    return policy if steps is None else policy.with_steps(steps)


def _inspection(
    memory: Mapping[str, Any], recipe: Mapping[str, Any], sites: Sequence[Any], kernel: str
) -> dict[str, Any]:
    return {"schema": 1, **memory, "recipe": recipe, "kernel": kernel, "sites": list(sites)}
