"""``benchmark``: the frozen comparison of all methods on both embedded policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from omega_qvla.calibration.observations import Observations
from omega_qvla.claims import Claim
from omega_qvla.cli.comparing import Compare
from omega_qvla.cli.options import Common, Execution, names_of, save
from omega_qvla.cli.outputs import known_cells, require_free_file, require_kept
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sweeps import require_cluster
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.benchmark import (
    BENCHMARK,
    METHODS,
    QUICK_METHODS,
    Definition,
    FrozenPolicy,
    benchmark_document,
)
from omega_qvla.evaluation.comparison import FULL_PRECISION
from omega_qvla.evaluation.kernel_speed import machine_name
from omega_qvla.evaluation.twin import condition_name
from omega_qvla.files import write_json
from omega_qvla.policies.loading import load_policy
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.recipe import Recipe
from omega_qvla.report.benchmark_table import benchmark_tables


@dataclass(frozen=True)
class Benchmark(Execution, Common):
    """The frozen benchmark: all methods on both embedded policies, plain and under stress."""

    quick: Annotated[
        bool, tyro.conf.arg(help="a smoke test of the same shape, of three methods; ranks nothing")
    ] = False
    policies: Annotated[str, tyro.conf.arg(help="comma-separated, of the benchmark's")] = ",".join(
        BENCHMARK.policies
    )
    recipes: Annotated[
        str | None, tyro.conf.arg(help="comma-separated names or YAML files; all of the tables")
    ] = None
    out: Annotated[Path, tyro.conf.arg(help="a folder per policy and the whole JSON go here")] = (
        Path("out/benchmark")
    )
    resume: Annotated[
        bool, tyro.conf.arg(help="keep finished episodes, and artifacts made from the same")
    ] = False

    def run(self, screen: Screen) -> int:
        definition = BENCHMARK.quick() if self.quick else BENCHMARK
        names = _chosen(self.policies, definition)
        require_cluster(self)
        target = self.out / f"benchmark-{definition.version}.json"
        with Claim(target):
            self._require_free(definition, names, target)
            return self._run(screen, definition, names, target)

    def kept(self) -> str | None:
        return f"finished episodes and artifacts are kept in {self.out}"

    def _require_free(self, definition: Definition, names: Sequence[str], target: Path) -> None:
        """Refuse outputs that would be lost, of every policy before the first is measured."""
        for name in names:
            self._comparison(definition, name).require_free("benchmark")
        if self.overwrite:
            return
        if self.resume:
            recipes = [Recipe.load(one).name for one in names_of(self.recipes) or self._methods()]
            cells = [
                (f"builtin:{name}", recipe, condition_name(magnitude), "all")
                for name in names
                for recipe in (FULL_PRECISION, *recipes)
                for magnitude in (0.0, *definition.magnitudes)
            ]
            require_kept(target, known_cells(target), cells)
        else:
            require_free_file(target, self.overwrite)

    def _run(
        self, screen: Screen, definition: Definition, names: Sequence[str], target: Path
    ) -> int:
        for name in names:
            definition.require(name, _found(name))
        documents: list[dict[str, Any]] = []
        for name in names:
            screen.say(f"benchmark {definition.version}, {name}")
            documents.append(self._comparison(definition, name).measure(screen, "benchmark"))
        document = benchmark_document(
            definition,
            documents,
            methods=self._methods(),
            machine=machine_name(),
            library=f"omega-qvla {version('omega-qvla')}",
            command=self._command(),
        )
        write_json(document, target)
        save(self.json, document)
        for name, table in benchmark_tables(target).items():
            screen.say(f"\n{name}")
            screen.table(table)
        for cell in document["benchmark"]["missing"]:
            screen.say(f"not measured: {cell}")
        if self.quick:
            screen.say("a few episodes and observations: this shows that it runs, not who wins")
        screen.say(f"\nresults {target}; a page of it: omega-qvla report {target}")
        return 0

    def _comparison(self, definition: Definition, name: str) -> Compare:
        """The benchmark's part of one policy, as ``compare`` would be asked for it."""
        return Compare(
            policy=f"builtin:{name}",
            recipes=self.recipes or ",".join(self._methods()),
            episodes=definition.episodes,
            stress=",".join(f"{magnitude:g}" for magnitude in definition.magnitudes),
            tasks=",".join(definition.tasks),
            held_out=definition.heldout,
            noises=definition.noises,
            reference="once",
            workers=definition.together,
            out=self.out / definition.version / name,
            resume=self.resume,
            overwrite=self.overwrite,
            threads=self.threads,
            processes=self.processes,
            ray=self.ray,
        )

    def _methods(self) -> tuple[str, ...]:
        """What a whole run of this form has."""
        return QUICK_METHODS if self.quick else METHODS

    def _command(self) -> str:
        """What to type for the same rows."""
        words = ["omega-qvla benchmark"]
        if self.quick:
            words.append("--quick")
        if self.policies != Benchmark.policies:
            words.append(f"--policies {self.policies}")
        if self.recipes is not None:
            words.append(f"--recipes {self.recipes}")
        return " ".join(words)


def _chosen(text: str, definition: Definition) -> list[str]:
    names = names_of(text) or []
    unknown = [name for name in names if name not in definition.policies]
    if unknown or not names:
        raise PolicyError(
            f"--policies {text!r}: benchmark {definition.version} has "
            f"{', '.join(definition.policies)}; others are compared with `omega-qvla compare`"
        )
    return list(dict.fromkeys(names))


def _found(name: str) -> FrozenPolicy:
    """What is installed under a name of the benchmark's."""
    source = f"builtin:{name}"
    return FrozenPolicy(
        weights_fingerprint(load_policy(source)),
        Observations.load(source).fingerprint,
        Observations.load(source, split="heldout").fingerprint,
    )
