"""``quantize``, ``inspect`` and ``verify``: making artifacts and looking into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from omega_qvla.api import quantize
from omega_qvla.artifact import preflight, read_artifact, verify_artifact
from omega_qvla.cli.options import Calibrated, Checkpoint, Common, Positional, save
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sources import calibration_of, default_calibration
from omega_qvla.devices import find_gpu
from omega_qvla.errors import PolicyError, RecipeError
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.loading import load_policy, policy_structure, stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.quantization.pipeline import work_shares
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.runtime.linear import best_kernel
from omega_qvla.runtime.loading import load
from omega_qvla.runtime.memory import predict
from omega_qvla.threads import check_threads, fitting_threads, widest_linear


@dataclass(frozen=True)
class Quantize(Calibrated, Checkpoint, Common):
    """Quantize a policy and save the artifact."""

    policy: Positional[str] = tyro.MISSING
    out: Annotated[Path, tyro.conf.arg(help="directory of the artifact")] = tyro.MISSING
    recipe: Annotated[str, tyro.conf.arg(help="name or YAML file")] = DEFAULT_RECIPE
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    steps: Annotated[
        int | None, tyro.conf.arg(help="denoising steps it will run with; the checkpoint's own")
    ] = None
    device: Annotated[
        str, tyro.conf.arg(help="computes: cpu, cuda or cuda:N; the artifact runs on either")
    ] = "cpu"
    threads: Annotated[
        int | None,
        tyro.conf.arg(help="at most; every core by default, and always one for small layers"),
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
            policy = _with_steps(policy_structure(self.policy, self.choices), self.steps)
            sites = [{"name": name} for name in _covered_sites(policy, recipe)]
            content = recipe.model_dump(mode="json")
            report = _inspection(predict(policy, recipe), content, sites, best_kernel())
            screen.memory(report, f"{self.policy} with {recipe.name}, predicted")
            save(self.json, report)
            return 0
        if not recipe.realizable:
            raise RecipeError(
                f"recipe {recipe.name!r} is a simulation: its activation scales differ along the "
                "contraction, so there are no integers to save. See it in `omega-qvla compare`"
            )
        # A recipe that cascades runs on its own results, which needs the whole policy in memory.
        read = load_policy if recipe.cascade else stream_policy
        policy = _with_steps(read(self.policy, self.choices), self.steps)
        source = self.calibration or default_calibration(self.policy)
        observations = calibration_of(source, policy, self, recipe.observations)
        screen.report(observations)
        if (self.calibration or "").startswith("random:"):
            screen.say("calibrating on noise: fit to measure speed and memory, nothing else")
        threads = fitting_threads(widest_linear(policy.module), self.threads)
        screen.say(f"computing with {threads} thread(s)")
        preflight(self.out, predict(policy, recipe)["total_bytes"])
        work = self.out.with_name(f".{self.out.name}.journal")
        shares = work_shares(policy, recipe)
        with screen.bar(f"quantizing with {recipe.name}", shares) as step:
            quantized = quantize(
                policy,
                observations,
                recipe,
                work_directory=work,
                resume=self.resume,
                progress=lambda done, total, site: step(done, total, site),
                device=self.device,
                threads=threads,
            )
        quantized.save_pretrained(self.out)
        discard_journal(work)
        return Inspect(directory=self.out, json=self.json).run(screen)


@dataclass(frozen=True)
class Inspect(Common):
    """Show what an artifact holds: memory per component, recipe, sites, hash."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        quantized = load(self.directory) if not _is_torch(self.directory) else None
        if quantized is None:
            raise PolicyError(
                f"{self.directory} was made from a module of your own; inspect it from Python with "
                "load(directory, policy=...).memory_report()"
            )
        report = _inspection(
            quantized.memory_report(directory_bytes=directory_bytes(self.directory)),
            quantized.config["recipe"],
            quantized.config["sites"],
            quantized.kernel,
        )
        report["content_hash"] = quantized.content_hash
        recipe = quantized.config["recipe"]
        screen.memory(report, str(self.directory))
        screen.say(f"recipe   {recipe['name']} ({quantized.config['recipe_hash'][:16]})")
        screen.say(f"content  {quantized.content_hash}")
        screen.say(f"kernel   {quantized.kernel}; {len(quantized.sites)} quantized sites")
        notes = [f"{site.site.name}: {site.note}" for site in quantized.sites if site.note]
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


def _covered_sites(policy: NativePolicy, recipe: Recipe) -> list[str]:
    return [
        site.name
        for stage in policy.stages()
        for site in stage.sites
        if recipe.scheme_of(site) is not None
    ]


def _is_torch(directory: Path) -> bool:
    return read_artifact(directory, verify=False).config["policy"]["family"] == "torch"
