"""``quantize``: from a policy to an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from omega_qvla.api import quantize
from omega_qvla.artifact import preflight
from omega_qvla.claims import Claim
from omega_qvla.cli.inspect import Inspect
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
from omega_qvla.cli.sources import calibration_of
from omega_qvla.devices import EXPERIMENTAL, find_gpu
from omega_qvla.errors import RecipeError, UsageError
from omega_qvla.evaluation.subjects import admit, default_calibration
from omega_qvla.policies.any_policy import load_policy, stream_policy
from omega_qvla.policies.lerobot_bridge.coverage import coverage_lines
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal, finished_sites
from omega_qvla.quantization.pipeline import planned_sites, work_shares
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.results.memory import Inspection
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.linear import best_kernel
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
            screen.say(EXPERIMENTAL)
        if self.threads is not None:
            check_threads(self.threads)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        if self.dry_run:
            policy = _with_steps(stream_policy(self.policy, self.choices), self.steps)
            screen.decisions(policy.decisions)
            rows = _coverage(screen, policy)
            found = Inspection.model_validate(
                {
                    **predict_directory(policy, recipe),
                    "recipe": recipe.model_dump(mode="json"),
                    "kernel": best_kernel(),
                    "sites": [{"name": site.name} for site in planned_sites(policy, recipe)],
                    "coverage": rows,
                }
            )
            screen.memory(found, f"{self.policy} with {recipe.name}, predicted")
            save(self.json, found.to_json())
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
        _coverage(screen, policy)
        source = self.calibration or default_calibration(self.policy)
        observations = calibration_of(source, policy, self, recipe.observations)
        screen.report(observations)
        if isinstance(policy, NativePolicy):
            admit(
                policy,
                observations,
                recipe.observations,
                allow=self.allow_mismatch,
                say=screen.say,
            )
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


def _with_steps(
    policy: NativePolicy | LeRobotPolicy, steps: int | None
) -> NativePolicy | LeRobotPolicy:
    if steps is None:
        return policy
    if isinstance(policy, NativePolicy):
        return policy.with_steps(steps)
    raise UsageError(
        f"--steps {steps}: LeRobot's own code runs this policy, with the {policy.steps} steps of "
        "its config.json; change them there"
    )


def _coverage(screen: Screen, policy: NativePolicy | LeRobotPolicy) -> list[dict[str, Any]] | None:
    """What of a policy that LeRobot runs becomes integers: printed before the work."""
    if isinstance(policy, NativePolicy):
        return None
    for line in coverage_lines(policy.coverage):
        screen.say(line)
    return [dict(row) for row in policy.coverage]
