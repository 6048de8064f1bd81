"""``quantize``: from a policy to an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from omega_qvla.claims import Claim
from omega_qvla.cli.options import (
    COUNT_OR_NONE,
    STEPS,
    Calibrated,
    Checkpoint,
    Common,
    PolicyName,
    Positional,
    RecipeName,
    ScopeName,
    Threads,
    option,
    save,
)
from omega_qvla.cli.outputs import prepare_journal, require_free_artifact
from omega_qvla.errors import ObservationError, OmegaError, RecipeError, UsageError
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe

if TYPE_CHECKING:
    from omega_qvla.calibration.observations import Observations
    from omega_qvla.cli.screen import Screen
    from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
    from omega_qvla.policies.native import NativePolicy
    from omega_qvla.results.memory import HeldOut, Memory
    from omega_qvla.runtime.engine import QuantizedPolicy


@dataclass(frozen=True)
class Quantize(Calibrated, Checkpoint, Common):
    """Quantize a policy and save the artifact.

    First what will be quantized, what is kept and why, and the bytes; at the end the bytes there
    are, the action error on a few observations beside round to nearest's, and what to type next.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla quantize builtin:tiny-pi05 --out out/tiny",
        "omega-qvla quantize DIR --calibration DATASET --out out/mine",
        "omega-qvla quantize lerobot/pi05_base@REVISION --calibration DATASET --dry-run --out x",
    )
    policy: Positional[PolicyName] = tyro.MISSING
    out: Annotated[Path, option(metavar="DIR", help="directory of the artifact")] = tyro.MISSING
    recipe: RecipeName = DEFAULT_RECIPE
    scope: ScopeName = "all"
    steps: Annotated[
        int | None,
        option(metavar="N", help="denoising steps it will run with; the checkpoint's own"),
        STEPS,
    ] = None
    device: Annotated[
        str,
        option(metavar="cpu|cuda|cuda:N", help="what computes; the artifact runs on either"),
    ] = "cpu"
    threads: Threads = None
    held_out: Annotated[
        int,
        option(
            metavar="N",
            help="measure the action error at the end on so many observations that calibration "
            "did not use; 0: do not",
        ),
        COUNT_OR_NONE,
    ] = 16
    resume: Annotated[bool, option(help="continue an interrupted run")] = False
    dry_run: Annotated[bool, option(help="only predict the memory table")] = False

    def run(self, screen: Screen) -> int:
        from omega_qvla.devices import EXPERIMENTAL, find_gpu
        from omega_qvla.threads import check_threads

        if self.device != "cpu":
            find_gpu(self.device)  # refused before anything is read
            screen.say(EXPERIMENTAL)
        if self.threads is not None:
            check_threads(self.threads)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        if self.dry_run:
            return self._predict(screen, recipe)
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
        from omega_qvla.quantization.journal import finished_sites

        finished = finished_sites(self.journal)
        return f"{finished} finished site(s) are kept in {self.journal}" if finished else None

    def _predict(self, screen: Screen, recipe: Recipe) -> int:
        from omega_qvla.policies.any_policy import stream_policy
        from omega_qvla.policies.native import NativePolicy
        from omega_qvla.quantization.pipeline import planned_sites
        from omega_qvla.results.memory import Inspection
        from omega_qvla.runtime.linear import best_kernel

        policy = self._with_steps(stream_policy(self.policy, self.choices))
        screen.decisions(policy.decisions)
        found = Inspection.model_validate(
            {
                **self._plan(screen, policy, recipe).model_dump(),
                "recipe": recipe.model_dump(mode="json"),
                "kernel": best_kernel(),
                "sites": [{"name": site.name} for site in planned_sites(policy, recipe)],
                "coverage": None
                if isinstance(policy, NativePolicy)
                else [dict(row) for row in policy.coverage],
            }
        )
        screen.memory(found, f"{self.policy} with {recipe.name}, predicted")
        save(self.json, found.to_json())
        return 0

    def _plan(self, screen: Screen, policy: NativePolicy | LeRobotPolicy, recipe: Recipe) -> Memory:
        """Say what will be done, part by part."""
        from omega_qvla.policies.lerobot_bridge.coverage import coverage_lines
        from omega_qvla.policies.native import NativePolicy
        from omega_qvla.report.table import Table, human_bytes
        from omega_qvla.results.memory import Memory
        from omega_qvla.runtime.coverage import REMAINDER, coverage
        from omega_qvla.runtime.prediction import predict_directory

        planned = Memory.model_validate(predict_directory(policy, recipe))
        words = coverage(policy, recipe, [part.name for part in planned.components])
        rows = [
            (
                part.name.replace("_", " "),
                words[part.name],
                human_bytes(part.reference_bytes),
                human_bytes(part.bytes),
            )
            for part in planned.components
        ]
        whole = human_bytes(planned.reference_bytes), human_bytes(planned.total_bytes)
        table = Table(
            ("part", f"what {recipe.name} does", "in 16 bits", "after"),
            (*rows, ("whole checkpoint", "", *whole)),
            (REMAINDER,),
        )
        screen.table(table)
        if not isinstance(policy, NativePolicy):
            for line in coverage_lines(policy.coverage):
                screen.say(line)
        return planned

    def _quantize(self, screen: Screen, recipe: Recipe, claim: Claim) -> int:
        from omega_qvla.api import quantize
        from omega_qvla.artifact import preflight
        from omega_qvla.cli.sources import calibration_of
        from omega_qvla.evaluation.subjects import admit, default_calibration
        from omega_qvla.policies.any_policy import load_policy, stream_policy
        from omega_qvla.policies.native import NativePolicy
        from omega_qvla.quantization.journal import discard_journal
        from omega_qvla.quantization.pipeline import work_shares
        from omega_qvla.runtime.engine import QuantizedPolicy
        from omega_qvla.threads import fitting_threads, widest_linear

        # A recipe that cascades runs on its own results, which needs the whole policy in memory.
        read = load_policy if recipe.cascade else stream_policy
        policy = self._with_steps(read(self.policy, self.choices))
        screen.decisions(policy.decisions)
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
        planned = self._plan(screen, policy, recipe)
        threads = fitting_threads(widest_linear(policy.module), self.threads)
        used = min(len(observations), recipe.observations)
        screen.say(f"calibrating on {used} observation(s), computing with {threads} thread(s)")
        preflight(self.out, planned.total_bytes)
        shares = work_shares(policy, recipe)
        with screen.bar(f"quantizing with {recipe.name}", shares) as step:
            quantized = quantize(
                policy,
                observations,
                recipe,
                work_directory=self.journal,
                resume=self.resume,
                progress=step,
                device=self.device,
                allow_mismatch=self.allow_mismatch,
                threads=threads,
            )
        assert isinstance(quantized, QuantizedPolicy)
        quantized.save_pretrained(self.out, claim=claim)
        discard_journal(self.journal)
        held_out = self._held_out(screen, source, policy, quantized, observations)
        return self._summary(screen, held_out)

    def _held_out(
        self,
        screen: Screen,
        source: str,
        policy: NativePolicy | LeRobotPolicy,
        quantized: QuantizedPolicy,
        calibration: Observations,
    ) -> HeldOut | None:
        """The action error at a glance, or why it is not measured."""
        from omega_qvla.evaluation.held_out import BASELINE, MOST_PARAMETERS, measure_held_out
        from omega_qvla.policies.full_precision import load_policy
        from omega_qvla.policies.native import NativePolicy

        size = sum(parameter.numel() for parameter in policy.module.parameters())
        noise = calibration.report is not None and calibration.report.noise
        native = isinstance(policy, NativePolicy)
        if not self.held_out or noise or not native or size > MOST_PARAMETERS:
            reason = (
                "--held-out 0"
                if not self.held_out
                else "LeRobot's own code runs this policy"
                if not native
                else "calibrated on noise"
                if noise
                else f"{size / 1e9:.1f} billion parameters take too long to do twice; "
                f"omega-qvla compare {self.policy} --episodes 0 does it"
            )
            screen.say(f"action error not measured: {reason}")
            return None
        full = load_policy(self.policy, self.choices)
        full = full if self.steps is None else full.with_steps(self.steps)
        try:
            with screen.bar(f"measuring beside {BASELINE}") as step:
                return measure_held_out(
                    full,
                    quantized,
                    calibration,
                    self._candidates(source, full, calibration),
                    count=self.held_out,
                    threads=self.threads,
                    progress=step,
                )
        except (KeyboardInterrupt, OmegaError) as error:  # the artifact is complete all the same
            screen.say(f"action error not measured: {str(error) or 'interrupted'}")
            return None

    def _candidates(
        self, source: str, policy: NativePolicy, calibration: Observations
    ) -> Iterator[Observations]:
        """Where observations are that calibration did not use: its own split, or what is left."""
        from omega_qvla.cli.sources import observations_of

        with suppress(ObservationError):  # a source without that split
            yield observations_of(source, policy, self, split="heldout")
        yield calibration

    def _summary(self, screen: Screen, held_out: HeldOut | None) -> int:
        from omega_qvla.cli.inspect import inspection
        from omega_qvla.report.table import human_bytes

        found, looked = inspection(self.out)
        screen.say(
            f"\n{self.out}: {human_bytes(found.total_bytes)} instead of "
            f"{human_bytes(found.reference_bytes)} in 16 bits, {found.reduction or 0:.1%} smaller"
        )
        for line in [] if held_out is None else _held_out_words(held_out):
            screen.say(line)
        notes = [f"{site['name']}: {site['note']}" for site in looked["sites"] if site["note"]]
        for warning in [*looked["calibration"].get("warnings", ()), *notes]:
            screen.say(f"warning  {warning}")
        screen.say(f"next: omega-qvla inspect {self.out}, or omega-qvla serve {self.out}")
        save(self.json, found.model_copy(update={"held_out": held_out}).to_json())
        return 0

    def _with_steps(self, policy: NativePolicy | LeRobotPolicy) -> NativePolicy | LeRobotPolicy:
        from omega_qvla.policies.native import NativePolicy

        if self.steps is None:
            return policy
        if isinstance(policy, NativePolicy):
            return policy.with_steps(self.steps)
        raise UsageError(
            f"--steps {self.steps}: LeRobot's own code runs this policy, with the {policy.steps} "
            "steps of its config.json; change them there"
        )


def _held_out_words(found: HeldOut) -> list[str]:
    where = "of calibration (there are no others; such figures flatter)"
    if not found.seen_in_calibration:
        where = "that calibration did not use"
    beside = "" if found.rtn_error is None else f"; rtn {found.rtn_error:.3g}"
    floor = "" if found.noise_floor is None else f"; noise floor {found.noise_floor:.3g}"
    lines = [
        f"action error {found.action_error:.3g}{beside}{floor} ({found.observations} observations "
        f"{where}, {found.noises} noises each)"
    ]
    if found.rtn_error is not None and found.action_error > found.rtn_error:
        lines.append(
            "warning  plain rounding (rtn) does better here: look with omega-qvla diagnose"
        )
    return lines
