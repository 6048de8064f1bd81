"""``benchmark``: the frozen comparison of all methods on both embedded policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from omega_qvla.cli.options import Common, Execution, names_of, option, save

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Benchmark(Execution, Common):
    """The frozen benchmark: all methods on both embedded policies, plain and under stress."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla benchmark --quick",
        "omega-qvla benchmark --policies tiny-pi05 --recipes rtn,omega-w4a4 --resume",
    )
    quick: Annotated[
        bool, option(help="a smoke test of the same shape, of three methods; ranks nothing")
    ] = False
    policies: Annotated[str, option(metavar="NAME,..", help="of the benchmark's policies")] = (
        "tiny-pi05,tiny-gr00t"
    )
    recipes: Annotated[
        str | None,
        option(metavar="RECIPE,..", help="names or YAML files; all of the tables by default"),
    ] = None
    out: Annotated[
        Path, option(metavar="DIR", help="a folder per policy and the whole JSON go here")
    ] = Path("out/benchmark")
    resume: Annotated[
        bool, option(help="keep finished episodes, and artifacts made from the same")
    ] = False

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.benchmark_run import benchmark, target_of
        from omega_qvla.report.benchmark_table import benchmark_tables

        with screen.bars() as bars:
            document = benchmark(
                names_of(self.policies) or (),
                names_of(self.recipes),
                quick=self.quick,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                resources=self.resources,
                command=self._command(),
                say=screen.say,
                progress=bars,
            )
        save(self.json, document.to_json())
        for name, table in benchmark_tables(document.rows).items():
            screen.say(f"\n{name}")
            screen.table(table)
        assert document.benchmark is not None
        for cell in document.benchmark.missing:
            screen.say(f"not measured: {cell}")
        if self.quick:
            screen.say("a few episodes and observations: this shows that it runs, not who wins")
        target = target_of(self.out, quick=self.quick)
        screen.say(f"\nresults {target}; a page of it: omega-qvla report {target}")
        return 0

    def kept(self) -> str | None:
        return f"finished episodes and artifacts are kept in {self.out}"

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
